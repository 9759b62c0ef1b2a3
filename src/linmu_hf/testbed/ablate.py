"""`linmu-ablate`: the paper's Tables 2 to 4, and more, over several seeds.

    linmu-ablate --plan loss_terms --seeds 0 1 2 --output runs/ablations

Every student is converted, distilled by `distill`, and measured as `linmu-eval` does. What is measured stays in
`students` of the output folder: the same command goes on after a kill, and other plans or seeds take what is there.
"""

import json
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from transformers.utils import logging

from ..commands.common import Parser, check_positive, run_command, write_report
from ..distillation.recipes import RECIPES, read_stages, recipe_file
from ..evaluation.loading import check_model, library_versions
from ..files import check_report, locked, whole_folder, write_text
from .ablations.plans import PLANS, WINDOWS, Row, Start, scale_steps
from .ablations.run import Bench
from .ablations.tables import format_plan, plot_plan, summarise
from .check_teacher import TEACHERS
from .data import WHOLE_SCENE
from .make_data import make_data


ALL = "all"
NOT_IN_ALL = ("referees", "block")
IN_ALL = [name for name in PLANS if name not in NOT_IN_ALL]


def parse_arguments(argv: Sequence[str] | None = None):
    parser = Parser(prog="linmu-ablate", description=__doc__.splitlines()[0].split(": ", 1)[1])
    parser.add_argument(
        "--plan", nargs="+", required=True, choices=[*PLANS, ALL], metavar="PLAN",
        help=f"{', '.join(PLANS)}; {ALL} is every one but {' and '.join(NOT_IN_ALL)}",
    )  # fmt: skip
    parser.add_argument("--rows", nargs="+", metavar="LABEL", help="only these rows of the plans")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--teacher", default="qwen", help=f"{', '.join(TEACHERS)}, a folder or a Hub id")
    parser.add_argument("--model", help="converted student that all runs start from, in place of a conversion")
    parser.add_argument("--dataset", help="rows with splits train and test; by default the testbed's")
    parser.add_argument("--mixer_options", help="M-MATE fields of all students, as JSON; the testbed's by default")
    parser.add_argument("--recipe", help=f"stages of the students: {', '.join(RECIPES)}; quick by default")
    parser.add_argument("--stages", help="file of stages in place of a recipe")
    parser.add_argument("--stage_overrides", nargs="+", default=[], help="as of linmu-distill")
    parser.add_argument("--steps_factor", type=float, default=1.0, help="times the steps of every stage")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--train_rows", type=int, default=3000, help="of the testbed's data")
    parser.add_argument("--test_rows", type=int, default=100, help="of the testbed's data, for each task")
    parser.add_argument("--limit", type=int, help="test rows at most")
    parser.add_argument("--markdown", type=Path, help="file for the tables, OUTPUT/ablations.md by default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables here too")
    return parser.parse_args(argv)


def run(arguments) -> dict[str, Any]:
    """Runs the plans and returns their tables."""
    check_positive(arguments, "batch_size", "train_rows", "test_rows", "limit")
    if not arguments.steps_factor > 0:
        raise ValueError(f"--steps_factor {arguments.steps_factor} must be positive")
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise ValueError(f"--seeds {arguments.seeds} names one twice, which would make the error bars too small")
    if arguments.stages and arguments.recipe:
        raise ValueError(f"--recipe {arguments.recipe} has no effect beside --stages: leave one of them out")
    check_report(arguments.json)
    base = scale_steps(
        read_stages(arguments.stages or recipe_file(arguments.recipe or "quick"), arguments.stage_overrides),
        arguments.steps_factor,
    )
    names = IN_ALL if ALL in arguments.plan else list(dict.fromkeys(arguments.plan))
    options = WINDOWS if arguments.dataset is None and arguments.model is None else {}
    if arguments.mixer_options:
        options = _read_options(arguments.mixer_options)
    plans = {name: _rows(name, base, options, arguments.steps_factor) for name in names}
    if arguments.rows:
        plans = _pick(plans, arguments.rows)
    if arguments.model:
        check_model(arguments.model)
        _refuse_starts(plans, arguments.mixer_options)
    output = arguments.output
    with locked(output):
        output.mkdir(parents=True, exist_ok=True)
        teacher = str(TEACHERS.get(arguments.teacher, arguments.teacher))
        dataset = arguments.dataset or _testbed_data(output, arguments.train_rows, arguments.test_rows)
        bench = Bench(output, teacher, dataset, arguments.batch_size, arguments.limit, arguments.model, options)
        right = bench.teacher_right()
        results = bench.measure([row for rows in plans.values() for row in rows], arguments.seeds)
        tables = {}
        for name, rows in plans.items():
            tables[name] = summarise(
                [_figures(bench, results, row, arguments.seeds) for row in rows], bench.tasks, right,
                WHOLE_SCENE if name == "referees" else (),
            )  # fmt: skip
        report = {
            "plans": tables,
            "seeds": arguments.seeds,
            "teacher": teacher,
            "dataset": dataset,
            "test_rows": len(bench.tasks),
            "tasks": list(dict.fromkeys(bench.tasks)),
            "command": ["linmu-ablate", *arguments.words],
            "versions": library_versions(),
        }
        _write(report, bench.tasks, output, arguments.markdown or output / "ablations.md")
    return report


def _rows(name: str, stages, options: dict[str, Any], factor: float) -> list[Row]:
    if name == "referees":
        return PLANS[name](stages, options)
    if name != "block":
        return PLANS[name](stages)
    # it has stages of its own, which the recipe's factor has not reached
    return [Row(row.label, scale_steps(row.stages, factor), row.start) for row in PLANS[name](stages)]


def _pick(plans: dict[str, list[Row]], labels: Sequence[str]) -> dict[str, list[Row]]:
    """Returns the rows of these labels, in the plan's order."""
    picked = {name: [row for row in rows if row.label in labels] for name, rows in plans.items()}
    known = [row.label for rows in plans.values() for row in rows]
    if unknown := sorted(set(labels) - set(known)):
        raise ValueError(f"--rows has {unknown}, which {', '.join(plans)} lacks: choose out of {known}")
    if empty := [name for name, rows in picked.items() if not rows]:
        raise ValueError(f"--rows leaves nothing of the plan {empty[0]}: leave it out of --plan")
    return picked


def _refuse_starts(plans: dict[str, list[Row]], mixer_options: str | None) -> None:
    for name, rows in plans.items():
        if any(row.start != Start() for row in rows):
            raise ValueError(f"--model fits no plan {name}, whose students start in ways of their own: leave one out")
    if mixer_options:
        raise ValueError(f"--mixer_options {mixer_options} has no effect on the converted --model: leave one out")


def _read_options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--mixer_options {text!r} is no JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"--mixer_options {text!r} must be a JSON object, such as {json.dumps(WINDOWS)}")
    return options


def _testbed_data(output: Path, train: int, test: int) -> str:
    folder = output / f"data-{train}-{test}"
    if not folder.exists():
        with whole_folder(folder) as part:
            make_data(part, train, test)
    return str(folder)


def _figures(bench: Bench, results: dict[str, dict[str, Any]], row: Row, seeds: Sequence[int]):
    students = [results[bench.key(row, seed)] for seed in seeds]
    errors = [student["error"][row.measured] for student in students if row.measured in student["error"]]
    return row.label, row.paper, [student["right"][row.measured] for student in students], errors


def _write(report: dict[str, Any], tasks: Sequence[str], output: Path, markdown: Path) -> None:
    """Writes a section, a JSON and a picture for every plan, and all sections as one page."""
    markdown.parent.mkdir(parents=True, exist_ok=True)
    sections = []
    for name, table in report["plans"].items():
        picture = markdown.parent / f"ablations_{name}.png"
        plot_plan(name, table, picture)
        sections.append(format_plan(name, table, tasks, picture.name))
        write_text(output / f"{name}.json", json.dumps(table, indent=2) + "\n")
    write_text(markdown, "\n".join([_introduction(report), *sections]))


def _introduction(report: dict[str, Any]) -> str:
    seeds = len(report["seeds"])
    bars = f"± is one standard deviation over {seeds} seeds" if seeds > 1 else "one seed, so there are no error bars"
    return f"""# Ablations

Accuracy in percent on {report["test_rows"]} held-out questions; {bars}. `retention` is the mean over tasks as a
share of the teacher's, `difference` that mean less the first row's of the same seed, `error` the relative error of the
mixers at the end of the stage, and `paper` the mean of the paper's own benchmarks, with its difference from the first
row. Tasks, model and budget are others than the paper's: only the order of the rows can be compared. Made by

    {shlex.join(report["command"])}
{_missing(report["plans"])}"""


def _missing(plans: Collection[str]) -> str:
    names = [name for name in IN_ALL if name not in plans]
    return f"\nNot on this page: {', '.join(names)}. `make ablations` runs them too.\n" if names else ""


def main(argv: Sequence[str] | None = None) -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()

    def work() -> None:
        arguments = parse_arguments(argv)
        arguments.words = list(sys.argv[1:] if argv is None else map(str, argv))
        report = run(arguments)
        write_report(arguments.json, report)
        page = arguments.markdown or arguments.output / "ablations.md"
        print(page.read_text())

    return run_command("linmu-ablate", work, "; the same command goes on with what is missing")


if __name__ == "__main__":
    sys.exit(main())
