"""Attention inside windows against loops over tokens."""

import pytest
import torch
from windows import by_window, naive

from linmu_hf.ops.attention import window as module
from linmu_hf.ops.attention.window import window_attention


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize(
    "window", [[0, 0, 0, 1, 1, 1], [2, 0, 1, 1, 0, 1, 1], [0], [0, 1, 2]], ids=["full", "ragged", "one", "single"]
)
def test_equals_loops(window, heads):
    h, g = heads
    q, k, v = (torch.randn(len(window), count, 4, dtype=torch.float64, requires_grad=True) for count in (h, g, g))
    order, sizes, offsets = by_window(window)
    y = window_attention(*(t[order] for t in (q, k, v)), sizes, offsets)
    expected = naive(q, k, v, window)[order]
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    for grad, right in zip(*(torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (y, expected))):
        torch.testing.assert_close(grad, right)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("scores", [1, 2**20], ids=["window by window", "at once"])
def test_bfloat16_products(heads, scores, monkeypatch):
    """Without gradients, whatever this CPU would choose."""
    monkeypatch.setattr(module, "multiplies_in_bfloat16", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(module, "SCORES", scores)
    h, g = heads
    order, sizes, offsets = by_window(window := [0, 1, 2] * 8 + [3, 3, 3])
    q, k, v = (torch.randn(len(window), count, 16, dtype=torch.bfloat16) for count in (h, g, g))
    y = window_attention(*(t[order] for t in (q, k, v)), sizes, offsets)
    expected = naive(*(t.double() for t in (q, k, v)), window)[order]
    assert (y.double() - expected).norm() < 0.01 * expected.norm()
