"""Sliding windows with sinks, and joined attentions, against loops over queries and keys."""

import math

import pytest
import torch

from linmu_hf.ops.attention import banded
from linmu_hf.ops.attention.banded import Blocks, banded_attention, join
from linmu_hf.ops.attention.window import window_attention


def naive(q, k, v, sees):
    """Output [n, h, p] and lse [n, h] of query i over the keys `sees[i]`, one head at a time."""
    n, h, p = q.shape
    y, lse = torch.zeros_like(q), q.new_full((n, h), -math.inf)
    rows = [[None] * h for _ in range(n)]
    sums = [[None] * h for _ in range(n)]
    for i in range(n):
        for head in range(h):
            group = head // (h // k.shape[1])
            rows[i][head], sums[i][head] = y[i, head], lse[i, head]
            if sees[i]:
                scores = torch.stack([q[i, head] @ k[j, group] for j in sees[i]]) / p**0.5
                sums[i][head] = scores.logsumexp(0)
                rows[i][head] = sum(w * v[j, group] for w, j in zip(scores.softmax(0), sees[i]))
    return torch.stack([torch.stack(row) for row in rows]), torch.stack([torch.stack(row) for row in sums])


def inputs(n, length, h=4, g=2, p=6):
    return [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((n, h, p), *2 * [(length, g, p)])]


def cut(n, size):
    """Blocks of one sequence of n text tokens, each with all keys up to its own end, some of them left out as -1."""
    starts = range(0, n, size)
    queries = torch.tensor([[i if i < n else -1 for i in range(start, start + size)] for start in starts])
    ranks = torch.tensor([list(range(start, start + size)) for start in starts])
    keys = torch.arange(n).expand(len(starts), -1)
    return Blocks(queries, ranks, torch.where(keys < (ranks[:, -1:] + 1), keys, -1), keys, torch.arange(n))


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("at_once", [1, 2**22])
@pytest.mark.parametrize(("n", "size", "window", "sinks"), [(1, 4, 3, 2), (11, 4, 3, 2), (12, 4, 5, 0), (9, 16, 1, 3)])
def test_every_query_sees_its_window_and_the_sinks(n, size, window, sinks, at_once, with_lse, monkeypatch):
    monkeypatch.setattr(banded, "SCORES", at_once)
    q, k, v = inputs(n, n)
    sees = [[j for j in range(i + 1) if j > i - window or j < sinks] for i in range(n)]
    expected = naive(q, k, v, sees)
    actual = banded_attention(q, k, v, cut(n, size), window, sinks, with_lse)
    actual, expected = (actual, expected) if with_lse else ((actual,), expected[:1])
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    weights = [torch.randn_like(t) for t in expected]
    gradients = [
        torch.autograd.grad(sum((w * t).sum() for w, t in zip(weights, result)), (q, k, v))
        for result in (actual, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


def test_queries_without_a_key_give_nothing_and_no_gradient():
    q, k, v = inputs(2, 2)
    queries, ranks, keys, key_ranks = [[1, -1, 0]], [[1, 5, -1]], [[0, 1, -1]], [[0, 1, 2]]
    blocks = Blocks(*map(torch.tensor, (queries, ranks, keys, key_ranks, [2, 0])))
    y, lse = banded_attention(q, k, v, blocks, 2, 1, with_lse=True)
    expected, sums = naive(q, k, v, [[], [0, 1]])
    torch.testing.assert_close(y, expected)
    assert torch.equal(lse.isinf(), sums.isinf())
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(y.sum() + lse[1].sum(), (q, k, v)))
    y, lse = banded_attention(q, k[:0], v[:0], blocks, 2, 1, with_lse=True)
    assert not y.any() and lse.isneginf().all()


@pytest.mark.parametrize("empty", [False, True], ids=["both see keys", "one sees none"])
def test_joined_attentions_are_the_attention_to_all_keys(empty):
    q, k, v = inputs(2, 6)
    first, second = [[0, 2], [1]], [[1, 3, 5], [] if empty else [0, 4]]
    y, lse = join(*naive(q, k, v, first), *naive(q, k, v, second))
    expected, sums = naive(q, k, v, [a + b for a, b in zip(first, second)])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(lse, sums)
    for ours, theirs in zip(
        *(torch.autograd.grad(t.square().sum(), (q, k, v), retain_graph=True) for t in (y, expected))
    ):
        torch.testing.assert_close(ours, theirs)


def test_windows_give_their_lse_with_gradients():
    q, k, v = inputs(7, 7)
    window = [0, 0, 1, 2, 2, 3, 3]
    sizes, at = [(1, 1), (3, 2)], [2, 0, 1, 3, 4, 5, 6]
    bounds = torch.tensor([0, 1, 3, 5, 7], dtype=torch.int32)
    y, lse = window_attention(q[at], k[at], v[at], sizes, bounds, with_lse=True)
    expected, sums = naive(q, k, v, [[j for j in range(7) if window[j] == window[i]] for i in range(7)])
    torch.testing.assert_close(y, expected[at])
    torch.testing.assert_close(lse, sums[at])
    ours = torch.autograd.grad((lse.sin() + y.sum(-1)).sum(), (q, k, v))
    theirs = torch.autograd.grad((sums.sin() + expected.sum(-1)).sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
