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
which are never repeated in memory. Tokens of all sequences lie packed behind one another; `Segments` says where each
sequence begins, and states never cross from one segment to the next.
"""

from dataclasses import dataclass, replace

import torch

from .ssd_torch import ssd_chunked, ssd_recurrence, ssd_streaming


# Tokens of the longest segment above which the streaming form is used: its memory does not grow with the length.
STREAMING_THRESHOLD = 4096

BACKENDS = {"chunked": ssd_chunked, "streaming": ssd_streaming, "recurrence": ssd_recurrence}


@dataclass(frozen=True)
class Segments:
    """
    Where the segments of a packed token dimension begin, and how they are cut into chunks; built once, used by every
    layer.

    Chunks are kept in the order in which states pass through them: the first chunk of every segment, then the second
    of every segment that has one, and so on, longest segment first. What a step needs is then a plain split.

    Args:
        lengths (`tuple[int, ...]`): Tokens of each segment, all at least 1.
        chunk_size (`int`): Tokens of a chunk.
        steps (`tuple[int, ...]`): Number of segments that have a first, a second, ... chunk.
        rank (`torch.LongTensor` of shape `[m]` or `None`): Place of every segment among the longest-first; `None` if
            they are in that order.
        slots (`torch.LongTensor` of shape `[n]` or `None`): Place of every token in the chunks; `None` if tokens fill
            them as they lie.
    """

    lengths: tuple[int, ...]
    chunk_size: int
    steps: tuple[int, ...]
    rank: torch.Tensor | None
    slots: torch.Tensor | None

    @classmethod
    def build(cls, lengths, device=None, chunk_size: int | None = None) -> "Segments":
        """Cuts segments of the given `lengths` into chunks; by default of a size that wastes little padding."""
        lengths = tuple(lengths)
        if chunk_size is None:
            # a chunk costs about as much as 8 tokens more
            chunk_size = min((64, 32, 16), key=lambda size: _padded(lengths, size) * (1 + 8 / size))
        chunks = [-(-length // chunk_size) for length in lengths]
        steps = tuple(sum(count > step for count in chunks) for step in range(max(chunks)))
        if len(lengths) == 1 and lengths[0] % chunk_size == 0:
            return cls(lengths, chunk_size, steps, None, None)
        longest_first = sorted(range(len(chunks)), key=lambda segment: -chunks[segment])
        rank = torch.empty(len(chunks), dtype=torch.long)
        rank[longest_first] = torch.arange(len(chunks))
        rank = rank.to(device)
        length = torch.tensor(lengths, device=device)
        position = torch.arange(sum(lengths), device=device) - (length.cumsum(0) - length).repeat_interleave(length)
        step = position // chunk_size
        first_of_step = torch.tensor((0, *steps), device=device).cumsum(0)
        slots = (first_of_step[step] + rank.repeat_interleave(length)) * chunk_size + position % chunk_size
        in_order = longest_first == list(range(len(chunks)))
        return cls(lengths, chunk_size, steps, None if in_order else rank, slots)

    def to(self, device, **kwargs) -> "Segments":
        """The same with its tensors on another device; further arguments as for `torch.Tensor.to`."""
        rank, slots = (t if t is None else t.to(device, **kwargs) for t in (self.rank, self.slots))
        return replace(self, rank=rank, slots=slots)

    def __len__(self) -> int:
        return len(self.lengths)


def _padded(lengths, size: int) -> int:
    return sum(-(-length // size) * size for length in lengths)


def ssd(x, dt, A, B, C, segments: Segments, *, initial_states=None, backend: str = "auto"):
    """
    Selective scan over packed segments, Eq. 1 of the paper; shapes in the table at the top of this file.

    Args:
        x, dt, A, B, C (`torch.Tensor`): See the table. Decays and states are computed in fp32 (fp64 for fp64 input).
        segments (`Segments`): The packed sequences.
        initial_states (`torch.Tensor` of shape `[m, s, p, k]`, *optional*): States before each segment.
        backend (`str`, *optional*, defaults to `"auto"`): `"chunked"` (batched matrix products), `"streaming"`
            (chunked pieces one after the other, constant memory), `"recurrence"` (token by token), or `"auto"`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: y of shape `[n, h, p]` in x's dtype, and the states after each segment.
    """
    if backend == "auto":
        backend = "streaming" if max(segments.lengths) > STREAMING_THRESHOLD else "chunked"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {['auto', *BACKENDS]}")
    with torch.autocast(x.device.type, enabled=False):  # decays and states keep their precision
        return BACKENDS[backend](x, dt, A, B, C, segments, initial_states)


def ssd_step(x, dt, A, B, C, states):
    """
    One token per sequence: x [b, g, p], dt [b, s], A [s], B [b, g, k], C [b, h, k], states [b, s, p, k].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: y of shape `[b, h, p]` in x's dtype and the new states.
    """
    b, g, _ = x.shape
    s = dt.shape[-1]
    dtype = states.dtype
    with torch.autocast(x.device.type, enabled=False):
        decay = torch.exp(dt.to(dtype) * A.to(dtype))
        write = torch.einsum("bgp,bgk->bgpk", x.to(dtype), B.to(dtype))
        write = write[:, :, None] * dt.to(dtype).view(b, g, s // g, 1, 1)
        states = states * decay[..., None, None] + write.flatten(1, 2)
        y = torch.einsum("bsqk,bspk->bsqp", C.to(dtype).view(b, s, -1, C.shape[-1]), states)
    return y.flatten(1, 2).to(x.dtype), states
