"""
A golden trace: the losses of the first ten steps of a tiny distillation, and ten greedy answers of the shipped
student. They guard against silent drift, of ours and of the libraries'. Where a change of the figures is meant,

    python tests/testbed/test_golden.py

writes `golden.json` anew: say in the commit why.
"""

import json
import tempfile
from pathlib import Path

import pytest

import linmu_hf
from linmu_hf.conversion.convert import convert
from linmu_hf.conversion.teacher import load_processor, load_teacher
from linmu_hf.distillation.config import DistillConfig
from linmu_hf.distillation.rows.collator import EncodedDataset
from linmu_hf.distillation.stages import FLEX, SWIN, Stage, set_trainable
from linmu_hf.distillation.trainer import DistillTrainer
from linmu_hf.evaluation.retention import generate_answers
from linmu_hf.testbed.ablations.plans import WINDOWS
from linmu_hf.testbed.data import TASKS, evaluation_rows, training_rows


GOLDEN = Path(__file__).with_name("golden.json")
TESTBED = Path(linmu_hf.__file__).parent / "testbed"
TERMS = ("loss", "loss_hid", "loss_tok", "loss_sup")


def trace_losses(folder: Path) -> dict[str, list[float]]:
    """Converts the shipped teacher and trains ten steps on all losses that need no decoding."""
    convert(TESTBED / "teacher", folder / "init", mixer_options=WINDOWS)
    student = linmu_hf.LinMUForConditionalGeneration.from_pretrained(folder / "init")
    teacher, processor = load_teacher(TESTBED / "teacher"), load_processor(TESTBED / "teacher")
    stage = Stage("golden", (FLEX, SWIN), max_steps=10, learning_rate=1e-3, hid=0.02, tok=0.5, sup=0.5)
    set_trainable(student, stage)
    config = DistillConfig(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = DistillTrainer(student, teacher, config, stage, EncodedDataset(processor, list(training_rows(0, 20))))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return {term: [round(row[term], 6) for row in rows] for term in TERMS}


def answer_questions() -> list[str]:
    model = linmu_hf.LinMUForConditionalGeneration.from_pretrained(TESTBED / "student")
    rows = [row for task in TASKS for row in evaluation_rows(task, 2)]
    return generate_answers(model, load_processor(TESTBED / "student"), rows)


def test_the_first_ten_losses_are_as_ever(tmp_path):
    golden, losses = json.loads(GOLDEN.read_text())["losses"], trace_losses(tmp_path)
    assert len(losses["loss"]) == 10 and losses["loss"][-1] < losses["loss"][0]
    for term in TERMS:
        assert losses[term] == pytest.approx(golden[term], rel=5e-3), f"{term}: see the head of this file"


def test_ten_greedy_answers_are_as_ever():
    assert answer_questions() == json.loads(GOLDEN.read_text())["answers"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        golden = {"losses": trace_losses(Path(folder)), "answers": answer_questions()}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
