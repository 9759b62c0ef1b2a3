"""The selective scan in plain PyTorch: the recurrence (the truth) and its chunked form.

Contract and glossary: `scan.py`. Inside a chunk (l and r count its tokens, c counts chunks), with a_l the running sum
of dt * A, the chunked form is

    1. within the chunk     y_l += sum_{r <= l} exp(a_l - a_r) dt_r (C_l . B_r) x_r
    2. state of the chunk   S_c  = sum_r exp(a_end - a_r) dt_r x_r B_r^T
    3. from chunk to chunk  h_c  = exp(a_end) h_{c-1} + S_c
    4. from before          y_l += exp(a_l) C_l . h_{c-1}

Chunks are worked through in pieces, superchunk by superchunk. On a CPU a piece is what its cache holds, and every
tensor between the inputs and y is as small as that. For the backward pass only the inputs and the states that enter
each superchunk are kept; it computes the rest again.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import multiplies_in_bfloat16
from ..segments import Segments


# Bytes between the inputs and y of one piece: about the second-level cache of one core.
CACHE_BYTES = 2**21

# Tokens of a superchunk.
SUPERCHUNK = 4096

# Smallest normaliser that is divided by.
SMALLEST = torch.finfo(torch.float32).tiny ** 0.5

Piece = list[slice]  # of each step the segments whose states it changes


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def ssd_recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, segments: Segments,
    initial_states: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scans token by token, as Eq. 1 is written."""
    dtype = _compute_dtype(x)
    (n, g, p), s, k = x.shape, dt.shape[-1], B.shape[-1]
    per_group = s // g
    x_s = x.to(dtype).repeat_interleave(per_group, dim=1)
    B_s = B.to(dtype).repeat_interleave(per_group, dim=1)
    C_s = C.to(dtype).view(n, s, -1, k)
    dt, A = dt.to(dtype), A.to(dtype)
    outputs, finals, start = [], [], 0
    for segment, length in enumerate(segments.lengths):
        h = x.new_zeros(s, p, k, dtype=dtype) if initial_states is None else initial_states[segment].to(dtype)
        for t in range(start, start + length):
            decay = torch.exp(dt[t] * A)[:, None, None]
            h = decay * h + dt[t, :, None, None] * x_s[t, :, :, None] * B_s[t, :, None, :]
            outputs.append(torch.einsum("sqk,spk->sqp", C_s[t], h).flatten(0, 1))
        finals.append(h)
        start += length
    return torch.stack(outputs).to(x.dtype), torch.stack(finals)


def ssd_chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, segments: Segments,
    initial_states: Tensor | None = None, superchunk: int = SUPERCHUNK, piece: int | None = None,
    divided: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """
    Computes the chunked form as batched matrix products. PyTorch's deterministic mode has no cumulative sum on CUDA
    and refuses it there.

    Args:
        superchunk (`int`, *optional*, defaults to `SUPERCHUNK`): Tokens between states that the backward pass keeps.
        piece (`int`, *optional*):
            Most tokens of a piece; at least one chunk is taken. By default what fits into the cache on a CPU, and a
            superchunk elsewhere.
        divided (`bool`, *optional*): Divides the channels of y by the last of them and leaves that out; for inputs
            that need no gradients. On a CPU that has them, products of bfloat16 inputs are then those of bfloat16, as
            in our kernels: their sums, the decays and the states that are carried on stay in float32.
    """
    out_dtype, rank = x.dtype, segments.rank
    dtype = x.dtype if divided and multiplies_in_bfloat16(x) else _compute_dtype(x)
    (n, _, p), s, (h, k) = x.shape, dt.shape[-1], C.shape[1:]
    size = segments.chunk_size
    if piece is None:
        per_chunk = dtype.itemsize * (size * h * (k + 2 * size + p) + 2 * s * p * k)
        piece = size * (CACHE_BYTES // per_chunk) if x.device.type == "cpu" else superchunk
    if initial_states is not None:
        initial_states = initial_states.to(_compute_dtype(x))
        if rank is not None:
            initial_states = torch.zeros_like(initial_states).index_copy(0, rank, initial_states)
    x, B, C = (_to_chunks(tensor.to(dtype), segments) for tensor in (x, B, C))
    dt, A = _to_chunks(dt.to(_compute_dtype(x)), segments), A.to(_compute_dtype(x))
    pieces = _pieces(segments.steps, max(min(piece, superchunk) // size, 1))
    if divided:
        y, finals = _scan(x, dt, B, C, A, initial_states, len(segments), [pieces], divided=True)
    else:
        superchunks = _superchunks(pieces, max(superchunk // size, 1))
        y, finals = _Scan.apply(x, dt, B, C, A, initial_states, len(segments), superchunks)
    y = y.flatten(0, 1)
    if segments.slots is not None:
        y = y[:n] if len(segments) == 1 else y.index_select(0, segments.slots)
    return y.to(out_dtype), finals if rank is None else finals.index_select(0, rank)


def normalize(
    form: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, segments: Segments,
    initial_states: Tensor | None, normalized: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Runs a form of the scan that knows no `normalized`."""
    if not normalized:
        return form(x, dt, A, B, C, segments, initial_states)
    inputs = (t for t in (x, dt, A, B, C, initial_states) if t is not None)
    divided = form is ssd_chunked and not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs))
    # the form answers in x's dtype, and half precision does not hold the small sums that are divided
    values = x if divided else x.to(torch.promote_types(x.dtype, torch.float32))
    values = torch.cat([values, values.new_ones(*x.shape[:-1], 1)], dim=-1)
    y, states = form(values, dt, A, B, C, segments, initial_states, **({"divided": True} if divided else {}))
    return y if divided else divide(y).to(x.dtype), states


def divide(y: Tensor) -> Tensor:
    return y[..., :-1] / y[..., -1:].clamp_min(SMALLEST)


def _to_chunks(tensor: Tensor, segments: Segments) -> Tensor:
    """[n, ...] -> [c, chunk_size, ...], segments padded with zeros to whole chunks (dt = 0 leaves states alone)."""
    if segments.slots is not None:
        padding = sum(segments.steps) * segments.chunk_size - len(tensor)
        if len(segments) == 1:
            tensor = torch.cat([tensor, tensor.new_zeros(padding, *tensor.shape[1:])])
        else:
            padded = tensor.new_zeros(len(tensor) + padding, *tensor.shape[1:])
            tensor = padded.index_copy(0, segments.slots, tensor)
    return tensor.reshape(-1, segments.chunk_size, *tensor.shape[1:])


def _pieces(steps: Sequence[int], most: int) -> list[Piece]:
    """
    Pieces of at most `most` chunks in their order, each a list of steps: the segments whose states a step changes.

    >>> _pieces((3, 1, 1), 2)
    [[slice(0, 2)], [slice(2, 3)], [slice(0, 1), slice(0, 1)]]
    """
    pieces: list[Piece] = []
    room = 0
    for count in steps:
        first = 0
        while first < count:
            if not room or (first == 0 and count > room):
                pieces.append([])
                room = most
            taken = min(count - first, room)
            pieces[-1].append(slice(first, first + taken))
            first, room = first + taken, room - taken
    return pieces


def _superchunks(pieces: list[Piece], most: int) -> list[list[Piece]]:
    """The pieces in groups of at most `most` chunks, or of one piece."""
    groups: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if _count(piece) > room:
            groups.append([])
            room = most
        groups[-1].append(piece)
        room -= _count(piece)
    return groups


def _count(piece: Piece) -> int:
    return sum(step.stop - step.start for step in piece)


def _touched(superchunk: list[Piece]) -> slice:
    """The segments whose states a superchunk changes."""
    steps = [step for piece in superchunk for step in piece]
    return slice(min(step.start for step in steps), max(step.stop for step in steps))


class _Decays(NamedTuple):
    """
    Decays of every chunk, token and state head, [c, s, l]; powers of two, which are faster than powers of e.

    Args:
        a (`torch.Tensor`): Running sum of dt A log2(e) within the chunk.
        written (`torch.Tensor`): a_r - log2(dt_r), so that 2^(a_l - written_r) = exp(dt A ...) dt_r.
        start, end (`torch.Tensor`): Decay from the start of the chunk to the token, and from the token to the end.
        dt (`torch.Tensor`): Step sizes.
    """

    a: Tensor
    written: Tensor
    start: Tensor
    end: Tensor
    dt: Tensor

    @classmethod
    def build(cls, dt: Tensor, A: Tensor) -> "_Decays":
        dt = dt.transpose(1, 2).contiguous()
        a = torch.cumsum(dt * (A * math.log2(math.e))[:, None], dim=-1)
        return cls(a, a - dt.log2(), a.exp2(), (a[..., -1:] - a).exp2_(), dt)

    def of(self, chunks: slice) -> "_Decays":
        return _Decays(*(tensor[chunks] for tensor in self))


def _between(a: Tensor, written: Tensor) -> Tensor:
    """2^(a_l - written_r), [c, s, 1, l, r], zero for r > l, where it could be of any size."""
    return (a[:, :, None, :, None] - written[:, :, None, None, :]).exp2_().tril_()


def _weighted(x: Tensor, weights: Tensor, groups: int) -> Tensor:
    """x [c g, l, p] times [c, s, l] -> [c g, l, r p]"""
    size = weights.shape[-1]
    weights = weights.view(groups, -1, size).transpose(1, 2).contiguous()
    return (x[:, :, None] * weights[..., None]).view(groups, size, -1)


def _by_head(tensor: Tensor, groups: int) -> Tensor:
    """[c, l, heads, d] -> [c g, (heads / g) l, d]"""
    return tensor.transpose(1, 2).reshape(groups, -1, tensor.shape[-1])


def _pass_states(x: Tensor, decays: _Decays, B: Tensor, states: Tensor, piece: Piece) -> Tensor:
    """Steps 2 and 3 for a piece: the states before its chunks, [c, s, p, k]; `states` go on."""
    count, groups = _count(piece), len(x)
    weights = (decays.end * decays.dt).to(x.dtype)
    own = torch.bmm(_weighted(x, weights, groups).transpose(1, 2), B)
    own, at = own.view(count, *states.shape[1:]).to(states.dtype), 0
    before = x.new_empty(own.shape)
    for step in piece:
        chunks = slice(at, at + step.stop - step.start)
        at = chunks.stop
        before[chunks] = states[step]
        torch.addcmul(own[chunks], states[step], decays.start[chunks, :, -1:, None], out=states[step])
    return before


def _scan(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, initial: Tensor | None, m: int,
    superchunks: list[list[Piece]], divided: bool = False, entries: list[Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """
    Chunks [c, l, ...] in the order of `Segments` -> y [c, l, h, p] and final states [m, s, p, k].

    In a piece of c chunks, with s = g r state heads and h = s q query heads: x [c g, l, p], B [c g, l, k],
    C and y [c g, r q l, k or p]. The states that enter each superchunk are added to `entries`, if it is given, or
    `None` where all are zero.
    """
    (c, size, g, p), s, (h, k) = x.shape, dt.shape[-1], C.shape[2:]
    states = x.new_zeros(m, s, p, k, dtype=dt.dtype) if initial is None else initial.clone()
    y = x.new_empty(c, size, h, p - divided)
    all_decays, start = _Decays.build(dt, A), 0
    for superchunk in superchunks:
        if entries is not None:
            zero = initial is None and (start == 0 or start + sum(map(_count, superchunk)) <= m)
            entries.append(None if zero else states[_touched(superchunk)].clone())
        for piece in superchunk:
            now = slice(start, start + _count(piece))
            start, count = now.stop, now.stop - now.start
            decays = all_decays.of(now)
            x_now, B_now, C_now = (_by_head(tensor[now], count * g) for tensor in (x, B, C))
            before = _pass_states(x_now, decays, B_now, states, piece)
            # 1. within the chunk
            scores = torch.bmm(C_now, B_now.transpose(1, 2))
            scores.view(count, s, -1, size, size).mul_(_between(decays.a, decays.written))
            # 4. from before; nothing was before the first chunks
            fresh = min(max(m - now.start, 0), count) if initial is None else 0
            out = x.new_empty(count * s, h // s * size, p)
            out[: fresh * s] = 0
            read = C_now.view(count * s, -1, k)[fresh * s :], before.view(-1, p, k)[fresh * s :].transpose(1, 2)
            torch.bmm(*read, out=out[fresh * s :])
            out.view(count, s, -1, size, p).mul_(decays.start[:, :, None, :, None])
            out = out.view(count * g, -1, p).baddbmm_(scores, x_now).view(count, h, size, p).transpose(1, 2)
            if divided:
                torch.div(out[..., :-1], out[..., -1:].clamp_min(SMALLEST), out=y[now])
            else:
                y[now] = out
    return y, states


class _Scan(torch.autograd.Function):
    """`_scan` with a backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, initial: Tensor | None, m: int,
        superchunks: list[list[Piece]],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        entries: list[Tensor | None] = []
        learns = any(ctx.needs_input_grad)
        y, states = _scan(x, dt, B, C, A, initial, m, superchunks, entries=entries if learns else None)
        ctx.save_for_backward(x, dt, B, C, A, *entries)
        ctx.superchunks, ctx.from_zero = superchunks, initial is None
        return y, states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_states: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, B, C, A, *entries = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            d_states = grad_states.clone()  # carried from the last chunks to the first
            states = torch.empty_like(d_states)
            all_decays = _Decays.build(dt, A)
            dx, dB, dC = (torch.empty_like(tensor) for tensor in (x, B, C))
            ddt, d_logs = (torch.empty_like(all_decays.dt) for _ in range(2))
            stop = len(x)
            for superchunk, entry in zip(reversed(ctx.superchunks), reversed(entries), strict=True):
                states[_touched(superchunk)] = 0 if entry is None else entry
                again, start = [], stop - sum(map(_count, superchunk))
                for piece in superchunk:
                    now = slice(start, start + _count(piece))
                    start, groups = now.stop, _count(piece) * x.shape[2]
                    by_head = _by_head(x[now], groups), all_decays.of(now), _by_head(B[now], groups)
                    again.append((now, piece, _pass_states(*by_head, states, piece)))
                for now, piece, before in reversed(again):
                    dx[now], ddt[now], dB[now], dC[now], d_logs[now] = _backward_piece(
                        x[now], all_decays.of(now), B[now], C[now], grad_y[now], before, d_states, piece
                    )
                stop = again[0][0].start
            dA = (d_logs * all_decays.dt).sum((0, 2))
            ddt += d_logs * A[:, None]
        return dx, ddt.transpose(1, 2), dB, dC, dA, None if ctx.from_zero else d_states, None, None


def _backward_piece(
    x: Tensor, decays: _Decays, B: Tensor, C: Tensor, d_out: Tensor, before: Tensor, d_states: Tensor, piece: Piece
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """
    Gradients of one piece: of x, dt [c, s, l], B, C and the log decays dt A [c, s, l]; `d_states` goes on.

    The decay of token j applies to every pair r < j <= l, and its gradient is summed over just these pairs. Through
    the running sum, the term of token r in y_r would be added and subtracted again, leaving its rounding error.
    """
    (c, size, g, _), (s, p, k) = x.shape, before.shape[1:]
    x, B, C, d_out = (_by_head(tensor, c * g) for tensor in (x, B, C, d_out))
    before = before.view(c * s, p, k)
    by_head = (c, s, -1, size)  # rows of C and y of one state head

    # 4. from before: y += exp(a_l) C_l . h
    d_read = (d_out.view(*by_head, p) * decays.start[:, :, None, :, None]).view(c * s, -1, p)
    dC = torch.bmm(d_read, before)
    read = (dC * C.view_as(dC)).sum(-1).view(by_head).sum(2)
    d_logs = read.flip(-1).cumsum(-1).flip(-1)
    d_before = torch.bmm(d_read.transpose(1, 2), C.view_as(dC)).view(c, s, p, k)

    # 3. from chunk to chunk: h' = exp(a_end) h + S
    d_own, at, ends = torch.empty_like(d_before), c, decays.start[..., -1]
    for step in reversed(piece):
        chunks = slice(at - step.stop + step.start, at)
        at = chunks.start
        d_own[chunks] = d_states[step]
        torch.addcmul(d_before[chunks], d_own[chunks], ends[chunks][..., None, None], out=d_states[step])
    d_logs += (ends * (d_own * before.view_as(d_own)).sum((2, 3)))[..., None]
    d_own = d_own.view(c * g, -1, k)

    # 1. within the chunk: y_l += sum_r M_lr x_r, with M_lr = (C_l . B_r) exp(a_l - a_r) dt_r
    between = _between(decays.a, decays.a)
    d_scores = torch.bmm(d_out, x.transpose(1, 2))
    d_scores.view(*by_head, size).mul_(between)
    scores = torch.bmm(C, B.transpose(1, 2))
    products = (scores * d_scores).view(*by_head, size).sum(2)  # [c, s, l, r]
    ddt = products.sum(2)
    upper = torch.ones(size, size, dtype=x.dtype, device=x.device).triu_().expand(c * s, -1, -1)
    after = torch.bmm(upper, products.mul_(decays.dt[:, :, None]).view(c * s, size, size)).tril_(-1)
    d_logs += after.sum(-1).view_as(d_logs)
    dt_r = decays.dt[:, :, None, None, :]
    d_scores.view(*by_head, size).mul_(dt_r)
    scores.view(*by_head, size).mul_(between.mul_(dt_r))
    dx = torch.bmm(scores.transpose(1, 2), d_out)
    dB = torch.bmm(d_scores.transpose(1, 2), C)
    dC = dC.view_as(C).baddbmm_(d_scores, B)

    # 2. state of the chunk: S = sum_r exp(a_end - a_r) dt_r x_r B_r^T
    weights = decays.end * decays.dt
    dB.baddbmm_(_weighted(x, weights, c * g), d_own)
    d_written = torch.bmm(B, d_own.transpose(1, 2)).view(c, g, size, -1, p)
    written = (d_written * x.view(c, g, size, 1, p)).sum(-1).transpose(2, 3).reshape(c, s, size)
    ddt += written * decays.end
    d_logs[..., 1:] += (written * weights).cumsum(-1)[..., :-1]
    weights = weights.view(c, g, -1, size).transpose(2, 3)
    dx.view(c, g, size, p).add_((d_written * weights[..., None]).sum(3))

    dx, dB, dC = (grad.view(c, -1, size, grad.shape[-1]).transpose(1, 2) for grad in (dx, dB, dC))
    return dx, ddt, dB, dC, d_logs
