"""A teacher whose tokens have other numbers than the student's is refused by every command that takes the two."""

import json
import shutil

import pytest

from linmu_hf.commands import distill, fidelity, pseudo_targets


@pytest.fixture
def other_order(teacher_folder, tmp_path):
    """The teacher, with as many tokens, two of them exchanged."""
    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[3], list(vocab)[20]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize(
    ("main", "student", "more"),
    [
        (
            distill.main,
            "--model",
            ["--output_dir", "out", "--stage_overrides", "all.max_steps=1", "--use_cpu", "True"],
        ),
        (pseudo_targets.main, "--processor", ["--output_dir", "out", "--dataset_train_split", "test"]),
        (fidelity.main, "--model", ["--output", "out"]),
    ],
)
def test_another_order_of_tokens_is_refused(
    other_order, student_folder, dataset_folder, tmp_path, monkeypatch, capsys, main, student, more
):
    monkeypatch.chdir(tmp_path)
    words = ["--teacher", other_order, student, student_folder, "--dataset", dataset_folder, *more]
    assert main([str(word) for word in words]) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()  # after bars
    assert "token 3 is" in error and "for the student and" in error
    assert not (tmp_path / "out").exists()
