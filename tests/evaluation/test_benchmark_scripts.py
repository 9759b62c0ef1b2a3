"""The scripts under benchmarks: what they find out and what they survive, not how fast anything is."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from linmu_hf.ops.ssd import scan as ssd_module
from linmu_hf.ops.ssd.plain import ssd_chunked


FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def run_correctness(monkeypatch, tmp_path, *backends):
    import correctness

    monkeypatch.setattr(correctness, "SHAPES", {"one": (4, 2, 1, 8, 8)})
    file = tmp_path / "correctness.json"
    arguments = ["correctness.py", "--device", "cpu", "--json", str(file), "--backends", *backends]
    monkeypatch.setattr(sys, "argv", arguments)
    try:
        correctness.main()
        message = None
    except SystemExit as stopped:
        message = stopped.code
    return json.loads(file.read_text())["backends"], message


def test_right_backends_are_found_right_and_missing_ones_are_named(monkeypatch, tmp_path):
    found, message = run_correctness(monkeypatch, tmp_path, "chunked", "abacus")
    assert message is None
    assert found["chunked"]["float32"]["right"] and found["chunked"]["bfloat16"]["right"]
    assert set(found["chunked"]["float32"]["errors"]) == {"y", "states", "d x", "d dt", "d A", "d B", "d C"}
    assert found["chunked"]["float32"]["errors"]["y"] < 1e-4
    assert "abacus" in found["abacus"]["float32"]["failure"] and "right" not in found["abacus"]["float32"]


@pytest.mark.parametrize("fault", ["values", "gradients"])
def test_a_wrong_backend_is_found_out(monkeypatch, tmp_path, fault):
    def wrong(x, *args):
        y, states = ssd_chunked(x, *args)
        return (y * 1.1 if fault == "values" else y + 0.1 * (y - y.detach())), states

    monkeypatch.setitem(ssd_module.PLAIN, "chunked", wrong)
    found, message = run_correctness(monkeypatch, tmp_path, "recurrence", "chunked")
    assert message == "wrong: chunked in float32, chunked in bfloat16"
    assert found["recurrence"]["float32"]["right"] and not found["chunked"]["float32"]["right"]


@pytest.mark.parametrize("backward", [False, True])
def test_operations_that_cannot_run_are_listed_with_the_reason(backward):
    import ops

    arguments = argparse.Namespace(
        shape="small", backends=["auto", "abacus"], backward=backward, dtype="float32", device="cpu", repeats=1,
        peaks={"operations_per_s": 1e6, "bytes_per_s": 1e6},
    )  # fmt: skip
    results = ops.measure(20, arguments)
    assert set(results) == {"sdpa", "fla", "ssd auto", "ssd abacus", "ssd both directions", "mamba_ssm direct"}
    auto = results["ssd auto"]
    assert auto["of_roofline"] == auto["roofline_s"] / auto["seconds"] > 0
    assert "need a GPU" in results["ssd both directions"]["error"]
    assert "mamba_ssm" in results["mamba_ssm direct"]["error"]
    assert results["sdpa"]["seconds"] > 0 and results["ssd auto"]["seconds"] > 0
    assert "abacus" in results["ssd abacus"]["error"]


@pytest.mark.parametrize("backward", [False, True])
def test_what_stands_beside_a_scan_is_measured_too(backward):
    import around_scan

    arguments = argparse.Namespace(shape="small", backward=backward, dtype="float32", device="cpu", repeats=1)
    results = around_scan.measure(512, arguments)
    runs = {name for name, result in results.items() if "seconds" in result}
    assert runs == {"convolution: pytorch", "windows: sdpa", "windows, shifted: sdpa"}
    assert all(results[name]["plain_over_this"] == 1 for name in runs)
    errors = " ".join(result["error"] for name, result in results.items() if name not in runs)
    assert "No module named 'causal_conv1d'" in errors and "flash_attn is not installed" in errors
    assert "x is torch.float32, and the kernels take float16 or bfloat16" in errors


def test_the_least_work_of_an_operation():
    """Counted by hand for one token more: a scan pays the same for every token, attention for all before it."""
    import ops

    shape = (4, 2, 1, 8, 16, False)
    for name, growth in (("ssd auto", 2.0), ("sdpa", 4.0)):
        (once, moved), (twice, more) = (ops.least_work(name, t, shape, torch.bfloat16, False) for t in (64, 128))
        assert twice / once == growth and more / moved == 2.0
    operations, moved = ops.least_work("ssd auto", 1, shape, torch.bfloat16, False)
    assert operations == 2 * 4 * (64 * 24 / 2 + 128) + 2 * 2 * 128
    assert moved == 2 * (8 + 16 + 4 * (16 + 8) + 2)
    assert ops.least_work(ops.BOTH, 1, shape, torch.bfloat16, True)[0] == 6 * operations


def test_the_operations_compared_have_the_same_heads():
    import ops

    for name, (h, s, g, p, *_) in ops.SHAPES.items():
        scan, inputs = ops.scan(20, ops.SHAPES[name], "chunked", torch.float32, "cpu", True)
        attention, _ = ops.attention(20, ops.SHAPES[name], torch.float32, "cpu", True)
        assert scan().shape == (20, h, p) and attention().shape == (1, h, 20, p)
        assert inputs[0].shape[1] == g and inputs[1].shape[1] == s
        assert all(tensor.requires_grad for tensor in inputs)


def test_the_report_holds_what_there_is_and_why_the_rest_is_missing(tmp_path):
    from merge_report import merge

    (tmp_path / "good.log").write_text("")
    (tmp_path / "good.json").write_text(json.dumps({"rows": [1], "machine": {"gpu": "x"}, "versions": {"torch": "2"}}))
    (tmp_path / "tests.log").write_text("...\n3 passed\n\n")
    (tmp_path / "broken.log").write_text("Traceback")
    (tmp_path / "broken.failed").write_text("exit status 124: late\n")
    (tmp_path / "skipped.failed").write_text("no time left\n")
    assert merge(tmp_path) == {
        "steps": {"good": {"rows": [1]}, "tests": {"says": "3 passed"}},
        "failed": {"broken": "exit status 124: late", "skipped": "no time left"},
        "machine": {"gpu": "x"},
        "versions": {"torch": "2"},
    }


def report(*arguments, **environment):
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run([FOLDER / "gpu_report.sh", *arguments], env=environment, capture_output=True, text=True)


def test_a_report_without_time_names_every_step(tmp_path):
    finished = report("--dry-run", MINUTES="0", OUTPUT=str(tmp_path))
    assert finished.returncode == 1, finished.stderr  # nothing is known to be right
    [file] = tmp_path.iterdir()
    assert file.name.endswith("-dry-run.json")
    failed = json.loads(file.read_text())["failed"]
    steps = {"correctness", "tests", "graphs", "ops-forward", "ops-backward", "around-scan"}
    assert steps | {"decoder", "ablation", "long"} < set(failed)
    assert set(failed.values()) == {"no time left"}


def test_the_report_refuses_an_unknown_option():
    finished = report("--fast")
    assert finished.returncode == 2
    assert finished.stderr == "gpu_report.sh: error: --fast is unknown: give --dry-run or nothing\n"
