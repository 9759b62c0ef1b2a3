"""Attention inside windows against loops over tokens."""

import pytest
import torch

from linmu_hf.ops.window_attention import window_attention


def naive(q, k, v, window):
    """Every query over the keys of its own window, one head and one token at a time."""
    (n, h, d), g = q.shape, k.shape[1]
    y = torch.empty_like(q)
    for i in range(n):
        members = [j for j in range(n) if window[j] == window[i]]
        for head in range(h):
            group = head // (h // g)
            weights = torch.stack([q[i, head] @ k[j, group] for j in members]).div(d**0.5).softmax(0)
            y[i, head] = sum(weight * v[j, group] for weight, j in zip(weights, members))
    return y


def places(window):
    """groups and slots of a list with the window of every token."""
    members = [[i for i, w in enumerate(window) if w == number] for number in range(max(window) + 1)]
    groups = [
        torch.tensor([row for row in members if len(row) == size]) for size in sorted({len(row) for row in members})
    ]
    order = [i for group in groups for i in group.flatten().tolist()]
    return groups, torch.tensor([order.index(i) for i in range(len(window))])


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize(
    "window", [[0, 0, 0, 1, 1, 1], [2, 0, 1, 1, 0, 1, 1], [0], [0, 1, 2]], ids=["full", "ragged", "one", "single"]
)
def test_equals_loops(window, heads):
    h, g = heads
    q, k, v = (torch.randn(len(window), count, 4, dtype=torch.float64, requires_grad=True) for count in (h, g, g))
    y, expected = window_attention(q, k, v, *places(window)), naive(q, k, v, window)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    for grad, right in zip(*(torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (y, expected))):
        torch.testing.assert_close(grad, right)
