"""One choice inside M-MATE changed at a time, same budget, several seeds: what docs/decisions.md is made of.

    python -m linmu_hf.testbed.ablate --output runs/ablation --seeds 0 1

Every variant is converted from the testbed's teacher, aligned on the teacher's own layer inputs, then distilled end to
end for the same number of steps. Run again after it was killed, it goes on with the runs that are missing.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed
from transformers.utils import logging

from ..commands.common import Parser
from ..conversion.convert import convert
from ..conversion.teacher import load_teacher
from ..distillation import DistillCollator, DistillConfig, DistillTrainer, EncodedDataset, Stage
from ..distillation.losses import IGNORE_INDEX, next_token_targets
from ..distillation.stages import FLEX, SWIN, set_trainable
from ..modeling.configuration_linmu import PRESETS
from .data import TASKS, evaluation_rows, training_rows


TEACHER = Path(__file__).parent / "teacher"
BOTH = (FLEX, SWIN)
COLUMNS = ("aligned_error", *TASKS, "mean")

# The testbed's grids are small: windows of 4x4 tokens and two moments make Local-Swin local there.
WINDOWS = {"window_size": [2, 2, 2], "image_window_size": [1, 4, 4], "timescale_range": [4.0, 1024.0]}

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "scan_rope=False": {"scan_rope": False},
    "bc_feature_map=None": {"bc_feature_map": None},
    "timescale_init=mamba2": {"timescale_init": "mamba2"},
    "output_norm=layer_norm": {"output_norm": "layer_norm"},
    "gate=channel": {"gate": "channel"},
    "conv_kernel=1": {"conv_kernel": 1},
    "reverse_scope=sequence": {"reverse_scope": "sequence"},
    "scan_orders=thw": {"scan_orders": ["thw"]},
    "window_wrap=True": {"window_wrap": True},
    "preset=paper": PRESETS["paper"],
    "state_size=64": {"state_size": 64},
    "state_size=128": {"state_size": 128},
    "state_size=512": {"state_size": 512},
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--teacher", default=str(TEACHER))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--align_steps", type=int, default=120)
    parser.add_argument("--steps", type=int, default=0, help="end-to-end steps after the alignment")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rows", type=int, default=2000, help="training rows")
    parser.add_argument("--test_rows", type=int, default=100, help="test rows per task")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here too")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    args.output.mkdir(parents=True, exist_ok=True)

    processor = AutoProcessor.from_pretrained(args.teacher)
    teacher = load_teacher(args.teacher)
    cache = 4 * 2**30
    train = EncodedDataset(processor, list(training_rows(7, args.rows)), cache_bytes=cache)
    tests = {
        task: EncodedDataset(processor, list(evaluation_rows(task, args.test_rows)), cache_bytes=cache)
        for task in TASKS
    }
    file = args.output / "results.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = {(row["variant"], row["seed"]) for row in done}
    runs = [(name, seed) for seed in args.seeds for name in args.variants if (name, seed) not in known]
    for name, seed in tqdm(runs, desc="ablation"):
        row = {"variant": name, "seed": seed} | run(name, seed, args, teacher, train, tests)
        done.append(row)
        with file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        tqdm.write(f"{name} seed {seed}: error {row['aligned_error']:.3f}, mean accuracy {row['mean']:.3f}")
    table = summarise(done)
    (args.output / "table.md").write_text(format_table(table))
    if args.json:
        args.json.write_text(json.dumps(table, indent=2) + "\n")
    print(format_table(table))


def run(
    name: str, seed: int, args, teacher, train: EncodedDataset, tests: dict[str, EncodedDataset]
) -> dict[str, Any]:
    """Converts, aligns, distils and measures one variant."""
    start = time.perf_counter()
    options = WINDOWS | VARIANTS[name]
    with tempfile.TemporaryDirectory(dir=args.output) as scratch:
        convert(args.teacher, f"{scratch}/init", mixer_options=options)
        student = AutoModelForImageTextToText.from_pretrained(f"{scratch}/init")
        stages = [Stage("align", BOTH, args.align_steps, 2e-3, hid=1.0, hidden_input="teacher")]
        if args.steps:
            stages.append(Stage("distil", BOTH, args.steps, 5e-4, hid=0.02, tok=0.5))
        log: list[dict] = []
        for stage in stages:
            log += train_stage(stage, student, teacher, train, args.batch_size, seed, scratch)
    aligned = [row["relative_error"] for row in log if row["stage"] == "align" and "relative_error" in row][-1]
    scores = {task: accuracy(student, rows) for task, rows in tests.items()}
    return {
        "aligned_error": round(aligned, 4),
        **{task: round(score, 4) for task, score in scores.items()},
        "mean": round(sum(scores.values()) / len(scores), 4),
        "seconds": round(time.perf_counter() - start, 1),
    }


def train_stage(
    stage: Stage, student, teacher, train: EncodedDataset, batch_size: int, seed: int, folder: str
) -> list:
    config = DistillConfig(
        output_dir=folder,
        per_device_train_batch_size=batch_size,
        seed=seed,
        logging_steps=10,
        save_strategy="no",
        disable_tqdm=True,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    set_seed(seed)
    set_trainable(student, stage)
    trainer = DistillTrainer(student, teacher, config, stage, train)
    trainer.train()
    return [{"stage": stage.name, **row} for row in trainer.state.log_history]


@torch.no_grad()
def accuracy(model, rows: EncodedDataset, batch_size: int = 50) -> float:
    """Returns the share of rows that greedy decoding would get right: every answer token is the likeliest one."""
    collate = DistillCollator(rows.processor.tokenizer.pad_token_id)
    model.eval()
    right = 0
    for start in range(0, len(rows), batch_size):
        batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        targets = next_token_targets(batch.pop("labels"))
        predicted = model(**batch, use_cache=False).logits.argmax(-1)
        right += int(((predicted == targets) | (targets == IGNORE_INDEX)).all(1).sum())
    return right / len(rows)


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns for every variant the means over its seeds, and the spread of the mean accuracy."""
    table = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        of = [row for row in rows if row["variant"] == variant]
        means = {column: round(sum(row[column] for row in of) / len(of), 4) for column in COLUMNS}
        spread = max(row["mean"] for row in of) - min(row["mean"] for row in of)
        table.append({"variant": variant, "seeds": len(of), **means, "spread": round(spread, 4)})
    return table


def format_table(table: list[dict[str, Any]]) -> str:
    """Returns the table in Markdown."""
    lines = ["| " + " | ".join(table[0]) + " |", "|---" * len(table[0]) + "|"]
    for row in table:
        lines.append("| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
