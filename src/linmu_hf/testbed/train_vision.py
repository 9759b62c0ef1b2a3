"""Train the vision side of the testbed's NVILA before its decoder, as NVILA starts from a trained SigLIP.

python -m linmu_hf.testbed.train_vision --output DIR

Every vision token learns what is at its centre: the digit, the row and the column. Three linear heads read that from
it and are thrown away. The decoder starts from the testbed's Qwen2.5-VL; `train_teacher --init DIR` goes on from here.
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
from torch import nn
from tqdm import tqdm

from ..commands.common import Parser
from . import nvila
from .data import FULL_SIZES, SCENES, Scene, compose, converse
from .encoding import encode
from .train_teacher import optimizers


TEACHER = Path(__file__).parent / "teacher"
HEADS = {"digit": 11, "row": 8, "column": 8}  # digit 10: an empty cell
HEAD_WEIGHTS = {"digit": 1.0, "row": 0.3, "column": 0.3}
EMPTY_WEIGHT = 0.15  # eight of nine cells of a clip are empty
SHARES = (0.5, 0.3, 0.2)  # of SCENES: the tower finds the 4x4 mosaic hardest, whose digits span four tokens
CLIP_MOMENTS = 4


def token_targets(scene: Scene, height: int, width: int) -> dict[str, np.ndarray]:
    """Returns digit, row and column `[moments, height, width]` of the cell at the centre of every token."""
    _, rows, columns = scene.grid
    row = ((np.arange(height) + 0.5) / height * rows).astype(int)
    column = ((np.arange(width) + 0.5) / width * columns).astype(int)
    digit = scene.digits[:, row][:, :, column]
    return {
        "digit": np.where(digit < 0, 10, digit),
        "row": np.broadcast_to(row[None, :, None], digit.shape),
        "column": np.broadcast_to(column[None, None, :], digit.shape),
    }


def batches(processor, seed: int, batch_size: int, split: str = "train") -> Iterator[list[tuple[dict, dict]]]:
    """Yields endless steps of one micro-batch for each kind of scene: inputs, and the targets of all its tokens."""

    def draw(step: int) -> list[tuple[dict, dict]]:
        rng = np.random.default_rng((seed, step))
        micro_batches = []
        for kind, share in zip(SCENES, SHARES):
            grid = (CLIP_MOMENTS, *FULL_SIZES[kind][1:]) if kind == "clip" else FULL_SIZES[kind]
            scenes = [compose(rng, kind, split, grid) for _ in range(round(share * batch_size))]
            inputs = encode(processor, [(scene, converse(rng, scene, questions=1)) for scene in scenes])
            _, height, width = next(value for name, value in inputs.items() if name.endswith("grid_thw"))[0].tolist()
            targets = [token_targets(scene, height, width) for scene in scenes]
            flat = {name: np.concatenate([one[name].ravel() for one in targets]) for name in HEADS}
            micro_batches.append((inputs, {name: torch.from_numpy(value.copy()) for name, value in flat.items()}))
        return micro_batches

    with ThreadPoolExecutor(1) as worker:
        step, upcoming = 0, worker.submit(draw, 0)
        while True:
            current, step = upcoming.result(), step + 1
            upcoming = worker.submit(draw, step)
            yield current


def token_loss(model, heads: nn.ModuleDict, inputs: dict, targets: dict) -> tuple[torch.Tensor, dict[str, float]]:
    """Returns the weighted cross entropy of the three heads, and how often each is right (where there is a digit)."""
    if "pixel_values" in inputs:
        features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    else:
        features = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    tokens = torch.cat(features.pooler_output)
    filled = targets["digit"] < 10
    loss, right = tokens.new_zeros(()), {}
    for name, head in heads.items():
        logits = head(tokens)
        weight = torch.where(filled, 1.0, EMPTY_WEIGHT) if name == "digit" else torch.ones(len(tokens))
        losses = F.cross_entropy(logits, targets[name], reduction="none")
        loss = loss + HEAD_WEIGHTS[name] * (losses * weight).sum() / weight.sum()
        right[name] = (logits.argmax(-1) == targets[name])[filled].float().mean().item()
    return loss, right


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    processor = nvila.build_processor()
    model = nvila.build_model(processor)
    nvila.start_decoder_from_qwen(model, processor, Path(args.decoder))
    model.model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    width = model.config.vision_config.out_hidden_size
    heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in HEADS.items()})
    opts = optimizers(model.model.visual, args.lr, args.lr)
    opts.append(torch.optim.AdamW(heads.parameters(), lr=args.lr, weight_decay=0.0))
    log = open(output / "vision_log.jsonl", "w")
    started = time.time()
    progress = tqdm(total=args.steps, desc="vision side", smoothing=0.05, mininterval=5)
    for step, micro_batches in enumerate(batches(processor, args.seed, args.batch_size)):
        if step == args.steps:
            break
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        rate = args.lr * min(1.0, (step + 1) / args.warmup_steps) * decay
        right = {}
        for kind, (inputs, targets) in zip(SCENES, micro_batches):
            loss, right[kind] = token_loss(model, heads, inputs, targets)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.model.visual.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = rate
            opt.step()
            opt.zero_grad(set_to_none=True)
        progress.update()
        if (step + 1) % args.log_every == 0:
            record = {"step": step + 1, "seconds": round(time.time() - started, 1), "lr": rate}
            record |= {kind: {name: round(value, 3) for name, value in of.items()} for kind, of in right.items()}
            log.write(json.dumps(record) + "\n")
            log.flush()
            progress.write(json.dumps(record))
    progress.close()
    nvila.save_checkpoint(model, processor, output)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder of the checkpoint")
    parser.add_argument("--decoder", default=str(TEACHER), help="the Qwen2.5-VL that the decoder starts from")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch_size", type=int, default=48, help="scenes per step")
    parser.add_argument("--lr", type=float, default=2.5e-3, help="peak learning rate")
    parser.add_argument("--warmup_steps", type=int, default=30)
    parser.add_argument("--log_every", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
