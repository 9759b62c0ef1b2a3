"""The one contract for the selective scan (state space duality, SSD) and the choice of its implementation.

    code            paper (Eq. 1)     shape             meaning
    x               u_t               [n, g, p]         scan input, one head per key/value head
    dt              Delta_t           [n, s]            step size, >= 0; s state heads, a multiple of g
    A               A                 [s]               decay rate, < 0; a token decays the state by exp(dt * A)
    B               B_t               [n, g, k]         where a token is written into the state
    C               C_t               [n, h, k]         where it is read; h query heads, a multiple of s
    y               y_t               [n, h, p]         h_t = exp(dt A) h_{t-1} + dt x B^T,  y = h_t C
    states          h_t               [m, s, p, k]      one per segment, fp32

Heads are grouped as in grouped-query attention: state heads `g * (s / g) .. ` read the x and B of key/value head `g`,
which are never repeated in memory. Tokens of all sequences are packed one after another; `Segments` says where each
sequence begins, and states never cross from one segment to the next.

`normalized` adds a channel of x that is 1 everywhere, and divides the other channels of y by it. States then have a
row for it, [m, s, p + 1, k], and y has p channels.
"""

import torch

from ..backends import choose, why_unavailable
from ..segments import Scan, Segments
from ..self_check import failed_self_check
from .mamba_ssm import ssd_mamba_ssm
from .plain import divide, normalize, ssd_chunked, ssd_recurrence


PLAIN = {"chunked": ssd_chunked, "recurrence": ssd_recurrence}


def ssd(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, segments: Segments, *,
    initial_states: torch.Tensor | None = None, normalized: bool = False, backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """
    Runs the selective scan over packed segments, Eq. 1 of the paper; shapes in the table at the top of this file.

    Args:
        x, dt, A, B, C (`torch.Tensor`): See the table. Decays and states are computed in fp32 (fp64 for fp64 input).
        segments (`Segments`): The packed sequences.
        initial_states (`torch.Tensor` of shape `[m, s, p, k]`, *optional*): States before each segment.
        normalized (`bool`, *optional*, defaults to `False`):
            Divides y by what the scan gives for a channel of ones; initial and final states are `[m, s, p + 1, k]`.
        backend (`str`, *optional*, defaults to `"auto"`):
            `"triton"` (our kernels, for GPUs), `"mamba_ssm"` (those of that package), `"chunked"` (batched matrix
            products) or `"recurrence"` (token by token). `"auto"` takes what
            [`~linmu_hf.ops.backends.use_kernels`] names, else `"triton"` where it runs and `"chunked"` elsewhere.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: y of shape `[n, h, p]` in x's dtype, and the states after each segment.

    Raises:
        `ValueError`: The named backend is unknown, or cannot run here; the message says what it takes.
    """
    backend = choose_backend(x, backend)
    with torch.autocast(x.device.type, enabled=False):  # decays and states keep their precision
        if backend == "triton":
            from .triton import ssd_triton

            return ssd_triton(x, dt, A, B, C, segments, initial_states, normalized=normalized)
        form = PLAIN.get(backend, ssd_mamba_ssm)
        return normalize(form, x, dt, A, B, C, segments, initial_states, normalized)


def ssd_pair(
    first: Scan, second: Scan, *, normalized: bool = False, final_states: bool = True, backend: str = "auto"
) -> tuple[tuple[torch.Tensor, torch.Tensor | None], ...]:
    """
    Runs two scans of the same heads and sizes, as the two directions of a block are.

    Args:
        first, second (`Scan`): Their arguments.
        normalized, backend: As in [`ssd`].
        final_states (`bool`, *optional*, defaults to `True`): Whether the final states of the first are wanted.

    Returns:
        `tuple[tuple[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]]`: y and states of
        each; our kernels, which take both scans in one launch, do not write states that are not wanted, nor those of
        the second.
    """
    if choose_backend(first.x, backend) == "triton":
        from .triton import ssd_triton_pair

        with torch.autocast(first.x.device.type, enabled=False):
            return ssd_triton_pair(first, second, normalized, final_states)
    results = (ssd(**scan._asdict(), normalized=normalized, backend=backend) for scan in (first, second))
    return tuple(results)


def choose_backend(x: torch.Tensor, backend: str = "auto") -> str:
    """
    Returns the backend that [`ssd`] uses for such an `x`.

    Raises:
        `ValueError`: As in [`ssd`].
    """
    return choose("ssd", x, backend, _why_unfit, failed_self_check, ("triton",), "chunked")


def _why_unfit(backend: str, x: torch.Tensor) -> str | None:
    return None if backend in PLAIN else why_unavailable(backend, x)


def use_triton_kernels(x: torch.Tensor) -> bool:
    """Returns whether the steps around a scan run in our kernels too: on a GPU, where the scan does."""
    return x.is_cuda and choose_backend(x) == "triton"


def ssd_step(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, states: torch.Tensor, *,
    normalized: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """
    Scans one token per sequence: x [b, g, p], dt [b, s], A [s], B [b, g, k], C [b, h, k], states [b, s, p, k].

    With `normalized`, states are `[b, s, p + 1, k]` as in [`ssd`]. On a GPU with Triton, and without gradients, one
    kernel does it all.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: y of shape `[b, h, p]` in x's dtype and the new states.
    """
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, dt, A, B, C, states))
    if not learns and states.dtype == torch.float32 and use_triton_kernels(x):
        from .triton_step import ssd_step_triton

        return ssd_step_triton(x, dt, A, B, C, states, normalized=normalized)
    dtype = states.dtype
    with torch.autocast(x.device.type, enabled=False):
        values = x.to(dtype)
        if normalized:
            values = torch.cat([values, values.new_ones(*values.shape[:-1], 1)], dim=-1)
        b, g, _ = values.shape
        s = dt.shape[-1]
        decay = torch.exp(dt.to(dtype) * A.to(dtype))
        write = torch.einsum("bgp,bgk->bgpk", values, B.to(dtype))
        write = write[:, :, None] * dt.to(dtype).view(b, g, s // g, 1, 1)
        states = states * decay[..., None, None] + write.flatten(1, 2)
        y = torch.einsum("bsqk,bspk->bsqp", C.to(dtype).view(b, s, -1, C.shape[-1]), states).flatten(1, 2)
        return (divide(y) if normalized else y).to(x.dtype), states
