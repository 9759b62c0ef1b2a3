"""What `make chaos-distill` calls an equal ending: every way to end otherwise is named."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import chaos_distill
from chaos_distill import STAGES, check_end, check_left


def write_model(folder, value):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({"a": torch.full((2,), value), "b": torch.zeros(3)}, folder / "model.safetensors")


@pytest.fixture
def whole(tmp_path):
    """A finished run, as the command leaves it."""
    out = tmp_path / "whole"
    for number, stage in enumerate(STAGES):
        write_model(out / stage, float(number))
    write_model(out, float(len(STAGES) - 1))
    rows = [{"step": 1, "loss": 0.5, "seconds": 3.0}, {"step": 1, "train_loss": 0.5}]
    (out / "training_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


@pytest.fixture
def run(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def test_an_equal_run_has_nothing_wrong(run, whole):
    log = (run / "training_log.jsonl").read_text()
    (run / "training_log.jsonl").write_text(log.replace("3.0", "4.0"))  # it took longer
    assert check_end(run, whole) == check_left(run, whole) == []


def change_a_weight(run):
    write_model(run / STAGES[1], 1.0 + 2**-22)


def publish_an_earlier_stage(run):
    write_model(run, 0.0)


def lose_the_model(run):
    (run / "model.safetensors").write_bytes(b"")


def lose_a_row_of_the_log(run):
    (run / "training_log.jsonl").write_text("")


def leave_a_folder(run):
    (run / "align.running").mkdir()


def leave_a_file_beside_it(run):
    (run.parent / f".{run.name}.lock").touch()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change_a_weight, f"{STAGES[1]} loads with another a"),
        (publish_an_earlier_stage, "run loads with another a"),
        (lose_the_model, "run does not load"),
        (lose_a_row_of_the_log, "the log has other losses"),
        (leave_a_folder, "align.running is there"),
        (leave_a_file_beside_it, ".run.lock is left"),
    ],
)
def test_another_ending_is_named(run, whole, spoil, message):
    spoil(run)
    assert any(message in wrong for wrong in check_end(run, whole)), check_end(run, whole)


def test_a_stage_that_a_kill_left_half_trained_must_not_load(run, whole):
    """As long as it runs its folder is no model; what is finished holds the stage's weights."""
    shutil.rmtree(run)
    (run / f"{STAGES[0]}.running").mkdir(parents=True)
    assert check_left(run, whole) == []
    write_model(run / f"{STAGES[0]}.running", 0.5)
    assert check_left(run, whole) == [f"{STAGES[0]}.running loads with another a"]


def test_a_run_that_hangs_ends_the_tool(monkeypatch):
    monkeypatch.setattr(chaos_distill, "LIMIT", 0.1)
    hanging = subprocess.Popen(["sleep", "60"], start_new_session=True)
    with pytest.raises(TimeoutError, match=re.escape("more than 0.1 s")):
        chaos_distill.wait(hanging.pid)
