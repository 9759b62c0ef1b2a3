"""Attention of many short sequences in one call: the two kernels that do it, and which of them is chosen."""

import inspect
import sys

import pytest
import torch
import varlen_kernels
from windows import by_window, naive

from linmu_hf.ops import backends, self_check
from linmu_hf.ops.attention import varlen as module
from linmu_hf.ops.attention import window as windows
from linmu_hf.ops.attention.varlen import PACKAGES, varlen_attention
from linmu_hf.ops.attention.window import choose_window_backend
from linmu_hf.ops.backends import use_kernels


class OnGPU:
    is_cuda, device, dtype, shape = True, torch.device("cuda:0"), torch.bfloat16, (5, 2, 64)


@pytest.fixture
def installed(monkeypatch):
    """All packages import; nothing was tried or said yet."""
    monkeypatch.setattr(backends, "_import_error", lambda package: None)
    monkeypatch.setattr(backends, "_logged", set())
    monkeypatch.setattr(windows, "failed_self_check", lambda kernels, device: None)


@pytest.mark.parametrize("kernel", [*PACKAGES, "torch_varlen 2.11"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_windows_by_a_kernel(monkeypatch, kernel, heads):
    calls = varlen_kernels.install(monkeypatch, kernel)
    monkeypatch.setattr(windows, "choose_window_backend", lambda q: kernel.split()[0])
    window = [2, 0, 1, 1, 0, 1, 1]
    h, g = heads
    q, k, v = (torch.randn(len(window), count, 8, dtype=torch.float64, requires_grad=True) for count in (h, g, g))
    order, sizes, offsets = by_window(window)
    y = windows.window_attention(*(t[order] for t in (q, k, v)), sizes, offsets)
    expected = naive(q, k, v, window)[order]
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    for grad, right in zip(*(torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (y, expected))):
        torch.testing.assert_close(grad, right)
    assert calls == [q.shape]


@pytest.mark.parametrize("backend", PACKAGES)
def test_compiled_whole(monkeypatch, backend):
    """What it takes to choose does not break the graph; the kernels themselves are operators that it holds."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.10 or later has it")

    varlen_kernels.install(monkeypatch, "flash_attn")
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", lambda q, k, v, *args, **options: q + k)
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v, *args, window_size, scale: q - k)
    monkeypatch.setattr(module, "why_unavailable", lambda *args: None)
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 7, 2, 8)
    _, sizes, offsets = by_window([2, 0, 1, 1, 0, 1, 1])
    compiled = torch.compile(windows.window_attention, fullgraph=True, backend="eager")
    with use_kernels(window=backend):
        y = compiled(q, k, v, sizes, offsets)
    torch.testing.assert_close(y, q + k if backend == "flash_attn" else q - k)


@pytest.mark.parametrize("backend", PACKAGES)
def test_causal(monkeypatch, backend):
    varlen_kernels.install(monkeypatch, backend)
    q, k, v = torch.randn(3, 5, 2, 8, dtype=torch.float64)
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    y = varlen_attention(q, k, v, offsets, 3, backend, causal=True, scale=0.3)
    for i, first in enumerate((0, 0, 2, 2, 2)):
        weights = torch.einsum("hd,jhd->hj", q[i], k[first : i + 1]).mul(0.3).softmax(-1)
        torch.testing.assert_close(y[i], torch.einsum("hj,jhd->hd", weights, v[first : i + 1]))


def test_pytorch_has_the_kernel_that_is_called():
    """The stand-in takes what this version takes."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.10 or later has it")
    taken = inspect.signature(varlen.varlen_attn).parameters
    assert list(taken)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= set(taken) and module._knows("window_size")


def test_a_pytorch_without_a_causal_window_is_told(installed, monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch 2.10 or later has it")

    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: None)
    assert (
        module.why_unfit("torch_varlen", OnGPU()) == "this PyTorch's varlen_attn knows no window_size: upgrade torch"
    )


@pytest.mark.parametrize("works", [("flash_attn", "torch_varlen"), ("torch_varlen",), ()], ids=str)
def test_a_gpu_takes_the_first_that_runs_and_says_so_once(installed, monkeypatch, caplog, works):
    monkeypatch.setattr(windows, "why_unfit", lambda name, q: None if name in works else "not here")
    expected = (*works, "sdpa")[0]
    with caplog.at_level("INFO"):
        assert {choose_window_backend(OnGPU()) for _ in range(3)} == {expected}
    assert len(caplog.records) == 1
    assert f"window: {expected}" in caplog.text
    assert works or "flash_attn: not here; torch_varlen: not here" in caplog.text


def test_what_failed_its_self_check_is_passed_over_unless_named(installed, monkeypatch):
    monkeypatch.setattr(module, "_knows", lambda parameter: True)
    monkeypatch.setattr(windows, "failed_self_check", lambda kernels, device: f"{kernels} is wrong on {device}")
    assert choose_window_backend(OnGPU()) == "sdpa"
    with use_kernels(window="flash_attn"):
        assert choose_window_backend(OnGPU()) == "flash_attn"


def test_a_cpu_asks_for_nothing(monkeypatch, caplog):
    monkeypatch.setattr(windows, "why_unfit", None)
    with caplog.at_level("INFO"):
        assert choose_window_backend(torch.zeros(5, 2, 64)) == "sdpa"
    assert not caplog.records


@pytest.mark.parametrize(
    "wanted, tensor, message",
    [
        ("fast", {}, r"window=fast are unknown; choose from .*window=auto\|flash_attn\|torch_varlen\|sdpa"),
        ("flash_attn", {"dtype": torch.float32}, "float32, and the kernels take float16 or bfloat16: convert it, or"),
        (
            "torch_varlen",
            {"is_cuda": False},
            "cannot run: x is on 'cuda', and the kernels need a GPU: move it there, ",
        ),
        ("flash_attn", {"shape": (5, 2, 12)}, "heads of 12 channels: it takes multiples of 8 up to 256, use 'sdpa'"),
    ],
)
def test_a_named_backend_that_cannot_run_says_why(installed, monkeypatch, wanted, tensor, message):
    with pytest.raises(ValueError, match=message), use_kernels(window=wanted):
        choose_window_backend(type("Tensor", (OnGPU,), tensor)())


def test_a_package_that_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda package: None)
    monkeypatch.setattr(backends, "_probed", {})
    said = "flash_attn cannot run: flash_attn is not installed: pip install flash-attn"
    with pytest.raises(ValueError, match=said), use_kernels(window="flash_attn"):
        choose_window_backend(OnGPU())


@pytest.mark.parametrize("backend", PACKAGES)
def test_self_check(monkeypatch, backend):
    """Right kernels pass it; those that mix up windows, or the heads of a group, do not."""
    varlen_kernels.install(monkeypatch, backend)
    cpu, right = torch.device("cpu"), varlen_attention

    def tried(kernel):
        monkeypatch.setattr(self_check, "_RESULTS", {})
        monkeypatch.setattr(self_check, "varlen_attention", kernel)
        return self_check.failed_self_check(backend, cpu)

    assert tried(right) is None
    shifted = tried(
        lambda q, k, v, cu_seqlens, **options: right(
            q, k, v, cu_seqlens - cu_seqlens.new_tensor([0, 1, 0, 0]), **options
        )
    )
    assert "are wrong on cpu" in shifted
    assert "are wrong on cpu" in tried(lambda q, k, v, **options: right(q, k.flip(1), v, **options))
    assert "kernels fail on cpu (TypeError" in tried(lambda *args: None)
