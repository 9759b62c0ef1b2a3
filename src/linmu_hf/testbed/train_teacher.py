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

from .check_teacher import answer_questions
from .data import SCENE_SHARES, SCENES, TASKS, Scene, compose, converse, evaluation_scenes, scene_grid
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
    """The vision tower's attention over equally long windows in one call; Transformers' own SDPA path loops over them."""
    _, h, s, d = query.shape
    n = len(cu_seq_lens_q) - 1
    if n * int(max_length_q) != s:
        raise ValueError(f"{n} windows of at most {int(max_length_q)} patches do not fill {s}: batch scenes of one size")
    query, key, value = (x.reshape(h, n, s // n, d).transpose(0, 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, scale=scaling)  # [n, h, s / n, d]
    return out.transpose(1, 2).reshape(1, s, h, d), None


# "flash" in the name selects the variable-length call, which hands over all windows at once
AttentionInterface.register("flash_equal_windows", equal_windows_attention)


def batches(processor, seed: int, batch_size: int, warmup_steps: int) -> Iterator[list[dict]]:
    """Endless steps of three micro-batches of equal shape each; during `warmup_steps` 4x4 mosaics alone."""
    def draw(step: int) -> list[dict]:
        rng = np.random.default_rng((seed, step))
        micro_batches = []
        for kind, share in zip(SCENES, SCENE_SHARES):
            if step < warmup_steps:
                kind = "mosaic"
            n = max(1, round(share * batch_size))
            grid = scene_grid(rng, kind, "train")
            scenes = [compose(rng, kind, "train", grid) for _ in range(n)]
            micro_batches.append(encode(processor, [(scene, converse(rng, scene)) for scene in scenes]))
        return micro_batches

    with ThreadPoolExecutor(1) as worker:
        step = 0
        upcoming = worker.submit(draw, step)
        while True:
            current, step = upcoming.result(), step + 1
            upcoming = worker.submit(draw, step)
            yield current


def answer_loss(model: Qwen2_5_VLForConditionalGeneration, batch: dict) -> torch.Tensor:
    """Sum of the cross entropy over the answers' tokens; logits are made at those tokens alone."""
    labels = batch["labels"]
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "attention_mask")}  # right padded: causal is enough
    longest = int(batch["attention_mask"].sum(1).argmax())
    shared = {k: v[longest : longest + 1] for k, v in inputs.items() if k in ("input_ids", "mm_token_type_ids", "second_per_grid_ts") or "grid" in k}
    positions, _ = model.model.get_rope_index(**shared)
    hidden = model.model(**inputs, position_ids=positions.expand(-1, len(labels), -1), use_cache=False).last_hidden_state
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


def save(model, processor, output: Path) -> None:
    model.save_pretrained(output)
    processor.save_pretrained(output)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    log = open(args.log or output / "training_log.jsonl", "w")  # noqa: SIM115
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
    started, best, window = time.time(), -1.0, []
    progress = tqdm(total=args.steps, desc=f"teacher, {parameters / 1e6:.2f}M parameters", smoothing=0.05, mininterval=5)
    for step, micro_batches in enumerate(batches(processor, args.seed, args.batch_size, args.mosaic_steps)):
        # the schedule ends with the steps or with the time, whichever is sooner
        done = max(step / args.steps, (time.time() - started) / args.max_seconds)
        if done >= 1:
            break
        warm = min(1.0, (step + 1) / args.warmup_steps)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))
        model.train()
        model.model.visual.config._attn_implementation = "flash_equal_windows"
        total, terms = sum(int((b["labels"][:, 1:] != IGNORED).sum()) for b in micro_batches), []
        for batch in micro_batches:
            loss = answer_loss(model, batch)
            (loss / total).backward()
            terms.append(loss.item() / int((batch["labels"][:, 1:] != IGNORED).sum()))
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
            if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
                model.model.visual.config._attn_implementation = "sdpa"
                record["accuracy"] = {task: answer_questions(model, processor, held_out[task]).mean() for task in TASKS}
                mean = sum(record["accuracy"].values())
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
    parser.add_argument("--mosaic-steps", type=int, default=300, help="steps on 4x4 mosaics alone at the start")
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
