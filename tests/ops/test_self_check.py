"""Kernels that fail or answer wrongly on a device are noticed before they are relied on."""

import sys
from functools import partial
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from linmu_hf.ops import self_check
from linmu_hf.ops.ssd.plain import ssd_chunked
from linmu_hf.ops.ssd.scan import ssd_pair


@pytest.fixture
def tried(monkeypatch):
    """What the self-check says of the kernels given: a function in place of `ssd_triton_pair`."""

    def run(kernels):
        module = ModuleType("linmu_hf.ops.ssd.triton")
        module.ssd_triton_pair = kernels
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(self_check, "_RESULTS", {})
        return self_check.failed_self_check("triton", torch.device("cpu"))

    return run


chunked = partial(ssd_pair, backend="chunked")


def test_right_kernels_pass_and_are_tried_once(tried):
    calls = []
    assert tried(lambda *args, **kwargs: calls.append(1) or chunked(*args, **kwargs)) is None
    assert self_check.failed_self_check("triton", torch.device("cpu")) is None and calls == [1]


AROUND = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "default device": partial(torch.device, "meta"),
    "fake tensors": FakeTensorMode,
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_what_is_around_the_first_use_does_not_matter(tried, around):
    """`generate`, for one, runs without gradients."""
    with around():
        assert tried(chunked) is None


@pytest.mark.parametrize("direction", [0, 1])
def test_wrong_values_are_noticed(tried, caplog, direction):
    def wrong(*scans, **kwargs):
        results = list(chunked(*scans, **kwargs))
        y, states = results[direction]
        results[direction] = y * 1.1, states
        return results

    assert "wrong on cpu (relative error 0." in tried(wrong) and "Plain PyTorch takes over" in caplog.text


@pytest.mark.parametrize("direction", [0, 1])
def test_wrong_gradients_are_noticed(tried, direction):
    def wrong(*scans, **kwargs):
        scans = list(scans)
        B = scans[direction].B
        scans[direction] = scans[direction]._replace(B=B.detach() + 0 * B)
        return chunked(*scans, **kwargs)

    assert "wrong on cpu" in tried(wrong)


def test_gradients_that_are_not_a_number_are_noticed(tried):
    """Values are right, and compared first."""

    def wrong(first, second, **kwargs):
        second = second._replace(C=second.C + (0 * second.C).sqrt())
        return chunked(first, second, **kwargs)

    assert "wrong on cpu (relative error nan)" in tried(wrong)


@pytest.mark.parametrize("factor, found", [(1, None), (1.2, "mamba-ssm's kernels are wrong on cpu")])
def test_mamba_ssm_is_compared_too(monkeypatch, factor, found):
    def scan(*args):
        y, states = ssd_chunked(*args)
        return y, states * factor

    comparison = partial(self_check._scans, pair=self_check._pair_by(scan))
    monkeypatch.setitem(self_check._COMPARISONS, "mamba_ssm", ("mamba-ssm's kernels", comparison, 5e-2))
    monkeypatch.setattr(self_check, "_RESULTS", {})
    said = self_check.failed_self_check("mamba_ssm", torch.device("cpu"))
    assert said is None if found is None else said.startswith(found)


def test_a_crash_is_noticed(tried):
    def crash(*args, **kwargs):
        raise RuntimeError("no kernel image is available")

    assert tried(crash) == "the Triton kernels fail on cpu (RuntimeError: no kernel image is available)"


def test_nothing_is_tried_or_remembered_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(self_check, "_RESULTS", {})
    monkeypatch.setattr(self_check, "_compare", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "while a CUDA graph is captured" in self_check.failed_self_check("triton", torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert self_check.failed_self_check("triton", torch.device("cuda:0")) is None


def test_as_a_command(monkeypatch, capsys):
    """What cannot run here is not a fault; what runs and is wrong is."""
    monkeypatch.setattr(self_check, "why_unavailable", lambda name, x: None if name == "triton" else "not here")
    monkeypatch.setattr(self_check, "why_unfit", lambda name, x: "not here")
    monkeypatch.setattr(self_check.logger, "disabled", False)
    for said, status in ((None, 0), ("wrong on cpu", 1)):
        monkeypatch.setattr(self_check, "failed_self_check", lambda name, device, said=said: said)
        with pytest.raises(SystemExit) as stopped:
            self_check.main(["--device", "cpu"])
        assert stopped.value.code == status
        shown = capsys.readouterr().out
        assert (said or "right on cpu") in shown and shown.count("not here") == 3
