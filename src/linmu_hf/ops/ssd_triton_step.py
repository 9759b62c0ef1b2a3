"""One token per sequence through the scan, in one kernel: state read once, written once. Contract: `ssd_step`."""

import torch
import triton
import triton.language as tl

from .ssd_triton import SMALLEST, launch
from .ssd_triton_forward import load_state, load_vector


@triton.jit
def step_kernel(
    x, x_b, x_g, dt, dt_b, A, B, B_b, B_g, C, C_b, C_h, states, new_states, y,
    H, S, R, Q, P, K, smallest,
    BP: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, NORMALIZED: tl.constexpr,
):  # fmt: skip
    """Grid (sequences, state heads, splits of p); BK holds all of k."""
    b, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    step = tl.load(dt + b * dt_b + head).to(tl.float32)
    decay = tl.exp(step * tl.load(A + head).to(tl.float32))
    keys = load_vector(B + b * B_b + head // R * B_g, 0, K, BK).to(tl.float32) * step
    base = (b * S + head) * (P + NORMALIZED) * K
    k = tl.arange(0, BK)
    ones = load_vector(states + base + P * K, 0, K if NORMALIZED else 0, BK) * decay + keys
    for p0 in range(split * BP, P, SPLITS * BP):
        p = p0 + tl.arange(0, BP)
        values = tl.load(x + b * x_b + head // R * x_g + p, mask=p < P, other=0.0).to(tl.float32)
        state = load_state(states + base, p0, 0, P, K, BP, BK) * decay + values[:, None] * keys[None, :]
        tl.store(new_states + base + p[:, None] * K + k[None, :], state, mask=(p < P)[:, None] & (k < K)[None, :])
        for h in range(head * Q, head * Q + Q):
            queries = load_vector(C + b * C_b + h * C_h, 0, K, BK).to(tl.float32)
            out = tl.sum(state * queries[None, :], 1)
            if NORMALIZED:
                out = out / tl.maximum(tl.sum(ones * queries, 0), smallest)
            tl.store(y + (b * H + h) * P + p, out, mask=p < P)
    if NORMALIZED:
        tl.debug_barrier()  # in place, every thread must have read the old row
        if split == 0:
            tl.store(new_states + base + P * K + k, ones, mask=k < K)


@torch.library.custom_op("linmu_hf::ssd_step", mutates_args=())
def ssd_step_new(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, states: torch.Tensor,
    normalized: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    new_states = torch.empty_like(states)
    return _step(x, dt, A, B, C, states, new_states, normalized, 32, triton.cdiv(x.shape[2], 32)), new_states


@ssd_step_new.register_fake
def _(x, dt, A, B, C, states, normalized):
    return x.new_empty(len(x), C.shape[1], x.shape[2]), torch.empty_like(states)


@torch.library.custom_op("linmu_hf::ssd_step_", mutates_args={"states"})
def ssd_step_in_place(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, states: torch.Tensor,
    normalized: bool,
) -> torch.Tensor:  # fmt: skip
    return _step(x, dt, A, B, C, states, states, normalized, 32, 1)


@ssd_step_in_place.register_fake
def _(x, dt, A, B, C, states, normalized):
    return x.new_empty(len(x), C.shape[1], x.shape[2])


def _step(x, dt, A, B, C, states, new_states, normalized, block, splits):
    (b, g, p), (h, k), s = x.shape, C.shape[1:], dt.shape[-1]
    y = x.new_empty(b, h, p)
    with torch.cuda.device(x.device if x.is_cuda else -1):
        launch(
            step_kernel, (b, s, splits),
            x, *x.stride()[:2], dt, dt.stride(0), A, B, *B.stride()[:2], C, *C.stride()[:2],
            states, new_states, y, h, s, s // g, h // s, p, k, SMALLEST,
            BP=block, BK=triton.next_power_of_2(k), SPLITS=splits, NORMALIZED=normalized, num_warps=4,
        )  # fmt: skip
    return y


def ssd_step_triton(x, dt, A, B, C, states, *, normalized: bool = False, in_place: bool = False):
    """
    Arguments and results as in [`~linmu_hf.ops.ssd.ssd_step`], without gradients.

    Args:
        in_place (`bool`, *optional*, defaults to `False`):
            Writes the new states over `states`, which must be contiguous. A head is then one program, not several in
            parallel: better for batches, worse for a single sequence.

    Raises:
        `ValueError`: States of another shape than the other arguments ask for, or not contiguous with `in_place`.
    """
    expected = (len(x), dt.shape[-1], x.shape[-1] + normalized, C.shape[-1])
    if states.shape != expected:
        raise ValueError(f"states have shape {list(states.shape)} where x, dt and C ask for {list(expected)}")
    if in_place and not states.is_contiguous():
        raise ValueError("in_place=True needs contiguous states: pass states.contiguous() and keep what is returned")
    x, B, C, dt = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, B, C, dt))
    A, states = A.contiguous(), states.contiguous()
    if in_place:
        return ssd_step_in_place(x, dt, A, B, C, states, normalized), states
    return ssd_step_new(x, dt, A, B, C, states, normalized)
