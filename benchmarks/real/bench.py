"""The parts of a run, each of which leaves a folder or a file when it is complete and not before."""

import json
import os
import platform
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from linmu_hf.conversion.calibrate import calibrate
from linmu_hf.conversion.choose_layers import choose_attention_layers, number_to_keep
from linmu_hf.conversion.convert import convert
from linmu_hf.conversion.teacher import load_processor, load_teacher
from linmu_hf.files import whole_folder, write_text

from .measure import evaluate
from .recall import recall, recall_set
from .settings import Calibrate, Settings, Step
from .teacher import build_teacher
from .text import TextRows, build_text
from .train import train


LOG = "training_log.jsonl"
ROWS_TO_CHOOSE_ON = 2  # which layers keep their attention, with `auto:K`
PACKAGES = ("linmu-hf", "torch", "transformers", "gguf")


class Bench:
    """
    One run.

    Args:
        output (`Path`): folder of the run: a model for each step, and what was measured.
        base (`Path`): folder of `downloads`, `teacher` and `text`, which runs with other settings can share.
        settings (`Settings`): what to do.
    """

    def __init__(self, output: Path, base: Path, settings: Settings):
        self.output, self.base, self.settings = output, base, settings

    def build_teacher(self) -> None:
        build_teacher(self.base / "teacher", self.base / "downloads")

    def build_text(self) -> None:
        build_text(self.base / "text", self.base / "downloads", self.tokenizer)

    @cached_property
    def tokenizer(self):
        return load_processor(self.base / "teacher").tokenizer

    @cached_property
    def teacher(self):
        return load_teacher(self.base / "teacher")

    def load(self, name: str):
        """Returns the model that a step has left."""
        if name == "teacher":
            return self.teacher
        return AutoModelForImageTextToText.from_pretrained(self.output / name).eval().requires_grad_(False)

    def convert(self) -> None:
        settings = self.settings
        write = partial(
            convert,
            str(self.base / "teacher"),
            str(self.output / "conversion"),
            preset=settings.preset,
            mixer_options=dict(settings.mixer_options),
            overwrite=True,
        )
        keep = settings.keep_attention
        number = number_to_keep(keep, self.teacher.config.text_config.num_hidden_layers)
        if number is not None:
            write()
            text = TextRows(self.base / "text", "train", self.tokenizer, settings.length)
            rows = [{"input_ids": text.batch(i, 1)} for i in range(ROWS_TO_CHOOSE_ON)]
            keep = choose_attention_layers(self.load("conversion"), self.teacher, rows, number)
        print(write(keep_attention=keep))

    def take(self, step: Step) -> None:
        """Takes a step from the model of the one before, and leaves its own."""
        if (self.output / step.name).is_dir():  # killed between the folder and the note that it is finished
            return
        names = ["conversion", *(each.name for each in self.settings.steps)]
        student = self.load(names[names.index(step.name) - 1])
        rows = TextRows(self.base / "text", "train", self.tokenizer, step.length, seed=names.index(step.name))
        checkpoint = self.output / f"{step.name}.checkpoint"
        log: list[dict[str, Any]] = []
        if isinstance(step, Calibrate):
            size = step.batch_size
            batches = [{"input_ids": rows.batch(i * size, size)} for i in range(step.batches)]
            fit = {name: getattr(step, name) for name in ("strength", "max_growth", "scan_steps")}
            print(calibrate(student, self.teacher, batches, **fit))
        else:
            log = train(student, self.teacher, rows, step, checkpoint)
        with whole_folder(self.output / step.name) as folder:
            student.save_pretrained(folder)
            load_processor(self.base / "teacher").save_pretrained(folder)
            (folder / LOG).write_text("".join(json.dumps(row) + "\n" for row in log))
        checkpoint.unlink(missing_ok=True)

    def measure(self, name: str) -> dict[str, Any]:
        """Measures the teacher, or the model of a step, and writes what it found to `figures/NAME.json`."""
        settings, text = self.settings, self.base / "text"
        held_out = TextRows(text, "held_out", self.tokenizer, settings.length)
        rows = [held_out[i] for i in range(settings.rows)]
        model = self.load(name)
        asked = recall(model, *recall_set(text, self.tokenizer, settings.questions))
        figures = evaluate(model, self.teacher, rows, [held_out.kind(i) for i in range(settings.rows)])
        figures |= {"recall": asked.pop("share"), "recall_details": asked}
        print(summary({name: figures}))
        file = self.figures_file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(figures, indent=2) + "\n")
        return figures

    def figures_file(self, name: str) -> Path:
        return self.output / "figures" / f"{name}.json"

    def results(self, seconds: dict[str, float]) -> dict[str, Any]:
        """Returns the figures of all steps, and what they were made with."""
        names = ["teacher", "conversion", *(step.name for step in self.settings.steps)]
        return {
            **{name: json.loads(self.figures_file(name).read_text()) for name in names},
            "settings": self.settings.to_dict(),
            "text": json.loads((self.base / "text" / "text.json").read_text()),
            "seconds": seconds | {"total": round(sum(seconds.values()), 1)},
            "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
            "machine": {
                "cores": os.cpu_count(),
                "torch_threads": torch.get_num_threads(),
                "cuda": torch.cuda.is_available(),
            },
        }


def summary(parts: dict[str, dict[str, Any]]) -> str:
    """Returns a table with a line for every part of the results that holds figures."""
    parts = {name: figures for name, figures in parts.items() if "perplexity" in figures}
    distances = list(dict.fromkeys(str(distance) for figures in parts.values() for distance in figures["recall"]))
    columns = ["perplexity", "KL", "agreement", "layer error", "own path", *(f"recall {d}" for d in distances)]
    lines = [" " * 14 + "  ".join(columns)]
    for name, figures in parts.items():
        layers = figures["layers"].values()
        means = [sum(layer[kind] for layer in layers) / len(layers) if layers else 0.0 for kind in ERRORS]
        recalled = {str(distance): share for distance, share in figures["recall"].items()}
        values = [
            f"{figures['perplexity']:,.2f}",
            f"{figures['kl']:.4f}",
            f"{figures['agreement']:.3f}",
            *(f"{mean:.3f}" for mean in means),
            *(f"{recalled[distance]:.2f}" for distance in distances),
        ]
        cells = (f"{value:>{len(column)}}" for value, column in zip(values, columns, strict=True))
        lines.append(f"{name:14}" + "  ".join(cells))
    return "\n".join(lines)


ERRORS = ("teacher_fed", "own_path")
