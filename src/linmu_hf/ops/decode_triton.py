"""The mixer of a decode step in one kernel: convolution, rotary, features, step size, state, output, skip.

    code            meaning
    x, b, c         [n, g p], [n, g p], [n, h p] projected tokens, one per sequence
    tail            [n, W - 1, (2 g + h) p] the convolution's last inputs: of x, then b, then c
    taps            [W, (2 g + h) p]
    K2              state size, or half of it with softmax features: softmax of z and of -z, z = v W

What it computes is `FlexMA.step` of the modeling code; one state head per query head.
"""

import torch
import triton
import triton.language as tl

from .launch import launch, on_device_of
from .ssd.plain import SMALLEST
from .ssd.triton_forward import load_state, load_vector


@triton.jit
def convolved(now, tail, taps, at, inside, CT, W: tl.constexpr):
    """Returns channels `at` of the convolved token; the three pointers are to the first channel of a head."""
    out = tl.load(now + at, mask=inside, other=0.0).to(tl.float32)
    out *= tl.load(taps + (W - 1) * CT + at, mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(W - 1):
        before = tl.load(tail + j * CT + at, mask=inside, other=0.0).to(tl.float32)
        out += before * tl.load(taps + j * CT + at, mask=inside, other=0.0).to(tl.float32)
    return out


@triton.jit
def rotated(now, tail, taps, cos, sin, at, P, CT, W: tl.constexpr, ROPE: tl.constexpr):
    """Returns the same with the rotary embedding, which pairs channel i with i + P / 2."""
    inside = at < P
    out = convolved(now, tail, taps, at, inside, CT, W)
    if ROPE:
        first = at < P // 2
        partner = convolved(now, tail, taps, tl.where(first, at + P // 2, at - P // 2), inside, CT, W)
        out *= tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)
        turn = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)
        out += tl.where(first, -partner, partner) * turn
    return out


@triton.jit
def softmax_of(z, inside):
    z = tl.where(inside, z, float("-inf"))
    z = tl.exp(z - tl.max(z, 0))
    return z / tl.sum(z, 0)


@triton.jit
def features(
    now, tail, taps, cos, sin, directions, P, K2, CT,
    W: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr, ROPE: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Returns the two halves of B or C of a head, [BK] each; without features B or C itself, and zeros."""
    k = tl.arange(0, BK)
    if FEATURES:
        z = tl.zeros([BK], tl.float32)
        for p0 in range(0, P, BP):
            v = rotated(now, tail, taps, cos, sin, p0 + tl.arange(0, BP), P, CT, W, ROPE)
            z += tl.sum(load_state(directions, p0, 0, P, K2, BP, BK).to(tl.float32) * v[:, None], 0)
        plus, minus = softmax_of(z, k < K2), softmax_of(-z, k < K2)
    else:
        plus = rotated(now, tail, taps, cos, sin, k, P, CT, W, ROPE)
        minus = tl.zeros([BK], tl.float32)
    return plus, minus


@triton.jit
def shift_tail(now, tail, new_tail, keep, P, CT, W: tl.constexpr, BP: tl.constexpr):
    for p0 in range(0, P, BP):
        at = p0 + tl.arange(0, BP)
        for j in tl.static_range(W - 1):
            old = tl.load(tail + j * CT + at, mask=at < P, other=0.0)
            if j == W - 2:
                new = tl.load(now + at, mask=at < P, other=0.0)
            else:
                new = tl.load(tail + (j + 1) * CT + at, mask=at < P, other=0.0)
            tl.store(new_tail + j * CT + at, tl.where(keep, old, new), mask=at < P)


@triton.jit
def decode_kernel(
    x, b, c, tail, new_tail, taps, cos, sin, b_directions, c_directions, dt, dt_bias, A_log, D, real,
    states, new_ones, y, H, R, P, K2, CT, scale, smallest,
    W: tl.constexpr, BP: tl.constexpr, BK: tl.constexpr,
    ROPE: tl.constexpr, FEATURES: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """
    Runs a decode step. Grid (sequences, heads, tiles of p). States in place: a tile has one owner; the row of ones
    goes elsewhere.
    """
    n, h, p0 = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * BP
    g, groups = h // R, H // R
    x_now, b_now, c_now = x + (n * groups + g) * P, b + (n * groups + g) * P, c + (n * H + h) * P
    x_at, b_at, c_at = g * P, (groups + g) * P, (2 * groups + h) * P
    tail += n * (W - 1) * CT
    new_tail += n * (W - 1) * CT
    if ROPE:
        cos += n * P
        sin += n * P
    if FEATURES:
        b_directions += g * P * K2
        c_directions += h * P * K2
    plus, minus = features(
        b_now, tail + b_at, taps + b_at, cos, sin, b_directions, P, K2, CT, W, BP, BK, ROPE, FEATURES
    )
    q_plus, q_minus = features(
        c_now, tail + c_at, taps + c_at, cos, sin, c_directions, P, K2, CT, W, BP, BK, ROPE, FEATURES
    )
    step = tl.load(dt + n * H + h).to(tl.float32) + tl.load(dt_bias + h).to(tl.float32)
    step = tl.maximum(step, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(step)))  # softplus
    keep = h < 0
    if HAS_MASK:
        keep = tl.load(real + n) == 0
        step = tl.where(keep, 0.0, step)  # the state then stays as it is
    decay = tl.exp(-step * tl.exp(tl.load(A_log + h).to(tl.float32)))
    plus, minus, q_plus, q_minus = plus * step, minus * step, q_plus * scale, q_minus * scale

    K = K2 * (1 + FEATURES)
    state_base = states + (n * H + h) * (P + FEATURES) * K
    p, k = p0 + tl.arange(0, BP), tl.arange(0, BK)
    inside = (p < P)[:, None] & (k < K2)[None, :]
    at = state_base + p[:, None] * K + k[None, :]
    values = convolved(x_now, tail + x_at, taps + x_at, p, p < P, CT, W)
    state = tl.load(at, mask=inside, other=0.0) * decay + values[:, None] * plus[None, :]
    tl.store(at, state, mask=inside)
    out = tl.sum(state * q_plus[None, :], 1)
    if FEATURES:
        state = tl.load(at + K2, mask=inside, other=0.0) * decay + values[:, None] * minus[None, :]
        tl.store(at + K2, state, mask=inside)
        out += tl.sum(state * q_minus[None, :], 1)
        ones = load_vector(state_base + P * K, 0, K2, BK) * decay + plus
        ones_minus = load_vector(state_base + P * K + K2, 0, K2, BK) * decay + minus
        out = out / tl.maximum(tl.sum(ones * q_plus + ones_minus * q_minus, 0), smallest)
        if p0 == 0:
            new_ones += (n * H + h) * K
            tl.store(new_ones + k, ones, mask=k < K2)
            tl.store(new_ones + K2 + k, ones_minus, mask=k < K2)
    out += tl.load(D + h).to(tl.float32) * values
    tl.store(y + (n * H + h) * P + p, out, mask=p < P)
    if p0 == 0:
        shift_tail(c_now, tail + c_at, new_tail + c_at, keep, P, CT, W, BP)
        if h % R == 0:
            shift_tail(x_now, tail + x_at, new_tail + x_at, keep, P, CT, W, BP)
            shift_tail(b_now, tail + b_at, new_tail + b_at, keep, P, CT, W, BP)


@torch.library.custom_op("linmu_hf::decode", mutates_args={"states"})
def decode_triton(
    x: torch.Tensor, b: torch.Tensor, c: torch.Tensor, tail: torch.Tensor, taps: torch.Tensor,
    cos: torch.Tensor | None, sin: torch.Tensor | None,
    b_directions: torch.Tensor | None, c_directions: torch.Tensor | None,
    dt: torch.Tensor, dt_bias: torch.Tensor, A_log: torch.Tensor, D: torch.Tensor, real: torch.Tensor | None,
    states: torch.Tensor, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """
    Runs a Flex-MA branch on one token per sequence, without gradients; names in the table at the top of this file.

    Args:
        cos, sin (`torch.Tensor` of shape `[n, p]`, *optional*): Rotary embedding of b and c.
        b_directions, c_directions (`torch.Tensor` of shapes `[g, p, k / 2]`, `[h, p, k / 2]`, *optional*):
            Directions of the softmax features. With them the scan is normalised.
        dt (`torch.Tensor` of shape `[n, h]`): Step sizes before the bias and softplus.
        real (`torch.Tensor` of shape `[n]`, *optional*): 0 where state and tail stay as they are.
        states (`torch.Tensor` of shape `[n, h, p (+ 1), k]`, fp32, contiguous): Updated in place.
        scale (`float`): Factor of c.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: y of shape `[n, h, p]`, and the new tail.

    Raises:
        `ValueError`: States that are not contiguous, or not fp32.
    """
    if not states.is_contiguous() or states.dtype != torch.float32:
        raise ValueError(f"states are {states.dtype} with strides {states.stride()}: pass states.float().contiguous()")
    n, h, rows, k = states.shape
    featured = b_directions is not None
    p = rows - featured
    k2 = k // 2 if featured else k
    y, new_tail = _decode_outputs(c, tail, states, featured)
    new_ones = states.new_empty(n, h, k if featured else 0)
    block = max(1, min(32, triton.next_power_of_2(p)))
    with on_device_of(x):
        launch(
            decode_kernel, (n, h, triton.cdiv(p, block)),
            x.contiguous(), b.contiguous(), c.contiguous(), tail.contiguous(), new_tail, taps.contiguous(),
            *(None if t is None else t.contiguous() for t in (cos, sin, b_directions, c_directions)),
            dt.contiguous(), dt_bias, A_log, D, None if real is None else real.contiguous(), states, new_ones, y,
            h, h * p // x.shape[1], p, k2, taps.shape[1], scale, SMALLEST,
            W=taps.shape[0], BP=block, BK=triton.next_power_of_2(k2), ROPE=cos is not None, FEATURES=featured,
            HAS_MASK=real is not None, num_warps=4,
        )  # fmt: skip
    if featured:
        states[:, :, p] = new_ones
    return y, new_tail


def _decode_outputs(
    c: torch.Tensor, tail: torch.Tensor, states: torch.Tensor, featured: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    n, h, rows, _ = states.shape
    return c.new_empty(n, h, rows - featured), torch.empty_like(tail, memory_format=torch.contiguous_format)


@decode_triton.register_fake
def _(
    x: torch.Tensor, b: torch.Tensor, c: torch.Tensor, tail: torch.Tensor, taps: torch.Tensor,
    cos: torch.Tensor | None, sin: torch.Tensor | None,
    b_directions: torch.Tensor | None, c_directions: torch.Tensor | None,
    dt: torch.Tensor, dt_bias: torch.Tensor, A_log: torch.Tensor, D: torch.Tensor, real: torch.Tensor | None,
    states: torch.Tensor, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _decode_outputs(c, tail, states, b_directions is not None)
