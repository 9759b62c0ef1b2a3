"""Accuracy and cost of a teacher and its students against frames, pixels and turns, within training and beyond.

    python -m linmu_hf.testbed.evidence.beyond --teacher qwen --model runs/quickstart/student --output runs/beyond

By default the shipped pair. What is measured stays in OUTPUT/points.json: the same command goes on after a kill, and
other sizes add to what is there. OUTPUT/beyond.json, .md and .png show it.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ...commands.bench import machine
from ...commands.chat import SHIPPED_STUDENT
from ...commands.common import Parser, check_positive, run_command, write_report
from ...commands.evaluate import name_models
from ...data import encode_prompts
from ...distillation.costs.accounting import Account
from ...evaluation.answers import describe_model
from ...evaluation.loading import check_model, library_versions
from ...evaluation.speed.measure import Clock, cache_bytes
from ...files import locked, write_text
from ...modeling.compat import CACHE
from ..check_teacher import TEACHERS, count_right, load
from .figures import beyond_tables, plot_beyond
from .questions import SIZES, check_size, make_rows


TOKENS_AT_ONCE = 20_000
AGAIN = "; the same command goes on with what is missing"


def parse_arguments(argv: Sequence[str] | None = None):
    parser = Parser(prog="linmu_hf.testbed.evidence.beyond", description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="qwen", help=f"{', '.join(TEACHERS)}, or a folder")
    parser.add_argument("--model", action="append", help="student's folder; may be repeated; default: the shipped one")
    for axis, sizes in SIZES.items():
        parser.add_argument(f"--{axis}", type=int, nargs="*", default=list(sizes), help=AXIS_HELP[axis])
    parser.add_argument("--questions", type=int, default=100, help="for each size")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of a time, of which the shortest counts")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch; with one, time is the processor's")
    parser.add_argument("--output", type=Path, default=Path("runs/beyond"))
    return parser.parse_args(argv)


AXIS_HELP = {
    "frames": "frames of a clip, each of 16 shown as often as it takes",
    "pixels": "cells of 16 pixels along each side of a mosaic",
    "turns": "questions in one conversation, of which the last one counts",
}


def check_arguments(arguments) -> dict[str, str]:
    """Returns the folders of the models by name, or raises what is wrong before any weights are read."""
    check_positive(arguments, "questions", "repeats", "threads")
    for axis in SIZES:
        for size in getattr(arguments, axis):
            check_size(axis, size)
    if not any(getattr(arguments, axis) for axis in SIZES):
        raise ValueError("--frames, --pixels and --turns are all empty: give one of them a size")
    given = {"teacher": str(TEACHERS.get(arguments.teacher, arguments.teacher))}
    students = list(dict.fromkeys(map(str, arguments.model or [SHIPPED_STUDENT])))
    models = given | name_models(students, given)
    for path in models.values():
        check_model(path)
        if not Path(path).is_dir():
            raise ValueError(f"{path} is no folder: download the model, and give its folder")
    return models


def measure_point(model, processor, rows: list[dict], repeats: int) -> dict[str, Any]:
    """
    Measures one model at one size.

    Returns:
        `dict`: `right`, the number of right answers; of the first row's prompt `tokens`, `ttft_s` (the whole forward
        pass, vision side included, without the reading of the pictures), `cache_bytes` after it, and its `flops`, the
        multiplications and additions of matrix products.
    """
    prompt = encode_prompts(processor, rows[:1])
    tokens = prompt["input_ids"].shape[1]
    point = {"right": count_right(model, processor, rows, max(1, min(25, TOKENS_AT_ONCE // tokens)))}
    clock = Clock("cpu")
    with torch.no_grad():
        seconds, _, output = min(
            (clock(lambda: model(**prompt, use_cache=True, logits_to_keep=1)) for _ in range(repeats)),
            key=lambda measured: measured[0],
        )
        with Account() as account:
            model(**prompt, use_cache=True, logits_to_keep=1)
    held = cache_bytes(output[CACHE])
    return point | {
        "tokens": tokens, "ttft_s": seconds, "cache_bytes": held, "flops": account.flops + account.attention
    }  # fmt: skip


class Points:
    """
    The measured points, by model, axis and size, in a file that grows with each of them.

    Args:
        file (`Path`): the file.
        made_of (`dict`): what the points depend on; those of anything else are refused.
    """

    def __init__(self, file: Path, made_of: dict[str, Any]):
        self.file, self.made_of = file, json.loads(json.dumps(made_of))
        self.known: dict[str, dict[str, Any]] = {}
        if file.exists():
            saved = json.loads(file.read_text())
            if saved["made_of"] != self.made_of:
                raise ValueError(f"{file} was measured with other models or settings: give another --output")
            self.known = saved["points"]

    def get(self, key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns the point of this name, measured now if it is not there."""
        if key not in self.known:
            self.known[key] = work()
            write_text(self.file, json.dumps({"made_of": self.made_of, "points": self.known}, indent=1) + "\n")
        return self.known[key]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Lets PyTorch use `count` threads within a `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(arguments) -> dict[str, Any]:
    """Measures what is missing and returns the report."""
    models = check_arguments(arguments)
    settings = {"questions": arguments.questions, "repeats": arguments.repeats, "threads": arguments.threads}
    made_of = settings | {"models": {name: [path, describe_model(path)] for name, path in models.items()}}
    places = [(axis, size) for axis in SIZES for size in sorted(set(getattr(arguments, axis)))]
    rows, load_once = [], lru_cache(maxsize=1)(load)
    with locked(arguments.output), threads(arguments.threads):
        arguments.output.mkdir(parents=True, exist_ok=True)
        points = Points(arguments.output / "points.json", made_of)
        with tqdm(total=len(models) * len(places), desc="beyond training") as bar:
            for name, path in models.items():
                for axis, size in places:
                    bar.set_postfix_str(f"{name}, {size} {axis}")

                    def work(path=path, axis=axis, size=size):
                        model, processor = load_once(path)
                        questions = make_rows(axis, size, arguments.questions)
                        return measure_point(model, processor, questions, arguments.repeats)

                    point = points.get(f"{name}/{axis}/{size}", work)
                    rows.append({"model": name, "axis": axis, "size": size, **point})
                    bar.update()
        report = {
            "command": ["python", "-m", "linmu_hf.testbed.evidence.beyond", *arguments.words],
            **settings,
            "clock": "process" if arguments.threads == 1 else "wall",
            "machine": machine("cpu") | {"threads": arguments.threads},
            "versions": library_versions(),
            "points": rows,
        }
        write_report(arguments.output / "beyond.json", report)
        write_text(arguments.output / "beyond.md", beyond_tables(report))
        plot_beyond(report, arguments.output / "beyond.png")
    return report


def main(argv: Sequence[str] | None = None) -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def work() -> None:
        arguments = parse_arguments(argv)
        arguments.words = list(sys.argv[1:] if argv is None else map(str, argv))
        print(beyond_tables(run(arguments)))

    return run_command("linmu_hf.testbed.evidence.beyond", work, AGAIN)


if __name__ == "__main__":
    sys.exit(main())
