"""`linmu-eval`: how much of a teacher its students keep, per task."""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..data import bad_rows, choose_split, is_single_file, load_rows
from ..evaluation.answers import AnswerStore, answer_and_keep, describe_model
from ..evaluation.lmms.report import compare_benchmarks, format_benchmarks
from ..evaluation.loading import check_device, check_model, library_versions, load_model, load_processor
from ..evaluation.retention import (
    answer_limit,
    compare,
    correct_answers,
    format_table,
    generate_answers,
    reference_lengths,
    tasks_of,
)
from ..files import check_report
from .common import DTYPES, Parser, check_positive, run_command, write_report


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="linmu-eval", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--model", action="append", required=True, help="student, folder or Hub id; may be repeated")
    parser.add_argument("--teacher", help="teacher, folder or Hub id; without it accuracies alone")
    parser.add_argument("--dataset", help="folder, JSON Lines or Parquet file, or a Hub id")
    parser.add_argument("--split", help="of the dataset, by default test; a single file is read whole")
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK",
        help="tasks of lmms-eval in place of a dataset, or paper, dense; rows is the dataset, read by lmms-eval",
    )  # fmt: skip
    parser.add_argument("--include_path", help="folder with further tasks for lmms-eval")
    parser.add_argument(
        "--output", type=Path,
        help="folder for answers, or for the results of --tasks (runs/lmms-eval): a killed run goes on from there",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, help="at most this many rows of every task")
    parser.add_argument("--batch_size", type=int, help="32 by default, 1 for tasks of lmms-eval")
    parser.add_argument("--max_new_tokens", type=int, help="by default what the longest reference needs, at least 32")
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--device", help="by default a GPU if there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    return parser.parse_args(argv)


def name_models(paths: list[str], taken: Collection[str] = ()) -> dict[str, str]:
    """Names models for the table, `{name: path}`: by the last part of the path, or the whole where that is taken."""
    last = [path.rstrip("/").split("/")[-1] for path in paths]
    names: dict[str, str] = {}
    for short, path in zip(last, paths):
        name = short if last.count(short) == 1 and short not in taken else path
        names[f"./{name}" if name in taken else name] = path
    return names


def name_tasks(dataset) -> list[str]:
    """Returns the task of every row of a dataset by name, that of a class label too."""
    values = dataset["task"] if "task" in dataset.column_names else [None] * len(dataset)
    label: Any = (dataset.features or {}).get("task")
    if hasattr(label, "int2str"):
        values = [None if value in (None, -1) else label.int2str(value) for value in values]
    return tasks_of([{"task": value} for value in values])


def first_of_every_task(tasks: Sequence[str], limit: int, without: Collection[int] = ()) -> list[int]:
    """Returns the numbers of the first `limit` rows of every task, in their order, and none that is in `without`."""
    seen: Counter = Counter()
    picked = []
    for i, task in enumerate(tasks):
        if i not in without and seen[task] < limit:
            seen[task] += 1
            picked.append(i)
    return picked


def check_arguments(arguments: argparse.Namespace) -> dict[str, str]:
    """Returns the models by name, or raises what is wrong with the arguments before any weights are read."""
    check_positive(arguments, "limit", "batch_size", "max_new_tokens")
    check_device(arguments.device)
    if (arguments.dataset is None) == (arguments.tasks is None) and arguments.tasks != ["rows"]:
        raise ValueError("give --dataset, --tasks, or --tasks rows --dataset DATA to read it by lmms-eval")
    if arguments.tasks == ["rows"] and arguments.dataset is None:
        raise ValueError("--tasks rows needs --dataset")
    if arguments.split and arguments.dataset is None:
        raise ValueError(f"--split {arguments.split} has no effect without --dataset: leave it out")
    for name in ("max_new_tokens",) if arguments.tasks else ("include_path",):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name} {getattr(arguments, name)} has no effect here: leave it out")
    if arguments.json:
        arguments.json.absolute().parent.mkdir(parents=True, exist_ok=True)
        check_report(arguments.json)
    given = {"teacher": arguments.teacher.rstrip("/")} if arguments.teacher else {}
    paths = dict.fromkeys(path.rstrip("/") for path in arguments.model)
    if not paths.keys() - given.values():
        raise ValueError(f"--model {arguments.model[0]} is the teacher itself: name a student, or leave --teacher out")
    models = given | name_models([path for path in paths if path not in given.values()], given)
    for path in models.values():
        check_model(path)
    return models


def find_processes(device: str | None):
    """Returns which process this is under `torchrun` and its device, as `accelerate.PartialState` says it."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return SimpleNamespace(
            process_index=0, num_processes=1, is_main_process=True, device=check_device(device),
            wait_for_everyone=lambda: None,
        )  # fmt: skip
    from accelerate import PartialState

    return PartialState(cpu=check_device(device).type == "cpu")


def run_benchmarks(arguments: argparse.Namespace) -> dict | None:
    """Returns the report of tasks of lmms-eval, `None` in all processes but the first."""
    models = check_arguments(arguments)
    output = arguments.output or Path("runs/lmms-eval")
    include_path = arguments.include_path
    try:
        from ..evaluation.lmms.rows import write_tasks
        from ..evaluation.lmms.run import benchmarks_of_rows, find_benchmarks, run_model
    except ModuleNotFoundError as error:
        raise ImportError(f'--tasks needs {error.name}: pip install "linmu-hf[eval]"') from error
    if arguments.tasks == ["rows"]:
        include_path = str(output / "rows")
        processes = find_processes(arguments.device)
        if processes.is_main_process:
            processors = [load_processor(path) for path in models.values()]
            split = choose_split(arguments.dataset, arguments.split, "test")
            dataset = load_rows(arguments.dataset, split)
            bad = {i: str(error) for one in processors for i, error in bad_rows(dataset, one, decode=True)}
            for reason in bad.values():
                print(f"linmu-eval: left out: {reason}", file=sys.stderr)
            if len(bad) == len(dataset):
                raise ValueError("none of the rows can be used")
            write_tasks(arguments.dataset, split, output / "rows", processors[0], arguments.limit, bad)
        processes.wait_for_everyone()
        benchmarks, left_out = benchmarks_of_rows(output / "rows"), list[str]()
    else:
        benchmarks, left_out = find_benchmarks(arguments.tasks)
    for title in left_out:
        print(
            f"linmu-eval: {title} is left out: an OpenAI model judges its answers, set OPENAI_API_KEY",
            file=sys.stderr,
        )
    settings = {name: getattr(arguments, name) for name in ("limit", "dtype", "device")}
    settings["batch_size"] = arguments.batch_size or 1
    results = {
        name: run_model(path, benchmarks, output / Path(name.replace("/", "--")), settings, include_path)
        for name, path in models.items()
    }
    if not all(len(found) == len(benchmarks) for found in results.values()):
        return None
    return compare_benchmarks(results, benchmarks, "teacher" if arguments.teacher else None)


def evaluate(arguments: argparse.Namespace) -> dict | None:
    """Returns the report of the rows of a dataset, `None` in all processes but the first."""
    models = check_arguments(arguments)
    processes = find_processes(arguments.device)
    if processes.num_processes > 1 and arguments.output is None:
        raise ValueError(f"{processes.num_processes} processes need --output, where their answers meet")
    split = choose_split(arguments.dataset, arguments.split, "test")
    dataset = load_rows(arguments.dataset, split)
    unusable = {i: str(error) for path in models.values() for i, error in bad_rows(dataset, load_processor(path))}
    tasks = name_tasks(dataset)
    numbers = first_of_every_task(tasks, arguments.limit or len(dataset), unusable)
    if not numbers:
        raise ValueError(next(iter(unusable.values())))
    rows = [dataset[i] for i in numbers]

    correct, facts = {}, {}
    for name, path in models.items():
        model, processor = load_model(path, device=str(processes.device), dtype=arguments.dtype)
        start = time.perf_counter()
        limit = arguments.max_new_tokens or answer_limit(processor, rows)
        options = {"batch_size": arguments.batch_size or 32, "max_new_tokens": limit, "description": name}
        if arguments.output:
            made_of = {"model": path, "files": describe_model(path), "dtype": arguments.dtype, "max_new_tokens": limit}
            store = AnswerStore(arguments.output / name.replace("/", "--"), made_of, processes)
            answers, cut = answer_and_keep(model, processor, rows, numbers, unusable, store, processes, **options)
        else:
            cut = []
            answers = generate_answers(model, processor, rows, numbers=numbers, unusable=unusable, cut=cut, **options)
        facts[name] = {
            "path": path,
            "seconds": round(time.perf_counter() - start, 2),
            "max_new_tokens": limit,
            "answers_cut": len(cut),
            "references_too_long": sum(length > limit for length in reference_lengths(processor, rows)),
        }
        correct[name] = correct_answers(rows, answers)
        del model
    kept = [i for i, number in enumerate(numbers) if number not in unusable]  # the same rows for every model
    if not kept:
        raise ValueError(unusable[numbers[0]])
    if not processes.is_main_process:
        return None
    rows, correct = [rows[i] for i in kept], {name: right[kept] for name, right in correct.items()}
    reports = compare(correct, [tasks[numbers[i]] for i in kept], "teacher" if arguments.teacher else None)
    for name, report in reports.items():
        report |= facts[name]
    return {
        "dataset": arguments.dataset,
        "split": None if is_single_file(arguments.dataset) else split,
        "rows": len(rows),
        "unusable_rows": unusable,
        "models": reports,
        "versions": library_versions(),
    }


def notes(results: dict) -> Iterator[str]:
    """Yields what a reader of the table must know besides."""
    for error in results["unusable_rows"].values():
        yield f"left out: {error}"
    for name, report in results["models"].items():
        limit = f"--max_new_tokens {report['max_new_tokens']}"
        if count := report["references_too_long"]:
            yield f"{name}: {count} references do not fit {limit} and can never be right: give more"
        if count := report["answers_cut"]:
            yield f"{name}: {count} of {results['rows']} answers were cut at {limit}"


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)

    def run() -> None:
        if arguments.tasks:
            report = run_benchmarks(arguments)
            if report is not None:
                write_report(arguments.json, report)
                print(format_benchmarks(report))
            return
        results = evaluate(arguments)
        if results is None:
            return
        write_report(arguments.json, results)  # first: hours of work must not be lost to a table
        print(format_table(results["models"]))
        for line in notes(results):
            print(f"linmu-eval: {line}", file=sys.stderr)

    return run_command("linmu-eval", run, "; with --output, the same command goes on with what is missing")


if __name__ == "__main__":
    sys.exit(main())
