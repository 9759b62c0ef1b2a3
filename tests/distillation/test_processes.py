"""Two real processes on CPUs end where one ends: DDP, FSDP2, killed and resumed on another number of them."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import linmu_hf
from linmu_hf.distillation import processes


WORKER = Path(__file__).parents[1] / "helpers" / "distil_worker.py"
STAGES = ("align", "fed", "lora")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor, rows, make_student, make_teacher):
    """Student, teacher, and rows of which one has text alone: a process may have nothing else in its batch."""
    folder = tmp_path_factory.mktemp("processes")
    for name, model in (("student", make_student()), ("teacher", make_teacher())):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    text = {"messages": [{"role": "user", "content": "row 1?"}, {"role": "assistant", "content": "3"}]}
    torch.save([*rows, {**text, "images": [], "videos": []}], folder / "rows.pt")
    return folder


def start(folder, out, *options, processes=2):
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    )
    return subprocess.run(
        [sys.executable, *launcher, str(WORKER), str(folder), str(out), *map(str, options)],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": str(Path(linmu_hf.__file__).parents[1]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture(scope="module")
def one(folder, tmp_path_factory):
    """The run of one process."""
    out = tmp_path_factory.mktemp("one") / "out"
    done = start(folder, out, processes=1)
    assert "in 9 steps of 1 processes" in done.stdout, done.stderr
    return out


def assert_equal_runs(one, other, stages=STAGES):
    for stage in stages:
        expected, found = (load_file(out / stage / "model.safetensors") for out in (one, other))
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-5, atol=1e-5, msg=partial("{} {}: {}".format, stage, name)
            )
    logs = [[json.loads(line) for line in (out / "training_log.jsonl").open()] for out in (one, other)]
    for row, same in zip(*logs, strict=True):
        for key in row.keys() & same.keys():
            if key.startswith(
                ("loss", "relative_error", "agreement", "grad_norm", "eval_loss", "eval_relative", "best_step")
            ):
                assert same[key] == pytest.approx(row[key], rel=1e-4, abs=1e-6), (key, row, same)


@pytest.mark.parametrize(("options", "kind"), [((), "Tensor"), (("--fsdp",), "DTensor")], ids=["ddp", "fsdp2"])
def test_two_processes_end_like_one(folder, one, tmp_path, options, kind):
    done = start(folder, tmp_path / "out", "--batch", 2, *options)
    assert f"trained [('{kind}', 'torch.float32')] in 9 steps of 2 processes" in done.stdout, done.stderr
    assert_equal_runs(one, tmp_path / "out")


@pytest.mark.parametrize(("step", "before", "after"), [(3, True, False), (8, False, True)])
def test_a_run_goes_on_with_another_number_of_processes(folder, one, tmp_path, step, before, after):
    """Killed while aligning or with adapters in place, with a checkpoint before; sharded before or after."""
    out = tmp_path / "out"
    first, second = (["--fsdp"] if sharded else [] for sharded in (before, after))
    if before:
        assert start(folder, out, "--batch", 2, "--die", step, *first).returncode
        done = start(folder, out, processes=1)
    else:
        assert start(folder, out, "--die", step, processes=1).returncode
        done = start(folder, out, "--batch", 1, "--accumulate", 2, *second)
    assert "steps of" in done.stdout, done.stderr
    assert_equal_runs(one, out)


@pytest.mark.parametrize("options", [(), ("--fsdp",)], ids=["ddp", "fsdp2"])
def test_the_weights_of_an_evaluation_come_back(folder, tmp_path, options):
    """By the largest held-out loss, which is not that of the last step."""
    alone, both = tmp_path / "one", tmp_path / "two"
    assert "in 6 steps" in start(folder, alone, "--stages", 2, "--worst", processes=1).stdout
    done = start(folder, both, "--stages", 2, "--worst", "--batch", 2, *options)
    assert "in 6 steps of 2 processes" in done.stdout, done.stderr
    assert_equal_runs(alone, both, STAGES[:2])
    rows = [json.loads(line) for line in (both / "training_log.jsonl").open()]
    assert [row["best_step"] for row in rows if "best_step" in row] != [3, 3]


def test_two_processes_learn_from_the_answers_of_one(folder, tmp_path):
    """A row's draws depend on its place in the step, wherever it is answered; their number on nothing known before."""
    alone, both = tmp_path / "one", tmp_path / "two"
    assert "in 3 steps of 1 processes" in start(folder, alone, "--own", processes=1).stdout
    done = start(folder, both, "--own", "--batch", 1, "--accumulate", 2)
    assert "in 6 steps of 2 processes" in done.stdout, done.stderr
    assert_equal_runs(alone, both, ("own",))
    done = start(folder, tmp_path / "three", "--own", "--batch", 2, "--fsdp")
    assert "refused: own: lmbda=0.75 lets the student generate" in done.stderr and not (tmp_path / "three").exists()


def test_other_settings_are_refused_by_all_processes_at_once(folder, tmp_path):
    out = tmp_path / "out"
    assert not start(folder, out, "--batch", 2, "--stages", 1).returncode
    done = start(folder, out, "--batch", 2, "--stages", 1, "--temperature", 2)
    assert done.returncode and "temperature was 1.0, now 2.0" in done.stderr and "Traceback" not in done.stdout


def test_an_error_that_cannot_be_pickled_still_names_itself():
    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(one)

    assert str(processes._portable(Odd("what", 2))) == "Odd: what"
