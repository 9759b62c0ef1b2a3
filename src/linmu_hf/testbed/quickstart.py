"""The whole way on a laptop: data, conversion, three stages of distillation, evaluation, pictures.

    python -m linmu_hf.testbed.quickstart --output runs/quickstart [--full] [--teacher qwen|nvila|FOLDER]

Every part runs a command that is there for any other model too, and prints it. Run again after it was killed, it skips
what is finished and takes up the rest.
"""

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers.utils import logging

from ..commands import convert as conversion
from ..commands import distill as distillation
from ..commands import evaluate as evaluation
from ..commands.common import Parser
from ..data import load_rows
from ..data.image import open_image
from ..distillation.recipes import read_stages, recipe_file, stage_values
from ..evaluation.retention import correct_answers, format_table
from ..files import write_text
from .ablations.plans import WINDOWS
from .check_teacher import TEACHERS, is_nvila
from .data import Sizes
from .make_data import make_data


PICTURED_TASKS = ("cell", "below", "large")
PICTURES_PER_TASK = 3
LOGGING_STEPS = 5


@dataclass(frozen=True)
class Schedule:
    """The sizes of the parts of the way; `stage_overrides` change the recipe, `arguments` go to `linmu-distill`."""

    train_rows: int
    sizes: Sizes
    test_rows_per_task: int
    calibration_rows: int
    batch_size: int
    recipe: str
    stage_overrides: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()


QUICK = Schedule(
    train_rows=3000,
    sizes="teacher",
    test_rows_per_task=100,
    calibration_rows=64,
    batch_size=16,
    recipe="quick",
    arguments=("--adam_beta2", "0.98", "--position_shift", "16"),
)
FULL = replace(
    QUICK,
    train_rows=12000,
    sizes="wide",
    test_rows_per_task=500,
    calibration_rows=128,
    stage_overrides=("stage-1.max_steps=600", "stage-2.max_steps=1800", "stage-3.max_steps=400"),
)
# NVILA resizes every image to one canvas, so each size of mosaic is a task of its own: ours knows the two of the test.
NVILA_QUICK = replace(
    QUICK,
    sizes="test",
    recipe="default",
    arguments=(),
    stage_overrides=(
        "stage-1-align.learning_rate=2e-3",
        "stage-2.learning_rate=6e-4",
        "stage-1-align.max_steps=250",
        "stage-1.max_steps=250",
        "stage-2.max_steps=300",
        "stage-3.max_steps=100",
        "stage-3.learning_rate=3e-4",
        "stage-3.seq=0",  # decoding the teacher's answers would take longer than the stage itself
    ),
)
# Its rows are longer; this fits into little more than an hour on one core.
NVILA_FULL = replace(
    NVILA_QUICK,
    train_rows=8000,
    test_rows_per_task=500,
    calibration_rows=128,
    stage_overrides=(
        "stage-1-align.learning_rate=2e-3",
        "stage-2.learning_rate=6e-4",
        "stage-3.learning_rate=2e-4",
        "stage-1-align.max_steps=1000",
        "stage-1.max_steps=200",
        "stage-2.max_steps=700",
        "stage-3.max_steps=200",
    ),
)


class Way:
    """
    The parts of the way, each run once; `progress.json` remembers which are finished and how long they took.

    Args:
        output (`Path`): folder of the run.
        settings (`dict`): what the run was asked for; a folder of other settings is refused.
    """

    def __init__(self, output: Path, settings: dict[str, Any]):
        self.file = output / "progress.json"
        self.seconds: dict[str, float] = {}
        self.finished: list[str] = []
        if self.file.exists():
            saved = json.loads(self.file.read_text())
            if saved["settings"] != json.loads(json.dumps(settings)):
                raise ValueError(f"{output} holds a run of other settings: choose another --output or add --overwrite")
            self.seconds, self.finished = saved["seconds"], saved["finished"]
        self.settings = settings
        output.mkdir(parents=True, exist_ok=True)
        self._save()

    def run(self, part: str, work: Callable[[], Any]) -> None:
        if part in self.finished:
            print(f"\n== {part}: finished before, {self.seconds[part]:.0f} s")
            return
        print(f"\n== {part}", flush=True)
        start = time.perf_counter()
        try:
            work()
            self.finished.append(part)
        finally:
            self.seconds[part] = round(self.seconds.get(part, 0.0) + time.perf_counter() - start, 1)
            self._save()

    def _save(self) -> None:
        state = {"settings": self.settings, "finished": self.finished, "seconds": self.seconds}
        write_text(self.file, json.dumps(state, indent=2) + "\n")


def command(name: str, main: Callable, *arguments) -> Callable[[], None]:
    """Runs a command line of this package: shows what one would type, then does it."""
    words = [
        str(word) for argument in arguments for word in (argument if isinstance(argument, tuple) else (argument,))
    ]

    def work() -> None:
        print(f"$ {name} {shlex.join(words)}\n", flush=True)
        if code := main(words):
            sys.exit(code)

    return work


def flags(options: dict[str, Any]) -> list[str]:
    """Returns mixer options as `linmu-convert` takes them."""
    return [
        word
        for name, value in options.items()
        for word in (
            f"--{name}",
            ",".join(map(str, value)) if isinstance(value, list) else str(value),
        )
    ]


def open_way(output: Path, teacher: str, schedule: Schedule) -> Way:
    """Opens the folder of a way, or begins one."""
    stages = read_stages(recipe_file(schedule.recipe), schedule.stage_overrides)
    settings = {"mixer_options": WINDOWS, "stages": [stage_values(stage) for stage in stages], **asdict(schedule)}
    return Way(output, {"teacher": teacher, **settings})


def convert_and_distil(way: Way, output: Path, teacher: str, schedule: Schedule) -> list[Path]:
    """Goes from `output/data` to `output/student`; returns the models on the way, without those fed by the teacher."""
    data, init, student = (output / name for name in ("data", "init", "student"))
    way.run(
        "convert",
        command(
            "linmu-convert", conversion.main,
            "--teacher", teacher, "--output_dir", init, "--overwrite_output_dir",
            "--calibrate", data, "--calibrate_samples", schedule.calibration_rows, *flags(WINDOWS),
        ),
    )  # fmt: skip
    way.run(
        "distil",
        command(
            "linmu-distill", distillation.main,
            "--model", init, "--teacher", teacher, "--dataset", data, "--output_dir", student,
            "--per_device_train_batch_size", schedule.batch_size, "--logging_steps", LOGGING_STEPS,
            "--feature_cache_gb", 6, "--recipe", schedule.recipe, *schedule.arguments,
            *(("--stage_overrides", *schedule.stage_overrides) if schedule.stage_overrides else ()),
        ),
    )  # fmt: skip
    stages = read_stages(recipe_file(schedule.recipe), schedule.stage_overrides)
    return [init, *(student / stage.name for stage in stages if stage.hidden_input == "student")]


def walk(output: Path, teacher: str, schedule: Schedule) -> dict[str, Any]:
    """Goes the whole way and returns what `results.json` holds."""
    way = open_way(output, teacher, schedule)
    data, student, scores = (output / name for name in ("data", "student", "retention.json"))
    way.run("data", lambda: make_data(data, schedule.train_rows, schedule.test_rows_per_task, schedule.sizes))
    folders = convert_and_distil(way, output, teacher, schedule)
    models = [word for folder in folders for word in ("--model", folder)]
    way.run(
        "evaluate",
        command("linmu-eval", evaluation.main, *models, "--teacher", teacher, "--dataset", data, "--json", scores),
    )
    way.run("pictures", lambda: draw_pictures(output, student, data))

    results = json.loads(scores.read_text())
    return {
        "models": results["models"],
        "rows": results["rows"],
        "seconds": way.seconds | {"total": round(sum(way.seconds.values()), 1)},
        "settings": way.settings,
        "versions": results["versions"],
        "machine": {
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "cuda": torch.cuda.is_available(),
        },
    }


def draw_pictures(output: Path, student: Path, data: Path) -> None:
    """Draws `curves.png`, `answers.png` with the student's answers about held-out images, and one as `picture.png`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from transformers import pipeline

    shutil.copyfile(student / "loss_curves.png", output / "curves.png")
    dataset = load_rows(str(data), "test")
    dataset = dataset.select(evaluation.first_of_every_task(evaluation.name_tasks(dataset), PICTURES_PER_TASK))
    rows = [row for task in PICTURED_TASKS for row in dataset if row["task"] == task]
    rows = [{**row, "images": [open_image(image) for image in row["images"]]} for row in rows]
    rows[0]["images"][0].save(output / "picture.png")
    ask = pipeline("image-text-to-text", model=str(student))
    conversations = []
    for row in rows:
        question = row["messages"][0]["content"][-1]["text"]
        content = [{"type": "image", "image": row["images"][0]}, {"type": "text", "text": question}]
        conversations.append([{"role": "user", "content": content}])
    answers = [
        ask(text=chat, return_full_text=False, max_new_tokens=16)[0]["generated_text"] for chat in conversations
    ]

    columns = len(rows) // PICTURES_PER_TASK
    figure, axes = plt.subplots(PICTURES_PER_TASK, columns, figsize=(3 * columns, 3.4 * PICTURES_PER_TASK))
    for axis, row, answer, right in zip(axes.T.flat, rows, answers, correct_answers(rows, answers)):
        question, truth = row["messages"][0]["content"][-1]["text"], row["messages"][-1]["content"][0]["text"]
        axis.imshow(row["images"][0], interpolation="nearest")
        axis.axis("off")
        verdict = answer if right else f"{answer[:24]} (it is {truth})"
        axis.set_title(f"{question}\n{verdict}", color="green" if right else "firebrick", fontsize=10)
        print(f"{question:24} {verdict}")
    figure.tight_layout()
    figure.savefig(output / "answers.png", dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--full", action="store_true", help="the long schedule")
    parser.add_argument(
        "--teacher",
        default="qwen",
        help=f"{', '.join(TEACHERS)}, or the folder of a model that knows the tasks",
    )
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier run in --output")
    arguments = parser.parse_args(argv)
    teacher = TEACHERS.get(arguments.teacher, Path(arguments.teacher))
    if not (teacher / "config.json").is_file():
        sys.exit(f"quickstart: error: there is no teacher in {teacher}; linmu_hf.testbed.train_teacher trains one")
    schedules = (NVILA_QUICK, NVILA_FULL) if is_nvila(teacher) else (QUICK, FULL)
    if arguments.overwrite and (arguments.output / "progress.json").exists():
        shutil.rmtree(arguments.output)
    logging.disable_progress_bar()  # those of loading and saving; ours stay
    disable_progress_bars()
    try:
        results = walk(arguments.output, str(teacher), schedules[arguments.full])
    except ValueError as error:
        sys.exit(f"quickstart: error: {error}")
    file = arguments.output / "results.json"
    file.write_text(json.dumps(results, indent=2) + "\n")

    print(f"\nAccuracy on {results['rows']} held-out rows, percent, with 95% intervals\n")
    print(format_table(results["models"]))
    print("\n" + ", ".join(f"{part} {seconds:.0f} s" for part, seconds in results["seconds"].items()))
    student, picture = arguments.output / "student", arguments.output / "picture.png"
    for name, meaning in (
        ("results.json", "all of this as JSON"),
        ("curves.png", "losses and errors over the steps"),
        ("answers.png", "held-out images with the student's answers"),
        (student.name, f'the model: linmu-chat --model {student} --image {picture} "row 1 column 2?"'),
    ):
        print(f"{arguments.output / name!s:32} {meaning}")


if __name__ == "__main__":
    main()
