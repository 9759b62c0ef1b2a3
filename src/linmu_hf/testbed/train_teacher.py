"""Train a teacher of the testbed: a plain `Qwen2_5_VLForConditionalGeneration`, or a small NVILA.

python -m linmu_hf.testbed.train_teacher --output DIR --steps 2500
python -m linmu_hf.testbed.train_teacher --architecture nvila --init DIR_OF_TRAIN_VISION --output DIR
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration

from ..commands.common import Parser
from . import nvila, qwen2_5_vl
from .curriculum import CanvasCurriculum, Curriculum
from .data import SCENE_SHARES, SCENES, TASKS, compose, converse, evaluation_scenes
from .encoding import IGNORED, encode


# the same names recur in both modules
ARCHITECTURES = {"qwen2_5_vl": qwen2_5_vl, "nvila": nvila}
CURRICULA = {"qwen2_5_vl": Curriculum, "nvila": CanvasCurriculum}


def batches(
    processor, seed: int, batch_size: int, curriculum: Curriculum, shares: tuple[float, ...] = SCENE_SHARES
) -> Iterator[list[dict]]:
    """Yields endless steps of three micro-batches, one per kind of scene and each of one grid."""

    def draw(step: int, levels: dict[str, int]) -> list[dict]:
        rng = np.random.default_rng((seed, step))
        micro_batches = []
        for kind, share in zip(SCENES, shares):
            drawn = curriculum.draw(rng, kind, levels[kind])
            scenes = [compose(rng, kind, "train", **drawn) for _ in range(round(share * batch_size))]
            micro_batches.append(encode(processor, [(scene, converse(rng, scene)) for scene in scenes]))
        return micro_batches

    with ThreadPoolExecutor(1) as worker:
        step = 0
        upcoming = worker.submit(draw, step, dict(curriculum.levels))
        while True:
            current, step = upcoming.result(), step + 1
            upcoming = worker.submit(draw, step, dict(curriculum.levels))
            yield current


def answer_loss(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    """Returns the sum of the cross entropy over the answers' tokens; logits are made at those tokens alone."""
    labels = batch["labels"]
    # right padded: the causal mask is enough
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "attention_mask")}
    if isinstance(model, Qwen2_5_VLForConditionalGeneration):
        inputs["position_ids"] = qwen2_5_vl.shared_positions(model, batch)
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    answered = labels[:, 1:] != IGNORED
    logits = model.lm_head(hidden[:, :-1][answered])
    return F.cross_entropy(logits, labels[:, 1:][answered], reduction="sum")


def optimizers(model: torch.nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Returns Muon for the matrices inside the blocks, AdamW for embeddings, biases and norms."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and not any(part in name for part in ("embed_tokens", "position_embedding"))
        (matrices if inside else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@torch.no_grad()
def answer_questions(model, processor, samples: list, batch_size: int = 64) -> np.ndarray:
    """Returns whether each question is answered right, `[n]` of bool: the answer's tokens are all the likeliest."""
    right = []
    for start in range(0, len(samples), batch_size):
        batch = encode(processor, [(scene, [turn]) for scene, turn in samples[start : start + batch_size]])
        labels = batch.pop("labels")[:, 1:]
        predicted = model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
        right.append(((predicted == labels) | (labels == IGNORED)).all(1).numpy())
    return np.concatenate(right)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    log = open(args.log or output / "training_log.jsonl", "w")
    architecture = ARCHITECTURES[args.architecture]
    processor = architecture.build_processor()
    model = architecture.load_model(args.init) if args.init else architecture.build_model(processor)
    parameters = sum(p.numel() for p in model.parameters())
    opts = optimizers(model, args.lr, args.lr)
    held_out = {task: list(evaluation_scenes(task, args.eval_samples, seed=1)) for task in TASKS}
    curriculum = CURRICULA[args.architecture](args.levels)
    started, best, window = time.time(), -1.0, []
    title = f"teacher, {parameters / 1e6:.2f}M parameters"
    progress = tqdm(total=args.steps, desc=title, smoothing=0.05, mininterval=5)
    for step, micro_batches in enumerate(batches(processor, args.seed, args.batch_size, curriculum, args.shares)):
        # the schedule ends with the steps or with the time, whichever is sooner
        done = max(step / args.steps, (time.time() - started) / args.max_seconds)
        if done >= 1:
            break
        warm = min(1.0, (step + 1) / args.warmup_steps)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
        architecture.train_mode(model)
        total, terms = sum(int((b["labels"][:, 1:] != IGNORED).sum()) for b in micro_batches), []
        for kind, batch in zip(SCENES, micro_batches):
            loss = answer_loss(model, batch)
            (loss / total).backward()
            terms.append(loss.item() / int((batch["labels"][:, 1:] != IGNORED).sum()))
            curriculum.update(kind, terms[-1])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = args.lr * warm * decay
            opt.step()
            opt.zero_grad(set_to_none=True)
        window.append(terms)
        progress.update()
        if (step + 1) % args.log_every == 0:
            means = np.mean(window, axis=0)
            window = []
            record = {"step": step + 1, "seconds": round(time.time() - started, 1), "lr": args.lr * warm * decay}
            record |= {f"loss_{k}": round(float(m), 4) for k, m in zip(SCENES, means)}
            record |= {"levels": list(curriculum.levels.values())}
            if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
                architecture.train_mode(model, False)
                accuracy = {task: answer_questions(model, processor, held_out[task]).mean() for task in TASKS}
                record["accuracy"] = accuracy
                mean = sum(accuracy.values())
                if mean > best:
                    best = mean
                    architecture.save_checkpoint(model, processor, output)
            log.write(json.dumps(record) + "\n")
            log.flush()
            progress.write(json.dumps(record))
    progress.close()
    architecture.train_mode(model, False)
    architecture.save_checkpoint(model, processor, output / "last")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", choices=list(ARCHITECTURES), default="qwen2_5_vl")
    parser.add_argument("--output", required=True, help="folder of the best checkpoint; the last one goes to last/")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch_size", type=int, default=64, help="scenes per step, eight questions each")
    parser.add_argument("--max_seconds", type=float, default=math.inf, help="end the schedule by then")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--warmup_steps", type=int, default=100)
    parser.add_argument("--shares", type=float, nargs=3, default=SCENE_SHARES, help=f"of {', '.join(SCENES)}")
    parser.add_argument("--levels", type=int, nargs=3, default=(1, 1, 1), help=f"of {', '.join(SCENES)} to begin with")
    parser.add_argument("--init", help="start from this checkpoint")
    parser.add_argument("--log", help="JSON lines file, by default OUTPUT/training_log.jsonl")
    parser.add_argument("--log_every", type=int, default=25)
    parser.add_argument("--eval_every", type=int, default=100)
    parser.add_argument("--eval_samples", type=int, default=64, help="questions per task in each evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
