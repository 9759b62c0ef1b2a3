"""`linmu-eval`: how much of a teacher its students keep, per task."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from ..data import bad_rows, load_rows
from ..evaluation.loading import check_device, check_model, library_versions, load_model, load_processor
from ..evaluation.retention import compare, correct_answers, format_table, generate_answers, tasks_of
from ..files import check_report
from .common import DTYPES, Parser, check_positive, run_command, write_report


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="linmu-eval", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--model", action="append", required=True, help="student, folder or Hub id; may be repeated")
    parser.add_argument("--teacher", help="teacher, folder or Hub id; without it accuracies alone")
    parser.add_argument("--dataset", required=True, help="folder written by save_to_disk, or a Hub id")
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, help="at most this many rows of every task")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--device", help="by default a GPU if there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    return parser.parse_args(argv)


def name_models(paths: list[str]) -> dict[str, str]:
    """Short names for the table, `{name: path}`: the last part of each path, or the whole where two are alike."""
    last = [path.rstrip("/").split("/")[-1] for path in paths]
    return {short if last.count(short) == 1 else path: path for short, path in zip(last, paths)}


def first_of_every_task(dataset, limit: int, without: Collection[int] = ()) -> list[int]:
    """Returns the numbers of the first `limit` rows of every task, in their order, and none that is in `without`."""
    seen: Counter = Counter()
    picked = []
    for i, task in enumerate(dataset["task"] if "task" in dataset.column_names else ["all"] * len(dataset)):
        if i not in without and seen[task] < limit:
            seen[task] += 1
            picked.append(i)
    return picked


def evaluate(arguments: argparse.Namespace) -> dict:
    check_positive(arguments, "limit", "batch_size", "max_new_tokens")
    check_device(arguments.device)
    if arguments.json:
        arguments.json.absolute().parent.mkdir(parents=True, exist_ok=True)
        check_report(arguments.json)
    models = name_models(list(dict.fromkeys(arguments.model)))
    if arguments.teacher:
        models = {"teacher": arguments.teacher} | models
    for path in models.values():
        check_model(path)
    dataset = load_rows(arguments.dataset, arguments.split)
    unusable = {i: str(error) for path in models.values() for i, error in bad_rows(dataset, load_processor(path))}
    numbers = first_of_every_task(dataset, arguments.limit or len(dataset), unusable)
    if not numbers:
        raise ValueError(unusable[0])
    rows = [dataset[i] for i in numbers]

    correct, seconds = {}, {}
    for name, path in models.items():
        model, processor = load_model(path, device=arguments.device, dtype=arguments.dtype)
        start = time.perf_counter()
        answers = generate_answers(
            model,
            processor,
            rows,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            description=name,
            numbers=numbers,
            unusable=unusable,
        )
        seconds[name] = round(time.perf_counter() - start, 2)
        correct[name] = correct_answers(rows, answers)
        del model
    kept = [i for i, number in enumerate(numbers) if number not in unusable]  # the same rows for every model
    if not kept:
        raise ValueError(unusable[numbers[0]])
    rows, correct = [rows[i] for i in kept], {name: right[kept] for name, right in correct.items()}
    reports = compare(correct, tasks_of(rows), "teacher" if arguments.teacher else None)
    for name, report in reports.items():
        report |= {"path": models[name], "seconds": seconds[name]}
    return {
        "dataset": arguments.dataset,
        "split": arguments.split,
        "rows": len(rows),
        "unusable_rows": unusable,
        "models": reports,
        "versions": library_versions(),
    }


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)

    def run() -> None:
        results = evaluate(arguments)
        write_report(arguments.json, results)  # first: hours of work must not be lost to a table
        print(format_table(results["models"]))
        for error in results["unusable_rows"].values():
            print(f"linmu-eval: left out: {error}", file=sys.stderr)

    return run_command("linmu-eval", run)


if __name__ == "__main__":
    sys.exit(main())
