"""A single file has no splits: one that is named for it would have no effect, or hold out what is learned from."""

import json

import pytest

from linmu_hf.commands import convert, distill, evaluate, fidelity, pseudo_targets
from linmu_hf.commands.chat import SHIPPED_STUDENT
from linmu_hf.testbed.check_teacher import TEACHERS


STUDENT, TEACHER = f"--model {SHIPPED_STUDENT}", f"--teacher {TEACHERS['qwen']}"
PAIR = f"{STUDENT} {TEACHER}"
# What each command is given, and the split at its end.
COMMANDS = {
    "linmu-convert": (convert, f"{TEACHER} --output_dir OUT --calibrate FILE", "--calibrate_split dev"),
    "linmu-distill": (distill, f"{PAIR} --dataset FILE --output_dir OUT --use_cpu", "--dataset_train_split dev"),
    "linmu-pseudo-targets": (
        pseudo_targets, f"{TEACHER} --dataset FILE --output_dir OUT", "--dataset_train_split dev",
    ),
    "linmu-eval": (evaluate, f"{PAIR} --dataset FILE", "--split test"),
    "linmu-fidelity": (fidelity, f"{PAIR} --dataset FILE --output OUT", "--split test"),
}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    turns = [{"role": "user", "content": "7 or 3 first?"}, {"role": "assistant", "content": "7"}]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": turns, "task": "first"}) + "\n")
    return file


@pytest.mark.parametrize("name", COMMANDS)
def test_a_split_of_a_single_file_is_refused(name, file, tmp_path, capsys):
    command, words, split = COMMANDS[name]
    words = words.replace("FILE", str(file)).replace("OUT", str(tmp_path / "out"))
    assert command.main(f"{words} {split}".split()) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"{name}: error: {split} has no effect: {file} is a single file, which is read whole")
    assert not (tmp_path / "out").exists()


def test_rows_that_are_learned_from_are_not_held_out(file, tmp_path, capsys):
    words = f"{PAIR} --dataset {file} --output_dir {tmp_path / 'out'} --use_cpu --dataset_eval_split test"
    assert distill.main(words.split()) == 2
    assert "all of whose rows are learned from: give the held-out rows as --eval_dataset" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_report_names_no_split(file, tmp_path):
    report = tmp_path / "report.json"
    assert evaluate.main(f"{PAIR} --dataset {file} --json {report}".split()) == 0
    report = json.loads(report.read_text())
    assert report["rows"] == 1 and report["split"] is None


@pytest.mark.parametrize(
    ("command", "words"),
    [(evaluate, f"{STUDENT} --tasks paper"), (fidelity, f"{PAIR} --text {__file__}")],
)
def test_a_split_of_no_dataset_is_refused(command, words, capsys):
    assert command.main(f"{words} --split test".split()) == 2
    assert "--split test has no effect" in capsys.readouterr().err
