"""Kernels that fail or answer wrongly on a device are noticed before they are relied on."""

import sys
from types import ModuleType

import pytest
import torch

from linmu_hf.ops import trial
from linmu_hf.ops.ssd_torch import ssd_chunked


@pytest.fixture
def tried(monkeypatch):
    """What a trial says of the kernels given: a function in place of `ssd_triton`."""

    def run(kernels):
        module = ModuleType("linmu_hf.ops.ssd_triton")
        module.ssd_triton = kernels
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(trial, "_TRIALS", {})
        return trial.failed_trial(torch.device("cpu"))

    return run


def test_right_kernels_pass_and_are_tried_once(tried):
    calls = []
    assert tried(lambda *args: calls.append(1) or ssd_chunked(*args)) is None
    assert trial.failed_trial(torch.device("cpu")) is None and calls == [1]


def test_wrong_values_are_noticed(tried, caplog):
    def wrong(*args):
        y, states = ssd_chunked(*args)
        return y * 1.1, states

    assert "wrong on cpu (relative error 0." in tried(wrong) and "Plain PyTorch takes over" in caplog.text


def test_wrong_gradients_are_noticed(tried):
    def wrong(x, dt, A, B, C, *rest):
        return ssd_chunked(x, dt, A, B.detach() + 0 * B, C, *rest)

    assert "wrong on cpu" in tried(wrong)


def test_a_crash_is_noticed(tried):
    def crash(*args):
        raise RuntimeError("no kernel image is available")

    assert tried(crash) == "the Triton kernels fail on cpu (RuntimeError: no kernel image is available)"
