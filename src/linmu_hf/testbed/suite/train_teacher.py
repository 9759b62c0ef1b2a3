"""Train the suite's teacher, a plain `Qwen2_5_VLForConditionalGeneration`; run again, it goes on where it was.

    python -m linmu_hf.testbed.suite.train_teacher --output DIR [--max_seconds 3600]

First the vision tower alone learns what every token shows, by heads that are thrown away; then the decoder alone
learns to answer, easy questions first; then both. `OUTPUT/state` holds what going on needs, `OUTPUT/model` the best
model so far and, once a run is over and its rate has fallen, its last.
"""

import argparse
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import Qwen2_5_VLForConditionalGeneration

from ...commands.common import Parser, check_positive
from ...distillation.muon import Muon
from ...files import locked, whole_folder
from ..encoding import IGNORED
from ..qwen2_5_vl import train_mode
from . import parallel
from .curriculum import Curriculum
from .data import Turns, draw_questions, evaluation_scenes, training_scene, with_opening
from .drawing import Scene
from .encoding import encode, encode_vision
from .model import build_model, save_checkpoint
from .processor import build_processor
from .sources import Sources, sources
from .tasks import KINDS, TASKS
from .videos import MOST
from .vision_heads import Seen, VisionHeads, flat_targets, repeat_targets, watching


# Charts are slow to draw: those of training come from a pool for each kind and level, in blocks of one layout
BLOCK = 50
BLOCKS = 80
STEPS_PER_BLOCK = 20  # until the pool has one more
POOLED = ("bars", "table")
BATCH = {"words": 16, "bars": 16, "table": 16, "icons": 16, "page": 16, "several": 24, "clip": 12, "memory": 20}
KINDS_PER_STEP = 2
MUON_SHARE = 0.4  # of the rate, for matrices
TOWER_SHARE = 0.3  # of the rate, for the tower when it learns together with the decoder
VISION_SHARE = 0.3  # of the heads' loss beside that of answers
REPEATS = ("several", "clip")  # scenes that ask how often an icon is shown
STEADY = 0.75  # of a run; then the rate falls


@lru_cache(maxsize=6 * BLOCK * BLOCKS)
def _pooled_scene(seed: int, kind: str, level: int, block: int, number: int) -> Scene:
    layout = KINDS[kind].layout(np.random.default_rng((seed, level, block)), level)
    rng = np.random.default_rng((seed, list(KINDS).index(kind), level, block, number))
    return training_scene(rng, kind, **layout)


def draw_scenes(
    rng: np.random.Generator, kind: str, level: int, chosen: Sources, seed: int, step: int, **fixed
) -> list[Scene]:
    """Draws a batch of scenes of one kind, level and size; `fixed` is part of their layout."""
    n = BATCH[kind]
    if kind in POOLED:
        block = int(rng.integers(min(BLOCKS, 1 + step // STEPS_PER_BLOCK)))
        return [_pooled_scene(seed, kind, level, block, int(number)) for number in rng.permutation(BLOCK)[:n]]
    layout = {**KINDS[kind].layout(rng, level), **fixed}
    if kind == "several":
        return [training_scene(rng, kind, chosen=chosen, **{**layout, "alike": i % 4 > 0}) for i in range(n)]
    return [training_scene(rng, kind, chosen=chosen, **layout) for _ in range(n)]


def optimizer_groups(model: nn.Module, heads: nn.Module) -> list[dict]:
    """Returns Muon's groups: of the tower and of the decoder, the matrices inside the blocks and all else."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        # the merger's matrices are large, and orthogonalising them would take as long as all others together
        matrix = parameter.ndim == 2 and not any(part in name for part in ("embed_tokens", "merger"))
        groups.setdefault((".visual." in name, matrix), []).append(parameter)
    groups[True, False] += heads.parameters()
    return [
        {"params": members, "tower": tower, "heads": int(matrix), "weight_decay": 0.01 * matrix}
        for (tower, matrix), members in groups.items()
    ]


def positions(model, batch: dict) -> torch.Tensor:
    """Returns positions `[3, b, t]` of a batch of one layout: all rows have those of the longest."""
    b = len(batch["input_ids"])
    longest = int(batch["attention_mask"].sum(1).argmax())
    row = {name: batch[name][longest, None] for name in ("input_ids", "mm_token_type_ids")}
    for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts"):
        if name in batch:
            row[name] = batch[name][: len(batch[name]) // b]
    return model.model.get_rope_index(**row)[0].expand(-1, b, -1)


def look(model, batch: dict) -> Seen:
    """Returns what the tower gives for a batch's pictures."""
    video = "pixel_values_videos" in batch
    pixels, grid = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    with watching(model) as seen:
        model.model.visual(batch[pixels], grid_thw=batch[grid])
    return seen


def answer_logits(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor, Seen]:
    """Returns logits and labels `[n]` at the answers' tokens, and what the tower gave."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "attention_mask")}
    inputs["position_ids"] = positions(model, batch)
    with watching(model) as seen:
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
    answered = batch["labels"][:, 1:] != IGNORED
    return model.lm_head(hidden[:, :-1][answered]), batch["labels"][:, 1:][answered], seen


def answers_right(logits: torch.Tensor, labels: torch.Tensor, end: int) -> torch.Tensor:
    """Returns for every answer whether all of its tokens are the likeliest, 0 or 1."""
    wrong = (logits.argmax(-1) != labels).long().cumsum(0)
    at_end = wrong[labels == end]
    return (torch.diff(at_end, prepend=at_end.new_zeros(1)) == 0).float()


def pad_tasks(turns: Turns, drawn: list[tuple[str, str, str]]) -> list[str | None]:
    """Returns the task of every turn of a conversation, `None` for those before its questions."""
    return [None] * (len(turns) - len(drawn)) + [task for _, _, task in drawn]


@torch.no_grad()
def measure(model, processor, split: str, samples: int, tasks: list[str], batch_size: int = 32) -> dict[str, float]:
    """Returns the accuracy of each task: all tokens of the answer are the likeliest after those before."""
    accuracy = {}
    for task in tasks:
        right, by_size = 0, defaultdict(list)
        for scene, turns in evaluation_scenes(task, samples, split, seed=1):
            size = (len(scene.images), None if scene.video is None else scene.video.shape)
            by_size[size].append((scene, turns))
        for alike in by_size.values():
            for start in range(0, len(alike), batch_size):
                batch = encode(processor, alike[start : start + batch_size])
                labels = batch["labels"]
                predicted = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1].argmax(-1)
                right += _last_answers_right(predicted, labels[:, 1:]).sum().item()
        accuracy[task] = round(right / samples, 4)
    return accuracy


def _last_answers_right(predicted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether the last run of labels of every row is predicted, `[b]`."""
    index = torch.arange(labels.shape[1]).expand_as(labels)
    ignored = labels == IGNORED
    last = torch.where(ignored, -1, index).max(1, keepdim=True).values
    before = torch.where(ignored & (index < last), index, -1).max(1, keepdim=True).values
    return ((predicted == labels) | (index <= before) | ignored).all(1)


def learning_rate(args: argparse.Namespace, step: int, done: float) -> float:
    """Returns a rate that rises, stays, and falls to 2% at the end of the run (`done` = 1)."""
    warm = min(1.0, (step + 1) / args.warmup_steps)
    falling = max(0.0, (done - STEADY) / (1 - STEADY))
    return args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, falling))))


class Run:
    """Everything that a resumed training continues with."""

    def __init__(self, args: argparse.Namespace):
        torch.manual_seed(args.seed)
        self.process, self.processes = parallel.start()
        self.args, self.output = args, Path(args.output)
        self.processor = build_processor()
        self.model = build_model(self.processor)
        vision = self.model.config.vision_config
        self.heads = VisionHeads(vision.hidden_size, vision.out_hidden_size)
        # says of a token of the decoder how often its icon was shown before; thrown away, too
        self.repeats = nn.Linear(vision.out_hidden_size, MOST + 1)
        groups = optimizer_groups(self.model, self.heads)
        groups.append({"params": list(self.repeats.parameters()), "tower": False, "heads": 0, "weight_decay": 0.0})
        self.optimizer = Muon(groups, lr=args.lr, betas=(0.9, 0.98))
        self.curriculum = Curriculum()
        self.step, self.seconds, self.best = 0, 0.0, -1.0
        self.state_folder = self.output / "state"
        if (self.state_folder / "state.pt").is_file():
            self._load()
        elif args.start:
            self._start_from(args.start)

    def _parts(self) -> dict:
        return {name: getattr(self, name) for name in ("model", "heads", "repeats", "curriculum", "optimizer")}

    def _load(self) -> None:
        state = torch.load(self.state_folder / "state.pt", weights_only=True)
        if state["seed"] != self.args.seed:
            raise ValueError(f"--seed {self.args.seed}: {self.output} was begun with --seed {state['seed']}")
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step, self.seconds, self.best = (state[name] for name in ("step", "seconds", "best"))

    def _start_from(self, folder: str) -> None:
        """Takes the weights of a model that has gone through the first two phases, and scenes of full size."""
        trained = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype="float32")
        self.model.load_state_dict(trained.state_dict())
        self.curriculum.levels = {kind: of.levels for kind, of in KINDS.items()}
        self.step = self.args.vision_steps + self.args.decoder_steps

    def save(self, accuracy: dict[str, float], last: bool = False) -> None:
        """Writes the state, and the model if it is the best so far or a run's last; all processes have the same."""
        numbers = {"step": self.step, "seconds": self.seconds, "seed": self.args.seed}
        mean = sum(accuracy.values()) / max(1, len(accuracy))
        best, self.best = self.best, max(self.best, mean)
        if self.process > 0:
            return
        with whole_folder(self.state_folder) as folder:
            parts = {name: part.state_dict() for name, part in self._parts().items()}
            torch.save({**parts, **numbers, "best": self.best}, folder / "state.pt")
        if last or mean > best:
            with whole_folder(self.output / "model") as folder:
                save_checkpoint(self.model, self.processor, folder)

    def set_rate(self, done: float) -> float:
        """Sets the rate, which also falls at the end of the tower's own phase; `done` is the share of this run."""
        if self.looking:
            done = max(done, self.step / self.args.vision_steps)
        rate = learning_rate(self.args, self.step, done)
        for group in self.optimizer.param_groups:
            slow = group["tower"] and not self.looking
            group["lr"] = rate * (MUON_SHARE if group["heads"] else 1.0) * (TOWER_SHARE if slow else 1.0)
        return rate

    @property
    def looking(self) -> bool:
        """Returns whether the tower learns alone."""
        return self.step < self.args.vision_steps

    @property
    def together(self) -> bool:
        """Returns whether tower and decoder learn together."""
        return self.step >= self.args.vision_steps + self.args.decoder_steps

    def learning(self) -> list[list[nn.Parameter]]:
        """Returns the parameters that learn in this phase: of the model, of the tower's heads, of the decoder's."""
        parts = {True: self.looking or self.together, False: not self.looking}
        of_model = [p for name, p in self.model.named_parameters() if parts[".visual." in name]]
        of_heads = list(self.heads.parameters()) if parts[True] else []
        return [of_model, of_heads, [] if self.looking else list(self.repeats.parameters())]

    def update(self) -> None:
        """Takes the optimizer's step with the gradients of all processes."""
        for parameters in filter(None, self.learning()):
            parallel.mean_gradients(parameters)
            torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def vision_step(self, rng: np.random.Generator, kinds: list[str]) -> dict[str, float]:
        """Trains the tower alone on what its tokens show."""
        right: dict[str, float] = {}
        for kind in kinds:
            fixed = {"grid": (2, 2), "filled": 4} if kind == "words" else {}  # a single word is little to learn from
            level, chosen = KINDS[kind].levels, sources("train")
            scenes = draw_scenes(rng, kind, level, chosen, self.args.seed, self.step, **fixed)
            seen = look(self.model, encode_vision(self.processor, scenes))
            loss, found = self.heads.loss(seen, flat_targets(scenes))
            (loss / len(kinds)).backward()
            right |= {f"{kind} {name}": value for name, value in found.items()}
        self.update()
        return right

    def answer_step(self, rng: np.random.Generator, kinds: list[str]) -> dict[str, float]:
        """Trains the decoder and, once its time has come, the tower to answer."""
        notes = {}
        self.model.model.visual.requires_grad_(self.together)
        for kind in kinds:
            level, chosen = self.curriculum.draw(rng, kind)
            scenes = draw_scenes(rng, kind, level, chosen, self.args.seed, self.step)
            asked = [draw_questions(rng, scene, shares=self.curriculum.shares) for scene in scenes]
            turns = [with_opening(scene, [one[:2] for one in drawn]) for scene, drawn in zip(scenes, asked)]
            samples: list[tuple[Scene, Turns]] = list(zip(scenes, turns))
            batch = encode(self.processor, samples)
            logits, labels, seen = answer_logits(self.model, batch)
            loss = F.cross_entropy(logits, labels)
            if kind in REPEATS and seen.decoded is not None:
                told = self.repeats(seen.decoded[batch["mm_token_type_ids"] > 0])
                loss = loss + F.cross_entropy(told, repeat_targets(scenes))
            if self.together:
                loss = loss + VISION_SHARE * self.heads.loss(seen, flat_targets(scenes))[0]
            (loss / len(kinds)).backward()
            right = answers_right(logits.detach(), labels, self.processor.tokenizer.eos_token_id).tolist()
            notes[kind] = sum(right) / len(right)
            # before its questions a conversation has turns of no task
            tasks = [task for given, drawn in zip(turns, asked) for task in pad_tasks(given, drawn)]
            for task in KINDS[kind].tasks:
                of_task = [one for one, own in zip(right, tasks, strict=True) if own == task]
                if of_task:
                    notes[f"{kind} {task}"] = sum(of_task) / len(of_task)
        self.update()
        return notes

    def steps(self) -> Iterator[tuple[list[dict[str, float]], bool]]:
        """Yields all processes' notes of every step, and whether the tower learned alone, until time is up."""
        started = time.time()
        while True:
            spent = time.time() - started
            done = parallel.of_first(max(spent / self.args.max_seconds, self.step / self.args.steps))
            if done >= 1:
                return
            rng = np.random.default_rng((self.args.seed, self.step, self.process))
            self.rate, looking = self.set_rate(done), self.looking
            train_mode(self.model)
            if looking:
                kinds = [str(kind) for kind in rng.choice(self.args.vision_kinds, KINDS_PER_STEP, replace=False)]
                notes = parallel.of_all(self.vision_step(rng, kinds))
            else:
                notes = parallel.of_all(self.answer_step(rng, self.curriculum.choose(rng, KINDS_PER_STEP)))
                for name, right in (pair for each in notes for pair in each.items()):
                    kind, _, task = name.partition(" ")
                    if task:
                        self.curriculum.update_task(task, right)
                    else:
                        self.curriculum.update(kind, right)
            self.step += 1
            self.seconds += time.time() - started - spent
            yield notes, looking


class Log:
    """A line for every so many steps and for every evaluation, in a file and on the screen; one process writes it."""

    def __init__(self, run: Run):
        args, main = run.args, run.process == 0
        self.run, self.every = run, args.log_every
        self.file = open(run.output / "training_log.jsonl" if main else os.devnull, "a")
        total = None if math.isinf(args.steps) else int(args.steps)
        name = f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.2f}M parameters"
        self.progress = tqdm(total=total, initial=run.step, desc=name, mininterval=10, disable=not main)
        self.window: dict[str, list[float]] = {}

    def step(self, notes: list[dict[str, float]], looking: bool) -> None:
        """Notes a step, and writes a line if it is time."""
        self.progress.update()
        for name, value in (pair for each in notes for pair in each.items()):
            self.window.setdefault(name, []).append(value)
        if self.run.step % self.every == 0:
            right = {name: round(float(np.mean(values)), 3) for name, values in sorted(self.window.items())}
            what = {"looking" if looking else "right": right, "levels": dict(self.run.curriculum.levels)}
            self.write({"lr": round(self.run.rate, 6), **what})
            self.window = {}

    def write(self, record: dict) -> None:
        record = {"step": self.run.step, "seconds": round(self.run.seconds), **record}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if not self.progress.disable:
            self.progress.write(json.dumps(record))

    def close(self) -> None:
        self.file.close()
        self.progress.close()


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    run = Run(args)
    run.output.mkdir(parents=True, exist_ok=True)
    sources("train")
    log, saved = Log(run), time.time()

    def evaluate(last: bool = False) -> None:
        train_mode(run.model, False)
        accuracy: dict[str, float] = {}
        if run.step > args.vision_steps:
            own = measure(
                run.model, run.processor, "seen", args.eval_samples, list(TASKS)[run.process :: run.processes]
            )
            found = {task: value for part in parallel.of_all(own) for task, value in part.items()}
            accuracy = {task: found[task] for task in TASKS}
        run.save(accuracy, last)
        log.write({"seen": accuracy})

    for notes, looking in run.steps():
        log.step(notes, looking)
        if parallel.of_first(time.time() - saved) > args.save_seconds:
            evaluate()
            saved = time.time()
    evaluate(last=True)
    log.close()


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder; the model goes to model/, the rest to state/")
    parser.add_argument("--start", metavar="FOLDER", help="a teacher to train on, such as the one that is shipped")
    parser.add_argument("--steps", type=float, default=math.inf, help="of the whole training, earlier runs included")
    parser.add_argument("--max_seconds", type=float, default=3600, help="of this run, whose rate falls at its end")
    parser.add_argument("--vision_steps", type=int, default=3000, help="of the vision tower alone, to begin with")
    parser.add_argument("--decoder_steps", type=int, default=3000, help="after them, of the decoder alone")
    parser.add_argument(
        "--vision_kinds",
        nargs="+",
        choices=list(KINDS),
        default=["words"] * 4 + ["page"] * 4 + ["table", "icons", "icons", "bars", "several", "clip"],
        help="of scenes that the tower looks at, several times for more",
    )
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--warmup_steps", type=int, default=50)
    parser.add_argument("--log_every", type=int, default=50)
    parser.add_argument(
        "--save_seconds", type=float, default=300, help="between evaluations, after each of which it can go on"
    )
    parser.add_argument("--eval_samples", type=int, default=32, help="questions per task in each evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    try:
        check_positive(args, "steps", "max_seconds", "eval_samples", "log_every", "threads", "warmup_steps")
        process, _ = parallel.start()
        with locked(Path(args.output)) if process == 0 else nullcontext():
            train(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
