"""Attention inside windows by loops, and tokens ordered by window."""

import torch


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


def by_window(window):
    """
    Order that lays the tokens window by window, windows of one size together, how many there are of which size, and
    where each begins.
    """
    members = [[i for i, w in enumerate(window) if w == number] for number in range(max(window) + 1)]
    members.sort(key=len)
    sizes = sorted({len(row) for row in members})
    offsets = torch.tensor([0, *map(len, members)]).cumsum(0, dtype=torch.int32)
    counts = [(sum(len(row) == size for row in members), size) for size in sizes]
    return [i for row in members for i in row], counts, offsets
