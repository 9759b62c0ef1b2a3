"""Softmax attention inside windows: short sequences in one call where a kernel takes them, else a batch per size."""

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..backends import choose, multiplies_in_bfloat16
from ..self_check import failed_self_check
from .varlen import PACKAGES, varlen_attention, why_unfit


# Scores that are held at once where attention is two matrix products.
SCORES = 2**20


def window_attention(q, k, v, sizes, cu_seqlens):
    """
    Computes the attention of every token to the tokens of its own window (Sec. 3.1.2).

    Args:
        q (`torch.Tensor` of shape `[n, h, d]`): Queries, window by window.
        k, v (`torch.Tensor` of shape `[n, g, d]`): Keys and values; h is a multiple of g.
        sizes (`Sequence[tuple[int, int]]`): How many windows of how many tokens, in their order.
        cu_seqlens (`torch.IntTensor` of shape `[windows + 1]`): Where each window begins, and the end.

    Returns:
        `torch.Tensor` of shape `[n, h, d]`.
    """
    if q.is_cuda and torch.is_autocast_enabled("cuda"):  # PyTorch's attention follows autocast by itself
        q, k, v = (t.to(torch.get_autocast_dtype("cuda")) for t in (q, k, v))
    backend = choose_window_backend(q)
    if backend != "sdpa":
        return varlen_attention(q, k, v, cu_seqlens, max(size for _, size in sizes), backend)
    return by_size(q, k, v, sizes)


def choose_window_backend(q: torch.Tensor) -> str:
    """
    Returns what attends inside windows for queries such as q: what [`~linmu_hf.ops.backends.use_kernels`] names, else
    the first usable of `PACKAGES` on a GPU in half precision, else `"sdpa"`.

    Raises:
        `ValueError`: The named kernels cannot run here; the message says what they need.
    """
    return choose("window", q, "auto", why_unfit, failed_self_check, tuple(PACKAGES), "sdpa")


def by_size(q, k, v, sizes):
    """Does the same by PyTorch's attention, windows of one size as a batch."""
    lengths = [windows * size for windows, size in sizes]
    parts = zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
    return torch.cat([_attend(*part, *size) for part, size in zip(parts, sizes, strict=True)])


def _attend(q, k, v, windows: int, size: int):
    """Windows of one size, [windows * size, h, d]."""
    h, g = q.shape[1], k.shape[1]
    q, k, v = (t.unflatten(0, (windows, size)).transpose(1, 2) for t in (q, k, v))
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if not learns and multiplies_in_bfloat16(q):
        return _two_products(q, k, v).transpose(1, 2).flatten(0, 1)
    # a CPU reads grouped heads in place; on a GPU repeating a few hundred keys costs less than the slower kernel
    grouped = h != g and q.device.type == "cpu"
    if h != g and not grouped:
        k, v = (t.repeat_interleave(h // g, dim=1) for t in (k, v))
    return scaled_dot_product_attention(q, k, v, enable_gqa=grouped).transpose(1, 2).flatten(0, 1)


def _two_products(q, k, v):
    """
    The same in bfloat16 without gradients. PyTorch's attention multiplies in float32 on CPUs without AMX; these
    products run in bfloat16, at twice the speed.
    """
    (windows, h, size, d), g = q.shape, k.shape[1]
    y = q.new_empty(windows, size, h, d).transpose(1, 2)
    step = max(SCORES // (h * size * size), 1)
    for first in range(0, windows, step):
        now = slice(first, first + step)
        rows = (q[now] / math.sqrt(d)).reshape(-1, h // g * size, d)  # the heads of a group are further rows
        keys, values = (t[now].reshape(-1, size, d) for t in (k, v))
        weights = torch.bmm(rows, keys.transpose(1, 2)).softmax(-1)
        y[now] = torch.bmm(weights, values).view(-1, h, size, d)
    return y
