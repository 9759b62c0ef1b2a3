"""Fidelity of the shipped student, sizes beyond training, and what referees asked for, as one page.

    python -m linmu_hf.testbed.evidence --output runs/evidence --page docs/evidence.md [--parts fidelity] [--quick]

Every part is a command that one could type, and prints it. What is finished is not done again. A part's figures go as
JSON and pictures into a folder beside the page, and the page is made of what is there: also what other runs have left.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from transformers.utils import logging

from ...commands import fidelity
from ...commands.bench import machine
from ...commands.chat import SHIPPED_STUDENT
from ...commands.common import Parser, run_command, write_report
from ...files import copy_file, locked, write_text
from .. import ablate
from ..check_teacher import TEACHERS
from ..make_data import make_data
from ..quickstart import Way, command
from . import beyond
from .page import PARTS, build_page


# What goes to each command besides its models, data and output.
FULL: dict[str, tuple[str, ...]] = {
    "fidelity": ("--limit", "20"),
    "beyond": (),
    # the budget of docs/ablations.md: three seeds of 14 students are some hours of one core
    "referees": (*("--seeds", "0", "1", "2", "--steps_factor", "0.1", "--train_rows", "1500", "--test_rows", "60"),),
}
QUICK: dict[str, tuple[str, ...]] = {
    "fidelity": ("--limit", "3"),
    "beyond": (
        *("--frames", "16", "64"), *("--pixels", "4", "10"), *("--turns", "1", "16"),
        *("--questions", "10", "--repeats", "1"),
    ),
    "referees": (
        *("--rows", "as it is", "windows of half the size", "one-directional Flex-MA", "Flex-MA alone"),
        *("--seeds", "0", "--steps_factor", "0.01", "--train_rows", "200", "--test_rows", "4"),
    ),
}  # fmt: skip
TEST_ROWS = 100
# The report of each part and its pictures, in its folder.
RESULTS = {
    "fidelity": ("fidelity.json", ("errors.png", "attention.png", "branches.png", "logits.png")),
    "beyond": ("beyond.json", ("beyond.png",)),
    "referees": ("ablations.json", ("ablations_referees.png",)),
}


def parse_arguments(argv: Sequence[str] | None = None):
    parser = Parser(prog="linmu_hf.testbed.evidence", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--page", type=Path, help="by default OUTPUT/evidence.md")
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--quick", action="store_true", help="hardly any budget: that all runs, not what it shows")
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier run in --output")
    return parser.parse_args(argv)


def short(path: str | Path) -> str:
    """Returns a path as one would type it here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def words_of(part: str, output: Path, settings: tuple[str, ...]) -> list[str]:
    """Returns what a part's command is given."""
    student, teacher = short(SHIPPED_STUDENT), short(TEACHERS["qwen"])
    words = {
        "fidelity": ["--model", student, "--teacher", teacher, "--dataset", str(output / "data")],
        "beyond": ["--teacher", "qwen", "--model", student],
        "referees": ["--plan", "referees", "--json", str(output / part / RESULTS[part][0])],
    }[part]
    return [*words, *settings, "--output", str(output / part)]


MAINS = {
    "fidelity": ("linmu-fidelity", fidelity.main),
    "beyond": ("python -m linmu_hf.testbed.evidence.beyond", beyond.main),
    "referees": ("linmu-ablate", ablate.main),
}


def run(arguments) -> None:
    """Runs the parts that are missing and writes the page."""
    output, schedule = arguments.output, QUICK if arguments.quick else FULL
    page = arguments.page or output / "evidence.md"
    with locked(output):
        if arguments.overwrite and (output / "progress.json").exists():
            shutil.rmtree(output)
        way = Way(output, {"parts": schedule})
        for part in arguments.parts:
            if part == "fidelity":
                way.run("data", lambda: make_data(output / "data", 1, TEST_ROWS))
            (output / part).mkdir(exist_ok=True)
            name, main_of_part = MAINS[part]
            words = words_of(part, output, schedule[part])
            way.run(part, command(name, main_of_part, *words))
            keep(part, output / part, page.parent / page.stem, [*name.split(), *words], way.seconds[part])
        write_text(page, build_page(page, arguments.quick))
    print(f"\n{page}: what has been measured")


def keep(part: str, folder: Path, kept: Path, words: list[str], seconds: float) -> None:
    """Puts a part's report and pictures beside the page."""
    kept.mkdir(parents=True, exist_ok=True)
    report_file, pictures = RESULTS[part]
    report: dict[str, Any] = json.loads((folder / report_file).read_text())
    for name in ("arguments", "teacher", "dataset", "command"):  # the command is said once, below
        report.pop(name, None)
    facts = {name: value for name, value in machine("cpu").items() if name not in ("system", "threads")}
    write_report(kept / f"{part}.json", {"command": words, "seconds": seconds, "machine": facts, "report": report})
    for picture in pictures:
        if (folder / picture).exists():
            copy_file(folder / picture, kept / f"{part}_{picture}" if part == "fidelity" else kept / picture)


def main(argv: Sequence[str] | None = None) -> int:
    logging.disable_progress_bar()
    disable_progress_bars()
    return run_command("linmu_hf.testbed.evidence", lambda: run(parse_arguments(argv)), "; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
