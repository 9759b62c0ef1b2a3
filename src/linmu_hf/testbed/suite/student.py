"""The suite's student: data, conversion, three stages, and its answers beside its teacher's on all three test splits.

    python -m linmu_hf.testbed.suite.student --output DIR [--teacher FOLDER] [--steps_factor 0.1] [--test 100]

Run again after it was killed, it skips what is finished and takes up the rest.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from transformers.utils import logging

from ...commands import evaluate as evaluation
from ...commands.common import Parser, check_positive
from ...distillation.recipes import read_stages, recipe_file
from ...evaluation.retention import format_table
from ...files import write_text
from ..quickstart import QUICK, Schedule, command, convert_and_distil, open_way
from .data import EVALUATION_SPLITS
from .make_data import make_data
from .model import TEACHER


STEPS = {"stage-1": 900, "stage-2": 1400, "stage-3": 200}
SCHEDULE = replace(QUICK, train_rows=12000, test_rows_per_task=100, calibration_rows=128)


def scaled(schedule: Schedule, factor: float, test_rows: int) -> Schedule:
    """Returns the schedule with this share of the suite's steps and training rows, and so many rows to test a task."""
    names = [stage.name for stage in read_stages(recipe_file(schedule.recipe))]
    steps = tuple(f"{name}.max_steps={max(1, round(STEPS[name] * factor))}" for name in names)
    rows = max(schedule.calibration_rows, round(schedule.train_rows * factor))
    return replace(schedule, train_rows=rows, test_rows_per_task=test_rows, stage_overrides=steps)


def walk(output: Path, teacher: str, schedule: Schedule) -> dict[str, Any]:
    """Goes the whole way and returns what `results.json` holds: the models' accuracies for each split."""
    way = open_way(output, teacher, schedule)
    data = output / "data"
    way.run("data", lambda: make_data(data, schedule.train_rows, schedule.test_rows_per_task))
    student = convert_and_distil(way, output, teacher, schedule)[-1]
    found = {}
    for split in EVALUATION_SPLITS:
        scores = output / f"{split}.json"
        words = ("--model", student, "--teacher", teacher, "--dataset", data, "--split", split, "--json", scores)
        way.run(split, command("linmu-eval", evaluation.main, *words))
        found[split] = json.loads(scores.read_text())
    return {
        "splits": {split: {"models": one["models"], "rows": one["rows"]} for split, one in found.items()},
        "seconds": way.seconds | {"total": round(sum(way.seconds.values()), 1)},
        "settings": way.settings,
        "versions": found["seen"]["versions"],
    }


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, default=TEACHER, help="by default the one that is shipped")
    parser.add_argument("--steps_factor", type=float, default=1.0, help="share of the steps and of the rows")
    parser.add_argument("--test", type=int, default=SCHEDULE.test_rows_per_task, help="rows per task and test split")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()  # those of loading and saving; ours stay
    disable_progress_bars()
    try:
        check_positive(args, "test")
        if not args.steps_factor > 0:
            raise ValueError(f"--steps_factor {args.steps_factor} must be above 0")
        if not (args.teacher / "config.json").is_file():
            raise ValueError(f"--teacher {args.teacher} holds no config.json; suite.train_teacher trains one")
        results = walk(args.output, str(args.teacher), scaled(SCHEDULE, args.steps_factor, args.test))
    except ValueError as error:
        parser.error(str(error))
    write_text(args.output / "results.json", json.dumps(results, indent=2) + "\n")
    for split, one in results["splits"].items():
        print(f"\n{split}: accuracy on {one['rows']} rows, percent, with 95% intervals\n")
        print(format_table(one["models"]))
    print("\n" + ", ".join(f"{part} {seconds:.0f} s" for part, seconds in results["seconds"].items()))


if __name__ == "__main__":
    main()
