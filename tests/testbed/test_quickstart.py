import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from linmu_hf.testbed import nvila, quickstart
from linmu_hf.testbed.data import TASKS
from linmu_hf.testbed.processor import build_processor
from linmu_hf.testbed.qwen2_5_vl import teacher_config


TINY = replace(
    quickstart.QUICK,
    train_rows=16,
    test_rows_per_task=2,
    calibration_rows=4,
    batch_size=4,
    stage_overrides=("all.max_steps=1",),
)


TINY_NVILA = replace(
    TINY,
    sizes="test",
    recipe="default",
    stage_overrides=("all.max_steps=1", "stage-3.seq=0"),
    arguments=(),
)


@pytest.fixture
def way(tmp_path):
    return lambda settings: quickstart.Way(tmp_path / "run", settings)


def test_finished_parts_are_skipped(way):
    done = []
    for _ in range(2):
        run = way({"steps": (1, 2)})
        run.run("data", lambda: done.append("data"))
        run.run("convert", lambda: done.append("convert"))
    assert done == ["data", "convert"]
    assert set(run.seconds) == {"data", "convert"}


def test_an_interrupted_part_is_run_again(way):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        way({}).run("data", interrupted)
    done = []
    way({}).run("data", lambda: done.append("data"))
    assert done == ["data"]


def test_other_settings_are_refused(way):
    way({"steps": 1})
    with pytest.raises(ValueError, match="other settings"):
        way({"steps": 2})


def test_missing_teacher_is_one_line(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        quickstart.main(["--output", str(tmp_path / "run"), "--teacher", str(tmp_path / "none")])
    assert "there is no teacher" in stopped.value.code


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["qwen", "nvila"])
def test_teachers_go_by_name_and_have_schedules_of_their_own(tmp_path, monkeypatch, name, full):
    asked = []
    monkeypatch.setattr(quickstart, "walk", lambda *arguments: asked.append(arguments) or sys.exit(0))
    with pytest.raises(SystemExit):
        quickstart.main(["--output", str(tmp_path), "--teacher", name, *(["--full"] if full else [])])
    schedules = {
        ("qwen", False): quickstart.QUICK,
        ("qwen", True): quickstart.FULL,
        ("nvila", False): quickstart.NVILA_QUICK,
        ("nvila", True): quickstart.NVILA_FULL,
    }
    assert asked == [(tmp_path, str(quickstart.TEACHERS[name]), schedules[name, full])]
    sizes = {"qwen": ("teacher", "wide"), "nvila": ("test", "test")}
    assert schedules[name, full].sizes == sizes[name][full]


def test_the_way_of_nvila(tmp_path, monkeypatch):
    processor = nvila.build_processor()
    nvila.save_checkpoint(nvila.build_model(processor), processor, tmp_path / "teacher")
    monkeypatch.setattr(quickstart, "NVILA_QUICK", TINY_NVILA)
    quickstart.main(["--output", str(tmp_path / "run"), "--teacher", str(tmp_path / "teacher")])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["models"]) == ["teacher", "init", "stage-1", "stage-2", "stage-3"]
    assert (tmp_path / "run" / "answers.png").stat().st_size > 10_000
    shutil.rmtree(tmp_path / "run")


def test_the_whole_way_with_an_interruption(tmp_path, monkeypatch, capsys):
    processor = build_processor()
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(teacher_config(processor.tokenizer)).save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    monkeypatch.setattr(quickstart, "QUICK", TINY)
    arguments = ["--output", str(tmp_path / "run"), "--teacher", str(tmp_path / "teacher")]

    def killed(argv):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quickstart.evaluation, "main", killed)
        quickstart.main(arguments)
    distilled = (tmp_path / "run" / "student" / "model.safetensors").stat().st_mtime_ns
    quickstart.main(arguments)
    assert (tmp_path / "run" / "student" / "model.safetensors").stat().st_mtime_ns == distilled

    printed = capsys.readouterr().out
    assert "== distil: finished before" in printed
    assert "$ linmu-eval --model" in printed
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["models"]) == ["teacher", "init", "stage-2", "stage-3"]
    assert results["rows"] == 2 * len(TASKS)
    assert set(results["seconds"]) == {"data", "convert", "distil", "evaluate", "pictures", "total"}
    assert results["versions"]["torch"]
    for name in ("curves.png", "answers.png"):
        assert (tmp_path / "run" / name).stat().st_size > 10_000
    picture = tmp_path / "run" / "picture.png"
    assert f"linmu-chat --model {tmp_path / 'run' / 'student'} --image {picture}" in printed and picture.is_file()
    shutil.rmtree(tmp_path / "run")
