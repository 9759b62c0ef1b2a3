"""causal-conv1d in place of our convolution: a stand-in for the package takes what its kernel takes."""

import sys
from types import ModuleType

import pytest
import torch
from torch.nn.functional import conv1d

from linmu_hf.ops import backends
from linmu_hf.ops import self_check as trial
from linmu_hf.ops.backends import ENVIRONMENT
from linmu_hf.ops.conv import causal_conv as module
from linmu_hf.ops.conv.causal_conv import by_causal_conv1d, causal_conv
from linmu_hf.ops.segments import Segments


@pytest.fixture
def calls(monkeypatch):
    """Shapes of x in the calls of `causal_conv1d_fn`."""
    shapes = []

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None):
        b, c, t = x.shape
        assert x.stride(1) == 1 and x.stride(2) % 8 == 0 and weight.shape == (c, weight.shape[1])
        assert c % 8 == 0 and 2 <= weight.shape[1] <= 4 and weight.is_contiguous() and weight.dtype == x.dtype
        assert bias is seq_idx is initial_states is None
        shapes.append((b, t))
        return conv1d(x, weight[:, None], padding=weight.shape[1] - 1, groups=c)[..., :t]

    package = ModuleType("causal_conv1d")
    package.causal_conv1d_fn = causal_conv1d_fn
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    return shapes


@pytest.mark.parametrize("most", [2**31 - 1, 16 * 10 + 5, 16 * 4], ids=["one call", "cut", "token by token"])
@pytest.mark.parametrize("lengths", [(1,), (7, 1, 2, 9)], ids=str)
@pytest.mark.parametrize("tails", [False, True], ids=["from zero", "from tails"])
def test_equals_the_definition(calls, monkeypatch, lengths, tails, most):
    channels, taps = 16, 4
    inputs = [torch.randn(sum(lengths), channels), torch.randn(taps, channels)]
    inputs += [torch.randn(len(lengths), taps - 1, channels)] if tails else []
    x, weight, *tail = (t.double().requires_grad_() for t in inputs)

    def run():
        y, last = causal_conv(x, weight, Segments.build(lengths), *tail)
        loss = (y * torch.arange(y.numel()).view_as(y).sin()).sum() + last.square().sum()
        return [y, last, *torch.autograd.grad(loss, (x, weight, *tail))]

    expected = run()
    assert not calls
    monkeypatch.setattr(module, "LAST_OFFSET", most)
    monkeypatch.setattr(module, "_convolve", by_causal_conv1d)
    torch.testing.assert_close(run(), expected)
    assert all(t * channels <= most for _, t in calls) and (len(calls) == 1 or most < 2**31 - 1)


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    "wanted, works, weight, said",
    [
        ("auto", True, (4, 16), "convolution: causal-conv1d"),
        ("mamba_ssm", True, (4, 16), "convolution: causal-conv1d"),
        ("mamba_ssm", False, (4, 16), "convolution: plain PyTorch, since not here"),
        ("auto", True, (4, 15), "takes 2 to 4 taps and multiples of 8 channels, not 4 and 15"),
        ("auto", True, (5, 16), "takes 2 to 4 taps and multiples of 8 channels, not 5 and 16"),
        ("chunked", True, (4, 16), ""),
    ],
)
def test_choice(calls, monkeypatch, caplog, wanted, works, weight, said):
    """It stands in for our kernels where they do not run, and never for plain PyTorch that was asked for."""
    monkeypatch.setenv(ENVIRONMENT, wanted)
    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.setattr(module, "missing", lambda package, x: None if works else "not here")
    monkeypatch.setattr(module, "failed_trial", lambda device, kernels: None)
    monkeypatch.setattr(module, "kernels_serve", lambda x: False)
    x, weight = torch.randn(9, weight[1]), torch.randn(weight)
    with caplog.at_level("INFO"):
        y, _ = causal_conv(x, weight, Segments.build((9,)))
        assert not calls and not caplog.records
        again = module._convolve(torch.cat([x.new_zeros(len(weight) - 1, x.shape[1]), x]).as_subclass(OnGPU), weight)
    torch.testing.assert_close(again.as_subclass(torch.Tensor), y)
    assert len(calls) == (said == "convolution: causal-conv1d") and said in caplog.text
    assert len(caplog.records) == bool(said)


def test_trial(calls, monkeypatch):
    cpu, right = torch.device("cpu"), by_causal_conv1d

    def tried(kernel):
        monkeypatch.setattr(trial, "_TRIALS", {})
        monkeypatch.setattr(module, "by_causal_conv1d", kernel)
        return trial.failed_trial(cpu, "causal_conv1d")

    assert tried(right) is None
    assert "are wrong on cpu" in tried(lambda x, weight: right(x, weight.flip(0)))
    assert "are wrong on cpu" in tried(lambda x, weight: right(x, weight.detach() + 0 * weight))
