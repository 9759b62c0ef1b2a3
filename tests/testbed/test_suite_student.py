"""The suite's way from teacher to student: its steps and rows, and what it does in which order."""

import json

import pytest

from linmu_hf.testbed.suite import student
from linmu_hf.testbed.suite.data import EVALUATION_SPLITS


def test_a_share_of_the_steps_and_rows():
    whole, tenth = (student.scaled(student.SCHEDULE, factor, 7) for factor in (1.0, 0.1))
    assert whole.train_rows == student.SCHEDULE.train_rows and tenth.train_rows == whole.train_rows // 10
    assert "stage-2.max_steps=140" in tenth.stage_overrides and len(tenth.stage_overrides) == 3
    assert tenth.test_rows_per_task == 7
    least = student.scaled(student.SCHEDULE, 1e-9, 7)
    assert least.stage_overrides == tuple(f"{name}.max_steps=1" for name in student.STEPS)
    assert least.train_rows == least.calibration_rows  # it is calibrated on rows of training


@pytest.mark.parametrize(
    "flags, said",
    [(("--teacher", "none"), "none holds no"), (("--steps_factor", "0"), "factor"), (("--test", "0"), "--test 0")],
)
def test_errors_come_before_work(flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        student.main(["--output", str(tmp_path / "run"), *flags])
    assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tenth_is_a_way_of_its_own(tmp_path, monkeypatch):
    schedules = []

    def walk(output, teacher, schedule):
        schedules.append(schedule)
        output.mkdir()
        return {"splits": {}, "seconds": {}}

    monkeypatch.setattr(student, "walk", walk)
    student.main(["--output", str(tmp_path / "run"), "--steps_factor", "0.1", "--test", "3"])
    assert schedules == [student.scaled(student.SCHEDULE, 0.1, 3)]
    assert (tmp_path / "run" / "results.json").is_file()


def test_the_last_student_is_measured_on_every_split(tmp_path, monkeypatch):
    asked = []

    def evaluate(words):
        asked.append({word: words[i + 1] for i, word in enumerate(words) if word.startswith("--")})
        model = {"name": "student", "tasks": {}}
        (tmp_path / f"{asked[-1]['--split']}.json").write_text(
            json.dumps({"models": [model], "rows": 3, "versions": {"torch": "2"}})
        )

    monkeypatch.setattr(student, "make_data", lambda folder, rows, tests: (tmp_path / "data").mkdir())
    monkeypatch.setattr(student, "convert_and_distil", lambda *arguments: ["init", "first", "last"])
    monkeypatch.setattr(student.evaluation, "main", evaluate)
    results = student.walk(tmp_path, "teacher", student.SCHEDULE)
    assert [(one["--split"], one["--model"]) for one in asked] == [(split, "last") for split in EVALUATION_SPLITS]
    assert list(results["splits"]) == list(EVALUATION_SPLITS) and results["splits"]["seen"]["rows"] == 3
    student.walk(tmp_path, "teacher", student.SCHEDULE)
    assert len(asked) == len(EVALUATION_SPLITS)  # what is finished is skipped
