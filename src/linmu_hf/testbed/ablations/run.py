"""Converts, distils and measures the students of the plans; what is measured is kept, and not done again."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from ...conversion.calibrate import calibrate
from ...conversion.convert import convert
from ...conversion.teacher import load_teacher
from ...data import encode_rows, load_rows
from ...distillation import DistillConfig, decode_pseudo_targets, distill
from ...distillation.recipes import stage_values
from ...evaluation.retention import correct_answers, generate_answers, tasks_of
from ...files import write_text
from ...modeling.mixers import recurrent_layers
from .plans import INIT, Row, Start


SATURATED = 30.0  # a sigmoid of it is 1 in float32
MAX_ANSWER = 16


@dataclass
class Bench:
    """
    Everything that the students of a run share.

    Args:
        output (`Path`): the folder of the run.
        teacher (`str`): folder or Hub id.
        dataset (`str`): rows with the splits `train` and `test`.
        batch_size (`int`): rows of a step.
        limit (`int`, *optional*): test rows at most.
        student (`str`, *optional*): a converted model to start from, in place of converting the teacher.
        mixer_options (`dict`): M-MATE fields of every student, under those of a plan.
        calibration_rows (`int`): for starts that are calibrated.
    """

    output: Path
    teacher: str
    dataset: str
    batch_size: int = 16
    limit: int | None = None
    student: str | None = None
    mixer_options: dict[str, Any] = field(default_factory=dict)
    calibration_rows: int = 64

    @cached_property
    def processor(self):
        return AutoProcessor.from_pretrained(self.teacher)

    @cached_property
    def model(self):
        return load_teacher(self.teacher, dtype="float32").to(self.device)

    @cached_property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @cached_property
    def train(self):
        return load_rows(self.dataset, "train")

    @cached_property
    def test(self):
        rows = load_rows(self.dataset, "test")
        if self.limit is None or self.limit >= len(rows):
            return rows
        return rows.select(np.linspace(0, len(rows) - 1, self.limit).round().astype(int))  # some of every task

    @cached_property
    def tasks(self) -> list[str]:
        return tasks_of(self.test)

    def key(self, row: Row, seed: int) -> str:
        """Names a student: by all that decides what it becomes."""
        values = [
            self.teacher, self.student, self.dataset, self.batch_size, self.limit, self.mixer_options,
            self.calibration_rows,
            asdict(row.start), [stage_values(stage) for stage in row.stages], seed,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def teacher_right(self) -> list[int]:
        """Returns for every test row whether the teacher answers it, 0 or 1."""
        name = hashlib.sha256(json.dumps([self.teacher, self.dataset, self.limit]).encode()).hexdigest()[:16]
        file = self.output / f"teacher-{name}.json"
        if not file.exists():
            write_text(file, json.dumps(self.score(self.model, "teacher")))
        return json.loads(file.read_text())

    def score(self, model, description: str) -> list[int]:
        answers = generate_answers(
            model.eval(), self.processor, self.test, max_new_tokens=MAX_ANSWER, description=description
        )
        return correct_answers(self.test, answers).astype(int).tolist()

    def measure(self, rows: Sequence[Row], seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
        """
        Measures the student of every row and seed.

        Returns:
            `dict`: by key, `right` (for every place where it is measured, 0 or 1 for every test row) and `error` (the
            mixers' relative error at the end of every stage).
        """
        places: dict[str, set[str]] = {}
        students = {}
        for seed in seeds:
            for row in rows:
                key = self.key(row, seed)
                places.setdefault(key, set()).add(row.measured)
                students[key] = (row, seed)
        results = {}
        for key, (row, seed) in tqdm(students.items(), desc="ablation"):
            file = self.output / "students" / f"{key}.json"
            known = json.loads(file.read_text()) if file.exists() else {"right": {}}
            if not places[key] <= set(known["right"]):
                places[key] |= set(known["right"])
                known = self.distil(row, seed, file.with_suffix(""), places[key])
                write_text(file, json.dumps(known) + "\n")
                shutil.rmtree(file.with_suffix(""))
            results[key] = known
        return results

    def distil(self, row: Row, seed: int, folder: Path, places: set[str]) -> dict[str, Any]:
        """Takes one student through its stages in `folder`, going on where a killed run was."""
        student = self.start(row.start, folder / "init")
        right = {INIT: self.score(student, INIT)} if INIT in places else {}
        answers = any(stage.seq for stage in row.stages)
        config = DistillConfig(
            output_dir=str(folder / "student"),
            per_device_train_batch_size=self.batch_size,
            seed=seed,
            logging_steps=10,
            save_steps=100,
            feature_cache_gb=6,
            max_completion_length=MAX_ANSWER,
            pseudo_targets=str(self.pseudo_targets) if answers else None,
            disable_tqdm=True,
            report_to=[],
            use_cpu=self.device == "cpu",
        )
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # the Trainer prints every log
            log = distill(config, student, self.model, self.train, self.processor, stages=row.stages)
        for stage in row.stages:
            if stage.name in places:
                model = AutoModelForImageTextToText.from_pretrained(folder / "student" / stage.name)
                right[stage.name] = self.score(model.to(self.device), stage.name)
        error = {each["stage"]: each["relative_error"] for each in log if "relative_error" in each}
        return {"seed": seed, "right": right, "error": error}

    def start(self, start: Start, folder: Path):
        """Returns a converted student."""
        if self.student is not None:
            return AutoModelForImageTextToText.from_pretrained(self.student, dtype="float32").to(self.device)
        options = {**self.mixer_options, **start.options}
        convert(self.teacher, str(folder), preset=start.preset, mixer_options=options, overwrite=True)
        student = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").to(self.device)
        if start.calibrate:
            size = self.batch_size
            rows = self.train.select(range(min(self.calibration_rows, len(self.train))))
            batches = [
                encode_rows(self.processor, rows.select(range(first, min(first + size, len(rows)))))
                for first in range(0, len(rows), size)
            ]
            for batch in batches:
                batch.pop("labels", None)
            calibrate(student, self.model, batches)
        if start.branch != "both":
            close_branch(student, keep=start.branch)
        return student

    @cached_property
    def pseudo_targets(self) -> Path:
        """Returns the store of the teacher's answers to the training rows, decoded once for all students."""
        name = hashlib.sha256(json.dumps([self.teacher, self.dataset]).encode()).hexdigest()[:16]
        folder = self.output / f"answers-{name}"
        decode_pseudo_targets(
            self.model, self.processor, self.train, folder, max_new_tokens=MAX_ANSWER, batch_size=self.batch_size
        )
        return folder


@torch.no_grad()
def close_branch(student, keep: str) -> None:
    """
    Fixes lambda at 1 (`keep="flex"`) or 0 (`"swin"`) for every token, in place; or the gate of Eq. 3 at 1
    (`"forward"`).
    """
    text = student.model.language_model
    for layer in recurrent_layers(text.config.layer_types):
        mixer = text.layers[layer].mixer
        fusion = (mixer.fusion_proj, getattr(mixer, "text_fusion_proj", None))
        for projection in (mixer.flex_ma.gate_proj,) if keep == "forward" else fusion:
            if projection is not None:
                projection.weight.zero_()
                projection.bias.fill_(-SATURATED if keep == "swin" else SATURATED)
