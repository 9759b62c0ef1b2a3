"""The selective scan on a GPU: our Triton kernels for the contract of `scan.py`, with their backward pass.

The kernels are in `triton_forward.py` and `triton_backward.py`. A launch runs one scan or a pair of them,
such as both directions of a layer. Chunks of 64 tokens are worked on in windows that bound the memory of their
states, whatever the length; a state enters each window from the one before, and the backward pass computes the states
of a window again from there. Only x, B, C, dt, y, the entering states and the normalisers are kept for it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

from .. import launch as tuning
from ..launch import launch, on_device_of
from ..segments import Scan, Segments
from .chunk_table import CHUNK, LaunchPlan, Window, chunk_table, cut_chunks
from .plain import SMALLEST
from .triton_backward import (
    b_grad_kernel,
    c_grad_kernel,
    chunk_state_grads_kernel,
    dt_grad_kernel,
    slopes_kernel,
    x_grad_kernel,
)
from .triton_forward import chunk_states_kernel, output_kernel, pass_states_kernel


# Bytes of the states of a window of chunks; the backward pass holds two such windows.
WINDOW_BYTES = 2**29

Tensors = Sequence[torch.Tensor]  # one of each scan


def _window(state_size: int, plan: LaunchPlan) -> int:
    """Chunks of a window."""
    return max(1, WINDOW_BYTES // (plan.states_dtype.itemsize * state_size))


def _precision() -> str:
    """What products in fp32 are: as PyTorch's own on a GPU."""
    matmul = torch.backends.cuda.matmul
    # once this was set, as Trainer does for tf32=True, PyTorch refuses to answer get_float32_matmul_precision
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


class _Launches:
    """Sizes and arguments that the launches of one or two scans share."""

    def __init__(self, x: Tensors, dt: Tensors, A: Tensors, B: Tensors, C: Tensors, plan: LaunchPlan):
        (_, g, p), s, (_, h, k) = x[0].shape, dt[0].shape[-1], C[0].shape
        self.h, self.s, self.g, self.r, self.q, self.p, self.k = h, s, g, s // g, h // s, p, k
        self.size = (p + plan.normalized) * k
        self.table = chunk_table(plan, _window(s * self.size, plan), x[0].device)
        self.states_dtype = plan.states_dtype
        self.x, self.dt, self.B, self.C = (
            tuple((t, t.stride(0), t.stride(1)) for t in tensors) for tensors in (x, dt, B, C)
        )
        self.A = tuple(A)
        self.options = {
            "L": CHUNK, "NORMALIZED": plan.normalized, "PAIR": len(x) == 2,
            "PRECISION": _precision(),
        }  # fmt: skip
        self.dtype, self.device = x[0].dtype, x[0].device

    def __call__(self, kernel: Any, grid: Callable[..., tuple[int, ...]], *args: Any) -> None:
        """Launches a kernel of tiles; `grid(tiles of p, tiles of k)` gives its programs."""

        def shape(config: tuning.Config) -> tuple[int, ...]:
            return grid(triton.cdiv(self.p, config.BP), triton.cdiv(self.k, config.BK))

        def run(config: tuning.Config) -> None:
            launch(kernel, shape(config), *args, **self.options, **config._asdict())

        configs = tuning.configurations(kernel, self.p, self.k, self.dtype)
        key = (
            kernel.fn.__name__,
            self.dtype,
            self.states_dtype,
            self.r,
            self.q,
            self.p,
            self.k,
            *self.options.values(),
        )
        run(tuning.choose(configs, key, shape(configs[0])[0], self.device, run))

    def window_buffers(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chunks = max(stop - start for start, stop, _, _ in self.table.windows)
        states = like.new_empty(chunks, self.s, self.size, dtype=self.states_dtype)
        return states, like.new_empty(chunks, self.s, dtype=torch.float32)

    def chunk_states(self, window: Window, states: torch.Tensor, decays: torch.Tensor) -> None:
        start, stop, _, _ = window
        self(
            chunk_states_kernel, lambda tiles_p, tiles_k: (stop - start, self.s, tiles_p * tiles_k),
            self.x, self.dt, self.A, self.B, self.table.chunks[start:stop], states, decays,
            self.s, self.r, self.p, self.k,
        )  # fmt: skip

    def pass_states(
        self, window: Window, states: torch.Tensor, decays: torch.Tensor, entries: torch.Tensor,
        finals: torch.Tensor | None, reverse: bool = False, keep: bool = True,
    ) -> None:  # fmt: skip
        _, _, first, last = window
        launch(
            pass_states_kernel, (last - first, self.s, triton.cdiv(self.size, 512)),
            states, decays, self.table.pieces, entries, finals, first, self.table.entries, self.s, self.size,
            BLOCK=512, REVERSE=reverse, HAS_FINALS=finals is not None, KEEP=keep, num_warps=4,
        )  # fmt: skip


@torch.library.custom_op("linmu_hf::ssd_forward", mutates_args=())
def ssd_forward(
    x: list[torch.Tensor], dt: list[torch.Tensor], A: list[torch.Tensor], B: list[torch.Tensor],
    C: list[torch.Tensor], initial_states: list[torch.Tensor],
    lengths: list[int], counts: list[int], starts: list[bool], ends: list[bool], normalized: bool, half_states: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """
    Runs one or two scans: lists have an entry for each, but for `initial_states`, which only those in `starts` have.

    Returns:
        `list[torch.Tensor]`: y of each scan, the final states that are wanted, the states that enter the windows, and
        the normalisers of each scan.
    """
    plan = _plan(lengths, counts, starts, ends, normalized, half_states)
    scan = _Launches(x, dt, A, B, C, plan)
    outputs = _outputs(x, dt, B, C, plan)
    y, finals, entries, sums = _split(outputs, len(x))
    first = 0
    for given in initial_states:
        entries[first : first + len(given)] = given
        first += len(given)
    states, decays = scan.window_buffers(x[0])
    with on_device_of(x[0]):
        for window in scan.table.windows:
            scan.chunk_states(window, states, decays)
            scan.pass_states(window, states, decays, entries, finals if len(finals) else None)
            start, stop, _, _ = window
            scan(
                output_kernel, lambda tiles_p, _, n=stop - start: (n, scan.h, tiles_p),
                scan.x, scan.dt, scan.A, scan.B, scan.C, scan.table.chunks[start:stop], states, y, sums,
                scan.h, scan.s, scan.r, scan.q, scan.p, scan.k, SMALLEST,
            )  # fmt: skip
    return outputs


def _plan(
    lengths: Sequence[int], counts: Sequence[int], starts: Sequence[bool], ends: Sequence[bool],
    normalized: bool, half_states: bool,
) -> LaunchPlan:  # fmt: skip
    lengths = tuple(int(length) for length in lengths)
    return LaunchPlan(lengths, tuple(counts), tuple(starts), tuple(ends), normalized, half_states)


def _outputs(x: Tensors, dt: Tensors, B: Tensors, C: Tensors, plan: LaunchPlan) -> list[torch.Tensor]:
    p, h, s, k = x[0].shape[2], C[0].shape[1], dt[0].shape[1], B[0].shape[2]
    state = (s, p + plan.normalized, k)
    entries = cut_chunks(plan, _window(s * (p + plan.normalized) * k, plan))[3]
    y = [one.new_empty(len(one), h, p) for one in x]
    states = [x[0].new_empty(count, *state, dtype=torch.float32) for count in (plan.states_after(), entries)]
    return [*y, *states, *(one.new_empty(len(one) if plan.normalized else 0, h, dtype=torch.float32) for one in x)]


def _split(
    outputs: Tensors, scans: int
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """y of the scans, final states, entering states, normalisers of the scans."""
    return tuple(outputs[:scans]), outputs[scans], outputs[scans + 1], tuple(outputs[scans + 2 :])


@ssd_forward.register_fake
def _(
    x: Tensors, dt: Tensors, A: Tensors, B: Tensors, C: Tensors, initial_states: Tensors, *plan: Any
) -> list[torch.Tensor]:
    return _outputs(x, dt, B, C, _plan(*plan))


@torch.library.custom_op("linmu_hf::ssd_backward", mutates_args=())
def ssd_backward(
    dy: list[torch.Tensor], dfinals: torch.Tensor | None,
    x: list[torch.Tensor], dt: list[torch.Tensor], A: list[torch.Tensor], B: list[torch.Tensor],
    C: list[torch.Tensor],
    y: list[torch.Tensor], entries: torch.Tensor, sums: list[torch.Tensor],
    lengths: list[int], counts: list[int], starts: list[bool], ends: list[bool], normalized: bool, half_states: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """Returns the gradients of x, dt, A, B and C of each scan, in this order, and of all initial states."""
    plan = _plan(lengths, counts, starts, ends, normalized, half_states)
    scan = _Launches(x, dt, A, B, C, plan)
    table, scans = scan.table, len(x)
    grads = _gradients(x, dt, A, B, C, plan)
    dx, ddt, dA, dB, dC = (tuple(grads[i : i + scans]) for i in range(0, 5 * scans, scans))
    dys = tuple(one.contiguous() for one in dy)
    dfinals = None if dfinals is None else dfinals.contiguous()
    dentries = torch.empty_like(entries)
    chunk_dA = entries.new_empty(len(table.chunks), scan.s)
    scales, slopes = tuple(sums), tuple(torch.empty_like(one) for one in sums)
    (states, decays), (dstates, _) = scan.window_buffers(x[0]), scan.window_buffers(x[0])
    sizes = (scan.h, scan.s, scan.r, scan.q, scan.p, scan.k, SMALLEST)
    with on_device_of(x[0]):
        for n, slope, one, done in zip(scales, slopes, dys, y) if normalized else ():
            launch(
                slopes_kernel, (triton.cdiv(n.numel(), 16),), done, one, n, slope, n.numel(), scan.p, SMALLEST,
                ROWS=16, BP=tuning.tile(scan.p, 128), num_warps=4,
            )  # fmt: skip
        for window in reversed(table.windows):
            start, stop, _, _ = window
            chunks, n = table.chunks[start:stop], stop - start
            scan.chunk_states(window, states, decays)
            scan.pass_states(window, states, decays, entries, None, keep=False)
            scan(
                chunk_state_grads_kernel, lambda tiles_p, tiles_k, n=n: (n, scan.s, tiles_p * tiles_k),
                dys, scan.dt, scan.A, scan.C, chunks, scales, slopes, dstates,
                scan.h, scan.s, scan.q, scan.p, scan.k, SMALLEST,
            )  # fmt: skip
            scan.pass_states(window, dstates, decays, dentries, dfinals, reverse=True)
            scan(
                c_grad_kernel, lambda _, tiles_k, n=n: (n, scan.h, tiles_k),
                scan.x, dys, scan.dt, scan.A, scan.B, chunks, states, scales, slopes, dC, *sizes,
            )  # fmt: skip
            scan(
                b_grad_kernel, lambda _, tiles_k, n=n: (n, scan.g, tiles_k),
                scan.x, dys, scan.dt, scan.A, scan.C, chunks, dstates, scales, slopes, dB, *sizes,
            )  # fmt: skip
            scan(
                x_grad_kernel, lambda tiles_p, _, n=n: (n, scan.g, tiles_p),
                dys, scan.dt, scan.A, scan.B, scan.C, chunks, dstates, scales, slopes, dx, *sizes,
            )  # fmt: skip
            scan(
                dt_grad_kernel, lambda _, __, n=n: (n, scan.s),
                scan.x, dys, scan.dt, scan.A, scan.B, scan.C, chunks, states, dstates, scales, slopes,
                ddt, chunk_dA[start:stop], *sizes,
            )  # fmt: skip
    for gradient, part in zip(dA, (chunk_dA[: table.second], chunk_dA[table.second :])):
        torch.sum(part, 0, out=gradient)
    grads[-1].copy_(dentries[: len(grads[-1])])
    return grads


def _gradients(x: Tensors, dt: Tensors, A: Tensors, B: Tensors, C: Tensors, plan: LaunchPlan) -> list[torch.Tensor]:
    def new(t: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    tokens = [[new(t) for t in tensors] for tensors in (x, dt, B, C)]
    state = (plan.states_before(), dt[0].shape[1], x[0].shape[2] + plan.normalized, B[0].shape[2])
    dinitial = x[0].new_empty(state, dtype=torch.float32)
    return [*tokens[0], *tokens[1], *(torch.empty_like(t) for t in A), *tokens[2], *tokens[3], dinitial]


@ssd_backward.register_fake
def _(
    dy: Tensors, dfinals: torch.Tensor | None, x: Tensors, dt: Tensors, A: Tensors, B: Tensors, C: Tensors,
    y: Tensors, entries: torch.Tensor, sums: Tensors, *plan: Any,
) -> list[torch.Tensor]:  # fmt: skip
    return _gradients(x, dt, A, B, C, _plan(*plan))


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    *tensors, initial_states = inputs[:6]
    ctx.plan = inputs[6:]
    y, _, entries, sums = _split(output, len(tensors[0]))
    groups = (*tensors, y, (entries,), sums)
    ctx.save_for_backward(*(t for group in groups for t in group))
    ctx.sizes = [len(group) for group in groups]
    ctx.initial = [(len(t), t.dtype) for t in initial_states]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[torch.Tensor | None]) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    *inputs, y, (entries,), sums = ([next(saved) for _ in range(size)] for size in ctx.sizes)
    scans = len(y)
    dy = [torch.zeros_like(one) if grad is None else grad for grad, one in zip(grads, y)]
    *found, dinitial = ssd_backward(dy, grads[scans], *inputs, y, entries, sums, *ctx.plan)
    dx, ddt, dA, dB, dC = (found[i : i + scans] for i in range(0, 5 * scans, scans))
    dinitial = dinitial.split([count for count, _ in ctx.initial]) if ctx.initial else []
    dinitial = [grad.to(dtype) for grad, (_, dtype) in zip(dinitial, ctx.initial)]
    return dx, ddt, dA, dB, dC, dinitial, *[None] * len(ctx.plan)


ssd_forward.register_autograd(_backward, setup_context=_save)


def ssd_triton(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, segments: Segments,
    initial_states: torch.Tensor | None = None, *, normalized: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """
    Runs the scan by our kernels; arguments and results as in [`~linmu_hf.ops.ssd.scan.ssd`]. x, B and C are read in
    place (only their last dimension has to be contiguous), and multiplied in x's dtype with sums in fp32.

    Raises:
        `ValueError`: Shapes that do not fit together, which a kernel would not notice.
    """
    (y,), finals = _scan([Scan(x, dt, A, B, C, segments, initial_states)], (True,), normalized)
    return y, finals


def ssd_triton_pair(
    first: Scan, second: Scan, normalized: bool = False, final_states: bool = True
) -> tuple[tuple[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, None]]:
    """
    Runs two scans with the same head sizes in one launch of each kernel, such as the two directions of a layer. They
    may differ in tokens and segments, and share tensors.

    Returns:
        `tuple[tuple[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, None]]`: y and final states of each scan:
        `None` with `final_states=False`, and always of the second, whose final states are not needed.

    Raises:
        `ValueError`: As in [`ssd_triton`], and head sizes or data types that differ.
    """
    sizes = [(scan.x.dtype, *scan.x.shape[1:], scan.dt.shape[1], *scan.C.shape[1:]) for scan in (first, second)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"two scans of one launch must have the same data type and heads, not {sizes[0]}, {sizes[1]}")
    y, finals = _scan([first, second], (final_states, False), normalized)
    return (y[0], finals if final_states else None), (y[1], None)


def _scan(scans: list[Scan], ends: tuple[bool, ...], normalized: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    """y of each scan, and the final states that are wanted."""
    for scan in scans:
        _check(*scan, normalized)

    def each(name: str, dtype: torch.dtype) -> "list[torch.Tensor]":
        tensors = (getattr(scan, name).to(dtype) for scan in scans)
        return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]

    dtype = scans[0].x.dtype
    tensors = [t for scan in scans for t in (*scan[:5], scan.initial_states) if t is not None]
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    outputs = ssd_forward(
        each("x", dtype), each("dt", torch.float32), each("A", torch.float32), each("B", dtype), each("C", dtype),
        [scan.initial_states for scan in scans if scan.initial_states is not None],
        [length for scan in scans for length in scan.segments.lengths], [len(scan.segments) for scan in scans],
        [scan.initial_states is not None for scan in scans], list(ends), normalized,
        dtype == torch.bfloat16 and not learns,
    )  # fmt: skip
    return outputs[: len(scans)], outputs[len(scans)]


def _check(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, segments: Segments,
    initial_states: torch.Tensor | None, normalized: bool,
) -> None:  # fmt: skip
    (n, g, p), s, h, k = x.shape, dt.shape[-1], C.shape[1], C.shape[2]
    if s % g or h % s:
        raise ValueError(f"{h} query heads, {s} state heads, {g} key/value heads: each must be a multiple of the next")
    expected = {"dt": (n, s), "A": (s,), "B": (n, g, k), "C": (n, h, k)}
    expected["initial_states"] = (len(segments), s, p + normalized, k)
    given = {"dt": dt, "A": A, "B": B, "C": C, "initial_states": initial_states}
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != expected[name]:
            raise ValueError(f"{name} has shape {list(tensor.shape)} where x and C ask for {list(expected[name])}")
    if n != sum(segments.lengths):
        raise ValueError(f"x has {n} tokens and the segments {sum(segments.lengths)}")
