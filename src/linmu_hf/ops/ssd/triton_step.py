"""One token per sequence through the scan, in one kernel: state read once, written once. Contract: `ssd_step`."""

import torch
import triton
import triton.language as tl

from ..launch import launch, on_device_of
from .plain import SMALLEST
from .triton_forward import load_state, load_vector


@triton.jit
def step_kernel(
    x, x_b, x_g, dt, dt_b, A, B, B_b, B_g, C, C_b, C_h, states, new_states, y,
    H, S, R, Q, P, K, smallest,
    BP: tl.constexpr, BK: tl.constexpr, NORMALIZED: tl.constexpr,
):  # fmt: skip
    """Runs a step. Grid (sequences, state heads, tiles of p); BK holds all of k."""
    b, head, p0 = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * BP
    step = tl.load(dt + b * dt_b + head).to(tl.float32)
    decay = tl.exp(step * tl.load(A + head).to(tl.float32))
    keys = load_vector(B + b * B_b + head // R * B_g, 0, K, BK).to(tl.float32) * step
    base = (b * S + head) * (P + NORMALIZED) * K
    k = tl.arange(0, BK)
    ones = load_vector(states + base + P * K, 0, K if NORMALIZED else 0, BK) * decay + keys
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
        if p0 == 0:
            tl.store(new_states + base + P * K + k, ones, mask=k < K)


@torch.library.custom_op("linmu_hf::ssd_step", mutates_args=())
def step_forward(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, states: torch.Tensor,
    normalized: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    (b, g, p), (h, k), s = x.shape, C.shape[1:], dt.shape[-1]
    y, new_states = x.new_empty(b, h, p), torch.empty_like(states)
    with on_device_of(x):
        launch(
            step_kernel, (b, s, triton.cdiv(p, 32)),
            x, *x.stride()[:2], dt, dt.stride(0), A, B, *B.stride()[:2], C, *C.stride()[:2],
            states, new_states, y, h, s, s // g, h // s, p, k, SMALLEST,
            BP=32, BK=triton.next_power_of_2(k), NORMALIZED=normalized, num_warps=4,
        )  # fmt: skip
    return y, new_states


@step_forward.register_fake
def _(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, states: torch.Tensor,
    normalized: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return x.new_empty(len(x), C.shape[1], x.shape[2]), torch.empty_like(states)


def ssd_step_triton(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, states: torch.Tensor, *,
    normalized: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """
    Runs a step by our kernel; arguments and results as in [`~linmu_hf.ops.ssd.scan.ssd_step`], without gradients.

    Raises:
        `ValueError`: States of another shape than the other arguments ask for.
    """
    expected = (len(x), dt.shape[-1], x.shape[-1] + normalized, C.shape[-1])
    if states.shape != expected:
        raise ValueError(f"states have shape {list(states.shape)} where x, dt and C ask for {list(expected)}")
    x, B, C, dt = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, B, C, dt))
    return step_forward(x, dt, A.contiguous(), B, C, states.contiguous(), normalized)
