"""Train the testbed's teacher, a plain `Qwen2_5_VLForConditionalGeneration` of 1.3M parameters.

python -m linmu_hf.testbed.train_teacher --output DIR --steps 2500 --log DIR/training_log.jsonl
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
from transformers import AttentionInterface, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from .data import SCENE_SHARES, SCENES, TASKS, compose, converse, evaluation_scenes, scene_grid
from .encoding import IGNORED, encode
from .processor import build_processor


def teacher_config(tokenizer) -> Qwen2_5_VLConfig:
    """The teacher's shape: every cell is one vision token, every moment two temporal positions."""
    ids = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.05,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 128,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.05,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    return config


def equal_windows_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, max_length_q, **kwargs):
    """The vision tower's attention over equal windows in one call; Transformers' own SDPA path loops over them."""
    _, h, s, d = query.shape
    n = len(cu_seq_lens_q) - 1
    if n * int(max_length_q) != s:
        raise ValueError(f"{n} windows of {int(max_length_q)} patches do not fill {s}: batch scenes of one size")
    query, key, value = (x.reshape(h, n, s // n, d).transpose(0, 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, scale=scaling)  # [n, h, s / n, d]
    return out.transpose(1, 2).reshape(1, s, h, d), None


# "flash" in the name selects the variable-length call, which hands over all windows at once
AttentionInterface.register("flash_equal_windows", equal_windows_attention)


class Curriculum:
    """Scenes start tiny and grow by a row, column or moment whenever the model answers their questions.

    On a full mosaic a lookup is one cell among many and the model stays at chance for long; on two cells it does not.
    """

    # mean loss per answer token to grow at; half of these tokens are the certain <|im_end|>
    THRESHOLDS = {"mosaic": 0.5, "large": 0.3, "clip": 0.35}
    PATIENCE = 150

    def __init__(self, levels: tuple[int, int, int] = (1, 1, 1)):
        self.levels = dict(zip(SCENES, levels))
        self.losses = dict.fromkeys(SCENES, 1.0)
        self.steps = dict.fromkeys(SCENES, 0)

    def update(self, kind: str, loss: float) -> None:
        self.steps[kind] += 1
        self.losses[kind] += 0.2 * (loss - self.losses[kind])
        if self.losses[kind] < self.THRESHOLDS[kind] or self.steps[kind] == self.PATIENCE:
            self.levels[kind] += 1
            self.losses[kind] = 1.0
            self.steps[kind] = 0

    @staticmethod
    def grid(rng: np.random.Generator, kind: str, level: int) -> tuple[int, int, int]:
        """Draw the (moments, rows, columns) of a scene at a level."""
        full = scene_grid(rng, kind, "train")
        if kind == "clip":
            return min(full[0], level + 1), min(3, level), min(3, level)
        if level >= (4 if kind == "mosaic" else 8):
            return full
        return 1, int(rng.integers(level, level + 2)), int(rng.integers(level, level + 2))


def batches(
    processor, seed: int, batch_size: int, curriculum: Curriculum, shares: tuple[float, ...] = SCENE_SHARES
) -> Iterator[list[dict]]:
    """Endless steps of three micro-batches, one per kind of scene and each of one grid."""

    def draw(step: int, levels: dict[str, int]) -> list[dict]:
        rng = np.random.default_rng((seed, step))
        micro_batches = []
        for kind, share in zip(SCENES, shares):
            grid = curriculum.grid(rng, kind, levels[kind])
            scenes = [compose(rng, kind, "train", grid) for _ in range(round(share * batch_size))]
            micro_batches.append(encode(processor, [(scene, converse(rng, scene)) for scene in scenes]))
        return micro_batches

    with ThreadPoolExecutor(1) as worker:
        step = 0
        upcoming = worker.submit(draw, step, dict(curriculum.levels))
        while True:
            current, step = upcoming.result(), step + 1
            upcoming = worker.submit(draw, step, dict(curriculum.levels))
            yield current


def answer_loss(model: Qwen2_5_VLForConditionalGeneration, batch: dict) -> torch.Tensor:
    """Sum of the cross entropy over the answers' tokens; logits are made at those tokens alone."""
    labels = batch["labels"]
    # right padded: the causal mask is enough
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "attention_mask")}
    # one grid in the whole batch: all rows have the positions of the longest
    longest = int(batch["attention_mask"].sum(1).argmax())
    one_row = {name: value[longest, None] for name, value in inputs.items() if not name.startswith("pixel")}
    positions = model.model.get_rope_index(**one_row)[0].expand(-1, len(labels), -1)
    hidden = model.model(**inputs, position_ids=positions, use_cache=False).last_hidden_state
    answered = labels[:, 1:] != IGNORED
    logits = model.lm_head(hidden[:, :-1][answered])
    return F.cross_entropy(logits, labels[:, 1:][answered], reduction="sum")


def optimizers(model: torch.nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, biases and norms."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and "embed_tokens" not in name
        (matrices if inside else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=muon_lr, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@torch.no_grad()
def answer_questions(model, processor, samples: list, batch_size: int = 64) -> np.ndarray:
    """Whether each single question is answered right, `[n]` of bool: the answer's tokens are all the likeliest."""
    model.eval()
    right = []
    for start in range(0, len(samples), batch_size):
        batch = encode(processor, [(scene, [turn]) for scene, turn in samples[start : start + batch_size]])
        labels = batch.pop("labels")[:, 1:]
        predicted = model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
        right.append(((predicted == labels) | (labels == IGNORED)).all(1).numpy())
    return np.concatenate(right)


def save(model, processor, output: Path) -> None:
    model.save_pretrained(output)
    processor.save_pretrained(output)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    log = open(args.log or output / "training_log.jsonl", "w")
    processor = build_processor()
    model = Qwen2_5_VLForConditionalGeneration(teacher_config(processor.tokenizer))
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    parameters = sum(p.numel() for p in model.parameters())
    if args.init:
        model.load_state_dict(Qwen2_5_VLForConditionalGeneration.from_pretrained(args.init).state_dict())
    opts = optimizers(model, args.lr, args.lr)
    held_out = {task: list(evaluation_scenes(task, args.eval_samples, seed=1)) for task in TASKS}
    curriculum = Curriculum(args.levels)
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
        model.train()
        model.model.visual.config._attn_implementation = "flash_equal_windows"
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
                model.model.visual.config._attn_implementation = "sdpa"
                accuracy = {task: answer_questions(model, processor, held_out[task]).mean() for task in TASKS}
                record["accuracy"] = accuracy
                mean = sum(accuracy.values())
                if mean > best:
                    best = mean
                    save(model, processor, output)
            log.write(json.dumps(record) + "\n")
            log.flush()
            progress.write(json.dumps(record))
    progress.close()
    model.model.visual.config._attn_implementation = "sdpa"
    save(model, processor, output / "last")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder of the best checkpoint; the last one goes to last/")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=64, help="scenes per step, eight questions each")
    parser.add_argument("--max-seconds", type=float, default=math.inf, help="end the schedule by then")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--shares", type=float, nargs=3, default=SCENE_SHARES, help=f"of {', '.join(SCENES)}")
    parser.add_argument("--levels", type=int, nargs=3, default=(1, 1, 1), help=f"of {', '.join(SCENES)} to begin with")
    parser.add_argument("--init", help="start from this checkpoint")
    parser.add_argument("--log", help="JSON lines file, by default OUTPUT/training_log.jsonl")
    parser.add_argument("--log-every", type=int, default=25)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--eval-samples", type=int, default=64, help="questions per task in each evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
