"""`linmu-fidelity` writes its report and maps, and says in one line what is wrong."""

import json

import pytest

from linmu_hf.commands import fidelity as cli


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_rows(teacher_folder, student_folder, dataset_folder, tmp_path, capsys):
    output = tmp_path / "out"
    assert run("--model", student_folder, "--teacher", teacher_folder, "--dataset", dataset_folder, "--limit", 1,
               "--output", output) == 0  # fmt: skip
    report = json.loads((output / "fidelity.json").read_text())
    assert report["sequences"] == 5 and len(report["layers"]) == 2
    assert {file.name for file in output.iterdir()} == {
        "fidelity.json", "errors.png", "attention.png", "branches.png", "logits.png",
    }  # fmt: skip
    assert "video tokens" in capsys.readouterr().out


def test_text(teacher_folder, student_folder, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("which digit is in row 0 column 1? " * 20)
    given = ("--model", student_folder, "--teacher", teacher_folder, "--text", file, "--output", tmp_path / "out")
    assert run(*given, "--max_length", 32, "--limit", 3) == 0
    report = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert (report["sequences"], report["tokens"]) == (3, 96)
    assert list(report["logits"]["kind"]) == ["text"] and report["logits"]["from_vision"] == {}


ANSWER = {"role": "assistant", "content": "7"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "none.txt"}, "--text none.txt is not there"),
        ({"dataset": "none"}, "there is no folder none"),
        ({"dataset": "rows", "max_length": 8}, "--max_length 8 has no effect on rows"),
        ({"dataset": "rows", "limit": 0}, "--limit 0 must be at least 1"),
        ({"dataset": "rows", "model": "teacher"}, "is no LinMU model"),
        ({"dataset": "rows", "output": "/proc/fidelity"}, "--output /proc/fidelity.json cannot be written"),
        ({"text": "latin"}, "no text in UTF-8 (invalid continuation byte at byte 3): convert it"),
        ({"dataset": "bad"}, "row 1 ('what?') asks for 1 images in its messages but has 0"),
        ({"dataset": "rows", "teacher": "student"}, "give the model that the student is made of"),
    ],
)
def test_errors(teacher_folder, student_folder, dataset_folder, tmp_path, capsys, changes, message):
    latin, bad = tmp_path / "latin.txt", tmp_path / "bad.jsonl"
    latin.write_bytes("café au lait".encode("latin-1"))
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    rows = [[{"role": "user", "content": "7?"}], [question]]
    bad.write_text("".join(f"{json.dumps({'messages': [*turns, ANSWER]})}\n" for turns in rows))
    folders = {
        "teacher": teacher_folder,
        "student": student_folder,
        "rows": dataset_folder,
        "latin": latin,
        "bad": bad,
    }
    values = {"model": "student", "teacher": "teacher", "output": tmp_path / "out", **changes}
    words = [word for name, value in values.items() for word in (f"--{name}", folders.get(value, value))]
    assert run(*words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]  # after what `datasets` says of its progress
    assert message in error and "linmu-fidelity: error: " in error
    assert not (tmp_path / "out").exists()
