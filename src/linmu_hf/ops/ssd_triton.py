"""The selective scan on a GPU: our Triton kernels behind the contract of `ssd.py`, with their backward pass.

The kernels are in `ssd_triton_forward.py` and `ssd_triton_backward.py`. Chunks of 64 tokens are worked on in windows
that bound the memory of their states, whatever the length; a state enters each window from the one before, and the
backward pass computes the states of a window again from there. Only x, B, C, dt, y, the entering states and the
normalisers are kept for it.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

from .ssd_triton_backward import (
    b_grad_kernel,
    c_grad_kernel,
    chunk_state_grads_kernel,
    dt_grad_kernel,
    slopes_kernel,
    x_grad_kernel,
)
from .ssd_triton_forward import chunk_states_kernel, output_kernel, pass_states_kernel


CHUNK = 64
# Bytes of the states of a window of chunks; the backward pass holds two such windows.
WINDOW_BYTES = 2**29
# Smallest normaliser that is divided by.
SMALLEST = torch.finfo(torch.float32).tiny ** 0.5


@dataclass(frozen=True)
class ChunkTable:
    """
    Chunks of packed segments, and the pieces of segments that share a window of chunks, as the kernels read them.

    Args:
        chunks (`torch.LongTensor` of shape `[c, 2]`): First token and number of tokens.
        pieces (`torch.LongTensor` of shape `[i, 3]`): First chunk within its window, number of chunks, and where its
            last state goes: the piece that goes on, or `i` + the segment that ends.
        windows (`tuple[tuple[int, int, int, int], ...]`): First and last chunk, first and last piece of each window.
        first_pieces (`torch.LongTensor` of shape `[m]` or `None`): First piece of each segment, if some have several.
    """

    chunks: torch.Tensor
    pieces: torch.Tensor
    windows: tuple[tuple[int, int, int, int], ...]
    first_pieces: torch.Tensor | None


@lru_cache(maxsize=64)
def _cut(lengths: tuple[int, ...], window: int):
    """Rows of the tables of a [`ChunkTable`]: chunks, pieces, windows, first pieces."""
    chunks: list[tuple[int, int]] = []
    pieces: list[tuple[int, int, int]] = []
    windows, first_pieces, token, used = [(0, 0)], [], 0, 0
    for segment, length in enumerate(lengths):
        first_pieces.append(len(pieces))
        left = -(-length // CHUNK)
        while left:
            if used == window:
                windows.append((len(chunks), len(pieces)))
                used = 0
            count = min(left, window - used)
            left -= count
            pieces.append((used, count, len(pieces) + 1 if left else -1 - segment))
            used += count
            for _ in range(count):
                chunks.append((token, min(CHUNK, length)))
                token, length = token + chunks[-1][1], length - chunks[-1][1]
    n = len(pieces)
    pieces = [(first, count, to if to >= 0 else n - 1 - to) for first, count, to in pieces]
    ends = [*windows[1:], (len(chunks), n)]
    spans = tuple((chunk, end[0], piece, end[1]) for (chunk, piece), end in zip(windows, ends))
    return chunks, pieces, spans, first_pieces


@lru_cache(maxsize=16)
def chunk_table(lengths: tuple[int, ...], window: int, device: torch.device) -> ChunkTable:
    """Cuts segments of `lengths` tokens into chunks, and the chunks into windows of at most `window`."""
    chunks, pieces, windows, first_pieces = _cut(lengths, window)
    one_each = len(pieces) == len(lengths)
    chunks, pieces, first_pieces = (torch.tensor(rows).to(device) for rows in (chunks, pieces, first_pieces))
    return ChunkTable(chunks, pieces, windows, None if one_each else first_pieces)


def launch(kernel, grid, *args, **options):
    kernel[grid](*args, **options)


def _tile(size: int, limit: int) -> int:
    return max(16, min(limit, triton.next_power_of_2(size)))


def _window(state_size: int) -> int:
    """Chunks of a window."""
    return max(1, WINDOW_BYTES // (4 * state_size))


class _Scan:
    """Sizes, tiles and arguments that the launches of one scan share."""

    def __init__(self, x, dt, A, B, C, index, lengths, normalized):
        _, self.g, self.p = x.shape
        self.s, self.h, self.k = dt.shape[-1], C.shape[1], B.shape[-1]
        self.r, self.q = self.s // self.g, self.h // self.s
        self.normalized, self.size = normalized, (self.p + normalized) * self.k
        self.table = chunk_table(tuple(lengths), _window(self.s * self.size), x.device)
        self.x, self.B, self.C = ((t, t.stride(0), t.stride(1)) for t in (x, B, C))
        self.dt, self.index = (dt, dt.stride(0), A), index
        precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        self.options = {
            "L": CHUNK, "NORMALIZED": normalized, "HAS_INDEX": index is not None, "PRECISION": precision,
        }  # fmt: skip
        self.half = x.dtype != torch.float32

    def tiles(self, p: int, k: int, **options):
        """Options of a launch with tiles of at most p and k (half of it in fp32), and how many tiles there are."""
        options["num_warps"] = options["num_warps"] if self.half else 8
        bp, bk = (_tile(size, limit if self.half else limit // 2) for size, limit in ((self.p, p), (self.k, k)))
        return triton.cdiv(self.p, bp), triton.cdiv(self.k, bk), {**self.options, "BP": bp, "BK": bk, **options}

    def window_buffers(self, like):
        chunks = max(stop - start for start, stop, _, _ in self.table.windows)
        states = like.new_empty(chunks, self.s, self.size, dtype=torch.float32)
        return states, like.new_empty(chunks, self.s, dtype=torch.float32)

    def chunk_states(self, window, states, decays):
        start, stop, _, _ = window
        tiles_p, tiles_k, options = self.tiles(128, 64, num_warps=4, num_stages=1)
        launch(
            chunk_states_kernel, (stop - start, self.s, tiles_p * tiles_k),
            *self.x, *self.dt, *self.B, self.table.chunks[start:stop], self.index, states, decays,
            self.s, self.r, self.p, self.k, **options,
        )  # fmt: skip

    def pass_states(self, window, states, decays, entries, finals, reverse=False, keep=True):
        _, _, first, last = window
        launch(
            pass_states_kernel, (last - first, self.s, triton.cdiv(self.size, 512)),
            states, decays, self.table.pieces, entries, finals, first, len(self.table.pieces), self.s, self.size,
            BLOCK=512, REVERSE=reverse, HAS_FINALS=finals is not None, KEEP=keep, num_warps=4,
        )  # fmt: skip


@torch.library.custom_op("linmu_hf::ssd_forward", mutates_args=())
def ssd_forward(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    initial_states: torch.Tensor | None, index: torch.Tensor | None, lengths: list[int], normalized: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """y, final states, states that enter the windows, normalisers."""
    scan = _Scan(x, dt, A, B, C, index, lengths, normalized)
    table = scan.table
    y, finals, entries, sums = _outputs(x, dt, C, B, index, lengths, normalized)
    if initial_states is None:
        entries.zero_()
    elif table.first_pieces is None:
        entries.copy_(initial_states)
    else:
        entries[table.first_pieces] = initial_states.to(entries)
    states, decays = scan.window_buffers(x)
    tiles_p, _, options = scan.tiles(128, 64, num_warps=8, num_stages=2)
    with torch.cuda.device(x.device if x.is_cuda else -1):
        for window in table.windows:
            scan.chunk_states(window, states, decays)
            scan.pass_states(window, states, decays, entries, finals)
            start, stop, _, _ = window
            launch(
                output_kernel, (stop - start, scan.h, tiles_p),
                *scan.x, *scan.dt, *scan.B, *scan.C, table.chunks[start:stop], index, states, y, sums,
                scan.h, scan.s, scan.r, scan.q, scan.p, scan.k, SMALLEST, **options,
            )  # fmt: skip
    return y, finals, entries, sums


def _outputs(x, dt, C, B, index, lengths, normalized):
    (n, _, p), h, s, k = x.shape, C.shape[1], dt.shape[1], B.shape[2]
    pieces = len(_cut(tuple(int(length) for length in lengths), _window(s * (p + normalized) * k))[1])
    new = x.new_empty if index is None else x.new_zeros  # rows that the index leaves out
    finals, entries = (
        x.new_empty(count, s, p + normalized, k, dtype=torch.float32) for count in (len(lengths), pieces)
    )
    return new(n, h, p), finals, entries, x.new_empty(n if normalized else 0, h, dtype=torch.float32)


@ssd_forward.register_fake
def _(x, dt, A, B, C, initial_states, index, lengths, normalized):
    return _outputs(x, dt, C, B, index, lengths, normalized)


@torch.library.custom_op("linmu_hf::ssd_backward", mutates_args=())
def ssd_backward(
    dy: torch.Tensor, dfinals: torch.Tensor | None,
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    index: torch.Tensor | None, y: torch.Tensor, entries: torch.Tensor, sums: torch.Tensor,
    lengths: list[int], normalized: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of x, dt, A, B, C and the initial states."""
    scan = _Scan(x, dt, A, B, C, index, lengths, normalized)
    table, s, p, k = scan.table, scan.s, scan.p, scan.k
    dx, ddt, _, dB, dC, _ = _gradients(x, dt, A, B, C, index, lengths, normalized)
    dy = dy.contiguous()
    dfinals = None if dfinals is None else dfinals.contiguous()
    dentries = torch.empty_like(entries)
    dA = x.new_empty(len(table.chunks), s, dtype=torch.float32)
    slopes = torch.empty_like(sums)
    (states, decays), (dstates, _) = scan.window_buffers(x), scan.window_buffers(x)
    sizes = (scan.h, s, scan.r, scan.q, p, k, SMALLEST)
    with torch.cuda.device(x.device if x.is_cuda else -1):
        if normalized:
            block = 16
            launch(
                slopes_kernel, (triton.cdiv(sums.numel(), block),), y, dy, sums, slopes, sums.numel(), p, SMALLEST,
                ROWS=block, BP=_tile(p, 128), num_warps=4,
            )  # fmt: skip
        for window in reversed(table.windows):
            start, stop, _, _ = window
            chunks, n = table.chunks[start:stop], stop - start
            scan.chunk_states(window, states, decays)
            scan.pass_states(window, states, decays, entries, None, keep=False)
            tiles_p, tiles_k, options = scan.tiles(128, 64, num_warps=4, num_stages=2)
            launch(
                chunk_state_grads_kernel, (n, s, tiles_p * tiles_k),
                dy, *scan.dt, *scan.C, chunks, index, sums, slopes, dstates,
                scan.h, s, scan.q, p, k, SMALLEST, **options,
            )  # fmt: skip
            scan.pass_states(window, dstates, decays, dentries, dfinals, reverse=True)
            tiles_p, tiles_k, options = scan.tiles(64, 128, num_warps=8, num_stages=2)
            launch(
                c_grad_kernel, (n, scan.h, tiles_k),
                *scan.x, dy, *scan.dt, *scan.B, chunks, index, states, sums, slopes, dC, *sizes, **options,
            )  # fmt: skip
            tiles_p, tiles_k, options = scan.tiles(64, 128, num_warps=8, num_stages=2)
            launch(
                b_grad_kernel, (n, scan.g, tiles_k),
                *scan.x, dy, *scan.dt, *scan.C, chunks, index, dstates, sums, slopes, dB, *sizes, **options,
            )  # fmt: skip
            tiles_p, tiles_k, options = scan.tiles(128, 64, num_warps=8, num_stages=2)
            launch(
                x_grad_kernel, (n, scan.g, tiles_p),
                dy, *scan.dt, *scan.B, *scan.C, chunks, index, dstates, sums, slopes, dx, *sizes, **options,
            )  # fmt: skip
            tiles_p, tiles_k, options = scan.tiles(64, 64, num_warps=8, num_stages=2)
            launch(
                dt_grad_kernel, (n, s),
                *scan.x, dy, *scan.dt, *scan.B, *scan.C, chunks, index, states, dstates, sums, slopes,
                ddt, dA[start:stop], *sizes, **options,
            )  # fmt: skip
    dinitial = dentries if table.first_pieces is None else dentries[table.first_pieces]
    return dx, ddt, dA.sum(0).to(A.dtype), dB, dC, dinitial


def _gradients(x, dt, A, B, C, index, lengths, normalized):
    def new(t):
        return torch.empty_like(t, memory_format=torch.contiguous_format) if index is None else t.new_zeros(t.shape)

    state = (len(lengths), dt.shape[1], x.shape[2] + normalized, B.shape[2])
    return new(x), new(dt), torch.empty_like(A), new(B), new(C), x.new_empty(state, dtype=torch.float32)


@ssd_backward.register_fake
def _(dy, dfinals, x, dt, A, B, C, index, y, entries, sums, lengths, normalized):
    return _gradients(x, dt, A, B, C, index, lengths, normalized)


def _save(ctx, inputs, output):
    x, dt, A, B, C, initial_states, index, ctx.lengths, ctx.normalized = inputs
    y, _, entries, sums = output
    ctx.save_for_backward(x, dt, A, B, C, index, y, entries, sums)
    ctx.initial_dtype = None if initial_states is None else initial_states.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinals, dentries, dsums):
    y = ctx.saved_tensors[6]
    dy = torch.zeros_like(y) if dy is None else dy
    *grads, dinitial = ssd_backward(dy, dfinals, *ctx.saved_tensors, ctx.lengths, ctx.normalized)
    dinitial = None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype)
    return *grads, dinitial, None, None, None


ssd_forward.register_autograd(_backward, setup_context=_save)


def ssd_triton(x, dt, A, B, C, segments, initial_states=None, *, normalized=False, index=None):
    """
    The scan by our kernels; arguments and results as in [`~linmu_hf.ops.ssd.ssd`]. x, B and C are read where they
    lie (only their last dimension has to be contiguous), and multiplied in x's dtype with sums in fp32.

    Raises:
        `ValueError`: Shapes that do not fit together, which a kernel would not notice.
    """
    _check(x, dt, A, B, C, segments, initial_states, normalized, index)
    x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, B.to(x.dtype), C.to(x.dtype)))
    dt = dt.float()
    dt = dt if dt.stride(-1) == 1 else dt.contiguous()
    y, finals, *_ = ssd_forward(
        x, dt, A.float().contiguous(), B, C, initial_states, index, list(segments.lengths), normalized
    )
    return y, finals


def _check(x, dt, A, B, C, segments, initial_states, normalized, index):
    (n, g, p), s, h, k = x.shape, dt.shape[-1], C.shape[1], C.shape[2]
    if s % g or h % s:
        raise ValueError(f"{h} query heads, {s} state heads, {g} key/value heads: each must be a multiple of the next")
    expected = {"dt": (n, s), "A": (s,), "B": (n, g, k), "C": (n, h, k), "index": (sum(segments.lengths),)}
    expected["initial_states"] = (len(segments), s, p + normalized, k)
    given = {"dt": dt, "A": A, "B": B, "C": C, "index": index, "initial_states": initial_states}
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != expected[name]:
            raise ValueError(f"{name} has shape {list(tensor.shape)} where x and C ask for {list(expected[name])}")
    if index is None and n != sum(segments.lengths):
        raise ValueError(f"x has {n} tokens and the segments {sum(segments.lengths)}; pass the index of those scanned")
