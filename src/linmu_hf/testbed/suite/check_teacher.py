"""Measure a teacher, or any other model, on the suite; exits with 1 if a task falls below 95%.

python -m linmu_hf.testbed.suite.check_teacher --model FOLDER [--split seen] [--samples 100] [--json FILE]
"""

import argparse
import json
import sys
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

from ...commands.common import Parser, check_positive
from ...evaluation.retention import correct_answers, generate_answers, wilson_interval
from ...files import write_text
from .data import EVALUATION_SPLITS, evaluation_rows, source_split
from .tasks import TASKS, chance


REQUIRED = 0.95


def check(model, processor, split: str, samples: int, tasks: list[str], seed: int = 0) -> dict[str, dict]:
    """Returns `{task: {"accuracy", "low", "high", "chance", "samples"}}` of greedily generated answers."""
    results = {}
    for task in tasks:
        rows = list(evaluation_rows(task, samples, split, seed))
        answers = generate_answers(model, processor, rows, batch_size=25, max_new_tokens=6, description=task)
        right = int(correct_answers(rows, answers).sum())
        low, high = wilson_interval(right, samples)
        guess = chance(task, source_split(split), split == "beyond")
        results[task] = {"accuracy": right / samples, "low": low, "high": high, "chance": guess, "samples": samples}
    return results


def format_results(results: dict[str, dict]) -> str:
    """Formats a table, a row per task."""
    lines = ["| task | chance | accuracy | 95% interval | questions |", "|---|---|---|---|---|"]
    for task, r in results.items():
        interval = f"{r['low']:.1%} to {r['high']:.1%}"
        lines.append(f"| {task} | {r['chance']:.1%} | {r['accuracy']:.1%} | {interval} | {r['samples']} |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a checkpoint that Transformers loads")
    parser.add_argument("--split", choices=EVALUATION_SPLITS, default="seen")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--samples", type=int, default=100, help="questions per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args(argv)
    try:
        check_positive(args, "samples")
    except ValueError as error:
        parser.error(str(error))
    if not (Path(args.model) / "config.json").is_file():
        parser.error(f"--model {args.model} holds no config.json: name a model's folder")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(args.model)
    results = check(model, processor, args.split, args.samples, args.tasks, args.seed)
    print(format_results(results))
    if args.json:
        write_text(Path(args.json), json.dumps({"split": args.split, "tasks": results}, indent=2) + "\n")
    failed = [task for task, r in results.items() if r["accuracy"] < REQUIRED]
    if failed:
        sys.exit(f"below {REQUIRED:.0%}: {', '.join(failed)}")


if __name__ == "__main__":
    main()
