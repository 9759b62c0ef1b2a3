"""
Two real processes on CPUs end where one ends: DDP, FSDP2, killed and resumed on another number of them; ZeRO-2 and 3,
where DeepSpeed is installed (`make zero-check`).
"""

import json
import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import distil_worker
import pytest
import torch
from distillation_fixtures import save_pair
from forked import ENVIRONMENT, run_forked
from safetensors.torch import load_file

from linmu_hf.distillation.engines import processes
from linmu_hf.distillation.targets.fill import decode_pseudo_targets


CONFIGS = Path(__file__).parents[3] / "examples" / "accelerate_configs"
STAGES = ("align", "fed", "lora")
WHOLE, ELSEWHERE = ("Tensor", "torch.float32"), ("elsewhere", "torch.float32")  # what trains, between steps
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed: make zero-check")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, processor, rows, make_student, make_teacher):
    """Student, teacher, and rows of which one has text alone: a process may have nothing else in its batch."""
    folder = tmp_path_factory.mktemp("processes")
    save_pair(folder, processor, make_student(), make_teacher())
    text = {"messages": [{"role": "user", "content": "row 1?"}, {"role": "assistant", "content": "3"}]}
    torch.save([*rows, {**text, "images": [], "videos": []}], folder / "rows.pt")
    return folder


def start(folder, out, *options, processes=2, config=None):
    """Runs the worker, in processes of one's own or by accelerate with a configuration that is shipped."""
    words = [str(word) for word in (folder, out, *options)]
    if config is None:
        return run_forked(distil_worker.main, words, processes)
    given = ("--num_processes", str(processes), "--mixed_precision", "no", "--main_process_port", "0")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml"), *given]
    return subprocess.run(
        [sys.executable, *launcher, distil_worker.__file__, *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | ENVIRONMENT,
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


@pytest.mark.parametrize(("config", "kind"), [("ddp", "Tensor"), ("fsdp2", "DTensor")])
def test_two_processes_of_accelerate_end_like_one(folder, one, tmp_path, config, kind):
    done = start(folder, tmp_path / "out", "--batch", 2, config=config)
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


@pytest.mark.parametrize(
    "options",
    [(), ("--fsdp",), pytest.param(("--zero", 3), marks=needs_deepspeed)],
    ids=["ddp", "fsdp2", "zero 3"],
)
def test_the_weights_of_an_evaluation_come_back(folder, tmp_path, options):
    """By the largest held-out loss, which is not that of the last step."""
    alone, both = tmp_path / "one", tmp_path / "two"
    assert "in 6 steps" in start(folder, alone, "--plain", "--stages", 2, "--worst", processes=1).stdout
    done = start(folder, both, "--plain", "--stages", 2, "--worst", "--batch", 2, *options)
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


@pytest.fixture(scope="module")
def with_bad_rows(folder, rows, processor, make_teacher):
    """Two rows, two whose picture ends in the middle, which its size does not tell, and stored log-probabilities."""
    picture = folder / "damaged.png"
    rows[0]["images"][0].save(picture)
    picture.write_bytes(picture.read_bytes()[: picture.stat().st_size // 2])
    bad = [{**row, "images": [str(picture)] * len(row["images"])} for row in rows[:2]]
    torch.save([*rows[:2], *bad], folder / "bad.pt")
    decode_pseudo_targets(make_teacher(), processor, rows[:2], folder / "topk", max_new_tokens=4, top_k=8)
    return folder


def test_a_process_without_a_readable_row_asks_the_teacher_for_nothing_either(with_bad_rows, tmp_path):
    """The first process has both rows of every step; with FSDP2 each would wait for the other."""
    options = ("--rows", "bad", "--max_bad_rows", 2, "--topk")
    done = start(with_bad_rows, tmp_path / "one", *options, processes=1)
    assert "in 2 steps of 1 processes" in done.stdout, done.stderr
    done = start(with_bad_rows, tmp_path / "two", *options, "--batch", 2, "--fsdp")
    assert "in 2 steps of 2 processes" in done.stdout, done.stderr
    assert_equal_runs(tmp_path / "one", tmp_path / "two", ["topk"])


def test_bad_rows_of_all_processes_count(with_bad_rows, tmp_path):
    """Each process meets one in the second step."""
    done = start(with_bad_rows, tmp_path, "--rows", "bad", "--max_bad_rows", 1, "--stages", 1, "--batch", 1)
    assert done.returncode and "2 rows cannot be read, and max_bad_rows=1: rows 2, 3" in done.stderr


def test_other_settings_are_refused_by_all_processes_at_once(folder, tmp_path):
    out = tmp_path / "out"
    assert not start(folder, out, "--batch", 2, "--stages", 1).returncode
    done = start(folder, out, "--batch", 2, "--stages", 1, "--temperature", 2)
    assert done.returncode and "temperature was 1.0, now 2.0" in done.stderr and "Traceback" not in done.stdout


@pytest.fixture(scope="module")
def one_by_adamw(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("adamw") / "out"
    done = start(folder, out, "--plain", processes=1)
    assert "in 9 steps of 1 processes" in done.stdout, done.stderr
    return out


@needs_deepspeed
@pytest.mark.parametrize(("config", "kinds"), [("zero2", [WHOLE]), ("zero3", [WHOLE, ELSEWHERE])])
def test_two_processes_of_zero_end_like_one(folder, one_by_adamw, tmp_path, config, kinds):
    """Parameters that are as small as these DeepSpeed does not spread again after the first step."""
    done = start(folder, tmp_path / "out", "--plain", "--batch", 2, config=config)
    assert f"trained {kinds} in 9 steps of 2 processes" in done.stdout, done.stderr
    assert_equal_runs(one_by_adamw, tmp_path / "out")


@needs_deepspeed
@pytest.mark.parametrize(
    ("steps", "kinds", "options"),
    [
        (18, [WHOLE, ELSEWHERE], ("--batch", 1, "--accumulate", 2, "--thrifty")),
        (9, [ELSEWHERE], ("--batch", 2, "--separate")),
    ],
    ids=["thrifty", "separate"],
)
def test_zero_3_does_the_same_whatever_the_processes_call(folder, one_by_adamw, tmp_path, steps, kinds, options):
    """
    One of them has a row of text alone, and fewer answers than the other, so that it calls the heads less often. What
    trains is elsewhere between steps; between the micro-batches of one, some of it may stay.
    """
    done = start(folder, tmp_path, "--plain", "--zero", 3, *options)
    assert f"trained {kinds} in {steps} steps of 2 processes" in done.stdout, done.stderr
    assert_equal_runs(one_by_adamw, tmp_path)


@needs_deepspeed
@pytest.mark.parametrize(
    ("step", "first", "second"),
    [
        (3, (2, "--zero", 2), (4,)),
        (8, (4,), (1, "--accumulate", 2, "--zero", 2)),
        (6, (2, "--zero", 2), (2, "--zero", 2)),
        (3, (2, "--zero", 3), (4,)),
        (8, (2, "--zero", 2), (1, "--accumulate", 2, "--zero", 3)),
        (6, (2, "--zero", 3), (2, "--zero", 3)),
    ],
    ids=["2 to one", "one to 2", "2 to 2", "3 to one", "2 to 3", "3 to 3"],
)
def test_a_run_goes_on_with_zero_or_without(folder, one_by_adamw, tmp_path, step, first, second):
    def go_on(batch, *options):
        return start(
            folder, tmp_path, "--plain", "--batch", batch, *options, processes=2 if "--zero" in options else 1
        )

    assert go_on(*first, "--die", step).returncode
    done = go_on(*second)
    assert "steps of" in done.stdout, done.stderr
    assert_equal_runs(one_by_adamw, tmp_path)


@needs_deepspeed
@pytest.mark.parametrize(("stage", "kind"), [(2, WHOLE), (3, ELSEWHERE)])
def test_zero_in_bf16_keeps_trained_parameters_in_float32(folder, one_by_adamw, tmp_path, stage, kind):
    """Close to the run of one process in bf16, not to that in float32."""
    for out, options, count in (("one", (), 1), ("two", ("--batch", 2, "--zero", stage), 2)):
        kinds = [kind if options else WHOLE]
        done = start(folder, tmp_path / out, "--plain", "--stages", 1, "--bf16", *options, processes=count)
        assert f"trained {kinds} in 3 steps of {count} processes" in done.stdout, done.stderr
    one, two, exact = (
        json.loads((out / "training_log.jsonl").open().readline())["loss_hid"]
        for out in (tmp_path / "one", tmp_path / "two", one_by_adamw)
    )
    assert abs(two - one) < abs(two - exact) / 4


def test_an_error_that_cannot_be_pickled_still_names_itself():
    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(one)

    assert str(processes._portable(Odd("what", 2))) == "Odd: what"
