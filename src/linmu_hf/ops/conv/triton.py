"""Depthwise causal convolution of packed sequences on a GPU."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from ..launch import launch, on_device_of
from ..segments import Segments


BLOCK = 64


@triton.jit
def conv_kernel(
    x, x_n, weight, tail, blocks, y, C,
    W: tl.constexpr, L: tl.constexpr, BC: tl.constexpr, HAS_TAIL: tl.constexpr,
):  # fmt: skip
    """Computes y_t = sum_j w_j x_{t - (W - 1) + j}. Grid (blocks of tokens, blocks of channels)."""
    row = blocks + 5 * tl.program_id(0)
    start, count, segment, first = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = tl.arange(0, L) < count
    columns = (channels < C)[None, :]
    out = tl.zeros([L, BC], tl.float32)
    for j in tl.static_range(W):
        place = start + tl.arange(0, L) + (j - W + 1)
        real = inside & (place >= first)
        rows = place.to(tl.int64)
        value = tl.load(x + rows[:, None] * x_n + channels[None, :], mask=real[:, None] & columns, other=0.0)
        tap = tl.load(weight + j * C + channels, mask=channels < C, other=0.0).to(tl.float32)
        out += value.to(tl.float32) * tap[None, :]
        if HAS_TAIL:
            before = inside & (place < first)
            at = segment * (W - 1) + (place - first + W - 1)
            value = tl.load(tail + at[:, None] * C + channels[None, :], mask=before[:, None] & columns, other=0.0)
            out += value.to(tl.float32) * tap[None, :]
    rows = (start + tl.arange(0, L)).to(tl.int64)
    tl.store(y + rows[:, None] * C + channels[None, :], out, mask=inside[:, None] & columns)


@triton.jit
def conv_grad_kernel(
    dy, x, x_n, weight, tail, blocks, dx, dweight, C,
    W: tl.constexpr, L: tl.constexpr, BC: tl.constexpr, HAS_TAIL: tl.constexpr,
):  # fmt: skip
    """Computes dx, and what each block of tokens adds to the gradient of the taps [blocks, W, C]. Grid as above."""
    row = blocks + 5 * tl.program_id(0)
    start, count, segment, first = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    end = tl.load(row + 4)
    channels = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = tl.arange(0, L) < count
    columns = (channels < C)[None, :]
    here = start + tl.arange(0, L)
    rows = here.to(tl.int64)
    gradient = tl.load(dy + rows[:, None] * C + channels[None, :], mask=inside[:, None] & columns, other=0.0)
    out = tl.zeros([L, BC], tl.float32)
    for j in tl.static_range(W):
        tap = tl.load(weight + j * C + channels, mask=channels < C, other=0.0).to(tl.float32)
        place = here + (W - 1 - j)
        later = inside & (place < end)
        at = place.to(tl.int64)
        value = tl.load(dy + at[:, None] * C + channels[None, :], mask=later[:, None] & columns, other=0.0)
        out += value.to(tl.float32) * tap[None, :]
        place = here + (j - W + 1)
        real = inside & (place >= first)
        at = place.to(tl.int64)
        value = tl.load(x + at[:, None] * x_n + channels[None, :], mask=real[:, None] & columns, other=0.0)
        product = value.to(tl.float32) * gradient.to(tl.float32)
        if HAS_TAIL:
            before = inside & (place < first)
            at = segment * (W - 1) + (place - first + W - 1)
            value = tl.load(tail + at[:, None] * C + channels[None, :], mask=before[:, None] & columns, other=0.0)
            product += value.to(tl.float32) * gradient.to(tl.float32)
        partial = dweight + (tl.program_id(0).to(tl.int64) * W + j) * C + channels
        tl.store(partial, tl.sum(product, 0), mask=channels < C)
    tl.store(dx + rows[:, None] * C + channels[None, :], out, mask=inside[:, None] & columns)


@lru_cache(maxsize=16)
def _tables(lengths: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Blocks [i, 5]: first token, tokens, segment, its first and end token; the segments' first tokens and lengths."""
    blocks, firsts, first = [], [], 0
    for segment, length in enumerate(lengths):
        firsts.append(first)
        end = first + length
        blocks += [(start, min(BLOCK, end - start), segment, first, end) for start in range(first, end, BLOCK)]
        first = end
    return tuple(torch.tensor(rows).to(device) for rows in (blocks, firsts, lengths))


def _options(x: torch.Tensor, weight: torch.Tensor, tail: torch.Tensor | None) -> dict[str, Any]:
    return {
        "W": weight.shape[0], "L": BLOCK, "BC": max(16, min(64, triton.next_power_of_2(x.shape[1]))),
        "HAS_TAIL": tail is not None, "num_warps": 4,
    }  # fmt: skip


@torch.library.custom_op("linmu_hf::causal_conv", mutates_args=())
def conv_forward(x: torch.Tensor, weight: torch.Tensor, tail: torch.Tensor | None, lengths: list[int]) -> torch.Tensor:
    y = x.new_empty(x.shape)
    blocks, *_ = _tables(tuple(lengths), x.device)
    options = _options(x, weight, tail)
    with on_device_of(x):
        launch(
            conv_kernel, (len(blocks), triton.cdiv(x.shape[1], options["BC"])),
            x, x.stride(0), weight, tail, blocks, y, x.shape[1], **options,
        )  # fmt: skip
    return y


@conv_forward.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, tail: torch.Tensor | None, lengths: list[int]) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("linmu_hf::causal_conv_backward", mutates_args=())
def conv_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, tail: torch.Tensor | None,
    lengths: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Returns the gradients of x, of the taps and of the tail; the last is empty without a tail."""
    dy, dx = dy.contiguous(), x.new_empty(x.shape)
    blocks, *_ = _tables(tuple(lengths), x.device)
    dweight = x.new_empty(len(blocks), *weight.shape, dtype=torch.float32)
    options = _options(x, weight, tail)
    with on_device_of(x):
        launch(
            conv_grad_kernel, (len(blocks), triton.cdiv(x.shape[1], options["BC"])),
            dy, x, x.stride(0), weight, tail, blocks, dx, dweight, x.shape[1], **options,
        )  # fmt: skip
    dtail = x.new_empty(0) if tail is None else _tail_grad(dy, weight, tail, lengths)
    return dx, dweight.sum(0).to(weight.dtype), dtail


@conv_backward.register_fake
def _(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, tail: torch.Tensor | None, lengths: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), torch.empty_like(weight), x.new_empty(0) if tail is None else torch.empty_like(tail)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, tail, ctx.lengths = inputs
    ctx.save_for_backward(x, weight, tail)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, tail = ctx.saved_tensors
    dx, dweight, dtail = conv_backward(dy, x, weight, tail, ctx.lengths)
    return dx, dweight, None if tail is None else dtail, None


def _tail_grad(dy: torch.Tensor, weight: torch.Tensor, tail: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Token i of a tail is at i - (w - 1) before its sequence and reaches the outputs i - j through tap j."""
    dtail = torch.zeros_like(tail)
    for i in range(tail.shape[1]):
        for j in range(i + 1):
            rows, mask = _places(lengths, i - j, dy.device)
            dtail[:, i] += torch.where(mask, dy[rows] * weight[j].to(dy.dtype), 0).to(dtail.dtype)
    return dtail


def _places(lengths: Sequence[int], offset: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the tokens `offset` into every sequence, and whether there are such, [m] and [m, 1]."""
    _, first, length = _tables(tuple(lengths), device)
    mask = length > offset
    places = torch.where(mask, first + offset, 0)
    return places, mask[:, None]


conv_forward.register_autograd(_backward, setup_context=_save)


def causal_conv_triton(
    x: torch.Tensor, weight: torch.Tensor, segments: Segments, tail: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Computes the depthwise causal convolution of packed sequences.

    Args:
        x (`torch.Tensor` of shape `[n, c]`): Tokens; only the last dimension has to be contiguous.
        weight (`torch.Tensor` of shape `[w, c]`): Taps, oldest token first.
        segments (`Segments`): The sequences.
        tail (`torch.Tensor` of shape `[m, w - 1, c]`, *optional*): The tokens before each sequence; zeros if absent.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Output `[n, c]`, and the last `w - 1` inputs of every sequence.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    tail = None if tail is None else tail.to(x.dtype).contiguous()
    lengths, halo = list(segments.lengths), weight.shape[0] - 1
    y = conv_forward(x, weight.contiguous(), tail, lengths)
    device = x.device
    _, first, length = _tables(tuple(lengths), device)
    place = length[:, None] - halo + torch.arange(halo, device=device)  # of the last inputs, within their sequence
    rows = (first[:, None] + place).clamp_min(0)
    last = torch.where((place >= 0)[..., None], x[rows], 0)
    if tail is not None:
        kept = tail[torch.arange(len(lengths), device=device)[:, None], (place + halo).clamp_max(max(halo - 1, 0))]
        last = torch.where((place >= 0)[..., None], last, kept)
    return y, last
