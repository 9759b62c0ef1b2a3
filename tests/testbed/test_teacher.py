"""The shipped teacher: small, plain Transformers, right on held-out digits; and the data set made for it."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from linmu_hf.testbed.check_teacher import TEACHER, count_right, wilson_interval
from linmu_hf.testbed.data import QUESTIONS_PER_ROW, TASKS, evaluation_rows
from linmu_hf.testbed.make_data import make_data, write_examples
from linmu_hf.testbed.train_teacher import Curriculum, answer_loss, batches


@pytest.fixture(scope="module")
def teacher():
    return AutoModelForImageTextToText.from_pretrained(TEACHER).eval(), AutoProcessor.from_pretrained(TEACHER)


def test_the_teacher_is_plain_and_small():
    program = (
        "import sys, transformers;"
        f"model = transformers.AutoModelForImageTextToText.from_pretrained({str(TEACHER)!r});"
        "assert type(model) is transformers.Qwen2_5_VLForConditionalGeneration;"
        "assert not any(name.startswith('linmu_hf') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert sum(file.stat().st_size for file in TEACHER.iterdir()) <= 8e6
    log = [json.loads(line) for line in (TEACHER / "training_log.jsonl").read_text().splitlines()]
    assert "accuracy" in log[-1]


def test_the_teacher_answers_questions_about_held_out_digits(teacher):
    rows = [row for task in TASKS for row in evaluation_rows(task, 10, seed=7)]
    assert count_right(*teacher, rows, batch_size=20) >= 0.9 * len(rows)


def test_training_loss_equals_the_models_own(teacher):
    model, processor = teacher
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    for batch in next(batches(processor, seed=0, batch_size=6, curriculum=Curriculum())):
        with torch.no_grad():
            tokens = (batch["labels"][:, 1:] != -100).sum()
            torch.testing.assert_close(answer_loss(model, batch) / tokens, model(**batch).loss, rtol=1e-4, atol=1e-5)


def test_the_data_set_has_its_splits_and_pictures(tmp_path):
    dataset = make_data(tmp_path / "data", train=6, test=2)
    assert {name: len(split) for name, split in dataset.items()} == {"train": 6, "test": 2 * len(TASKS)}
    assert all(len(row["messages"]) == 2 * QUESTIONS_PER_ROW for row in dataset["train"])
    assert dataset["test"]["task"][:] == [task for task in TASKS for _ in range(2)]
    assert dataset["test"][0]["images"][0].tobytes() == next(evaluation_rows("cell", 1))["images"][0].tobytes()
    write_examples(tmp_path / "examples")
    assert len(list((tmp_path / "examples").glob("*.png"))) == len(TASKS)


def test_wilson_interval():
    low, high = wilson_interval(95, 100)
    assert low == pytest.approx(0.888, abs=1e-3) and high == pytest.approx(0.978, abs=1e-3)
    assert wilson_interval(10, 10)[1] == 1.0
