"""The adapter to mamba-ssm over that package's own kernels, run in Python by Triton's interpreter.

Run with `make kernels-check`, which brings the package. Its kernels ask for a CUDA device; stand-ins answer.
"""

import importlib.util
import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from scans import HEADS, assert_same, make, run

from linmu_hf.ops import self_check
from linmu_hf.ops.ssd.mamba_ssm import ssd_mamba_ssm
from linmu_hf.ops.ssd.plain import ssd_recurrence


if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("mamba_ssm") is None:
    raise RuntimeError("these tests run mamba-ssm in Triton's interpreter: make kernels-check")


@pytest.fixture(autouse=True)
def device_without_cuda(monkeypatch):
    monkeypatch.setenv("MAMBA_DETERMINISTIC", "1")  # no autotuning, which would measure times
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    properties = SimpleNamespace(total_memory=2**33, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)


def test_self_check():
    assert self_check._compare("mamba_ssm", torch.device("cpu")) is None


@pytest.mark.parametrize("heads, states", [("s = h", False), ("g < s < h", True)])
def test_adapter(heads, states):
    lengths = (130, 3, 130)
    inputs = make(lengths, HEADS[heads], states=states)
    low = {name: tensor.detach().float().requires_grad_() for name, tensor in inputs.items()}
    actual = {name: value.double() for name, value in run(ssd_mamba_ssm, low, lengths).items()}
    assert_same(actual, run(ssd_recurrence, inputs, lengths), rtol=1e-5)
