"""Softmax attention inside windows: short sequences in one call where a kernel takes them, else a batch per size."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..backends import choose, multiplies_in_bfloat16
from ..self_check import failed_self_check
from .banded import masked_softmax
from .varlen import PACKAGES, varlen_attention, why_unfit


# Scores that are held at once where attention is two matrix products.
SCORES = 2**20


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, sizes: Sequence[tuple[int, int]], cu_seqlens: Tensor, with_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """
    Computes the attention of every token to the tokens of its own window (Sec. 3.1.2).

    Args:
        q (`torch.Tensor` of shape `[n, h, d]`): Queries, window by window.
        k, v (`torch.Tensor` of shape `[n, g, d]`): Keys and values; h is a multiple of g.
        sizes (`Sequence[tuple[int, int]]`): How many windows of how many tokens, in their order.
        cu_seqlens (`torch.IntTensor` of shape `[windows + 1]`): Where each window begins, and the end.
        with_lse (`bool`, *optional*, defaults to `False`): Whether the log of the sum of exp(scores) is wanted too.

    Returns:
        `torch.Tensor` of shape `[n, h, d]`, or a tuple of it and lse `[n, h]` in fp32.
    """
    if q.is_cuda and torch.is_autocast_enabled("cuda"):  # PyTorch's attention follows autocast by itself
        q, k, v = (t.to(torch.get_autocast_dtype("cuda")) for t in (q, k, v))
    backend = choose_window_backend(q)
    # the kernels give no gradient of lse
    if backend != "sdpa" and not (with_lse and _learns(q, k, v)):
        return varlen_attention(q, k, v, cu_seqlens, max(size for _, size in sizes), backend, with_lse=with_lse)
    return by_size(q, k, v, sizes, with_lse)


def choose_window_backend(q: Tensor) -> str:
    """
    Returns what attends inside windows for queries such as q: what [`~linmu_hf.ops.backends.use_kernels`] names, else
    the first usable of `PACKAGES` on a GPU in half precision, else `"sdpa"`.

    Raises:
        `ValueError`: The named kernels cannot run here; the message says what they need.
    """
    return choose("window", q, "auto", why_unfit, failed_self_check, tuple(PACKAGES), "sdpa")


def by_size(
    q: Tensor, k: Tensor, v: Tensor, sizes: Sequence[tuple[int, int]], with_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Does the same by PyTorch's own operations, windows of one size as a batch."""
    lengths = [windows * size for windows, size in sizes]
    parts = zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
    if with_lse:
        outputs, sums = zip(*(_attend_with_lse(q, k, v, *size) for (q, k, v), size in zip(parts, sizes, strict=True)))
        return torch.cat(outputs), torch.cat(sums)
    return torch.cat([_attend(q, k, v, *size) for (q, k, v), size in zip(parts, sizes, strict=True)])


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _attend(q: Tensor, k: Tensor, v: Tensor, windows: int, size: int) -> Tensor:
    """Windows of one size, [windows * size, h, d]."""
    if not _learns(q, k, v) and multiplies_in_bfloat16(q):
        return _attend_with_lse(q, k, v, windows, size)[0]
    h, g = q.shape[1], k.shape[1]
    q, k, v = (t.unflatten(0, (windows, size)).transpose(1, 2) for t in (q, k, v))
    # a CPU reads grouped heads in place; on a GPU repeating a few hundred keys costs less than the slower kernel
    grouped = h != g and q.device.type == "cpu"
    if h != g and not grouped:
        k, v = (t.repeat_interleave(h // g, dim=1) for t in (k, v))
    return scaled_dot_product_attention(q, k, v, enable_gqa=grouped).transpose(1, 2).flatten(0, 1)


def _attend_with_lse(q: Tensor, k: Tensor, v: Tensor, windows: int, size: int) -> tuple[Tensor, Tensor]:
    """
    The same as two products, with lse. PyTorch's attention gives none, and multiplies in float32 on CPUs without AMX,
    where these products run in bfloat16 at twice the speed.
    """
    (n, h, d), g = q.shape, k.shape[1]
    step = max(SCORES // (h * size * size), 1) * size
    outputs, sums = [], []
    for first in range(0, n, step):
        rows, keys, values = (
            t[first : first + step].unflatten(0, (-1, size)).transpose(1, 2) for t in (q / math.sqrt(d), k, v)
        )
        # the heads of a group are further rows
        rows, keys, values = rows.reshape(-1, h // g * size, d), keys.flatten(0, 1), values.flatten(0, 1)
        output, lse = masked_softmax(torch.bmm(rows, keys.transpose(1, 2)), None, values)
        outputs.append(output)
        sums.append(lse)
    y = torch.cat(outputs).view(windows, h, size, d).transpose(1, 2).flatten(0, 1)
    return y, torch.cat(sums).view(windows, h, size).transpose(1, 2).flatten(0, 1)
