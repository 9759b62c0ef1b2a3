"""
The selective scan by the kernels of the mamba-ssm package, to compare ours with.

Those kernels need as many key/value heads as query heads and have no states per packed segment, so x and B are
repeated and segments of one length go together as a batch. They count offsets in 32 bits without noticing an overflow,
so a scan that is too long for that is refused.
"""

from collections.abc import Sequence

import torch

from ..backends import import_kernels
from ..segments import Segments


CHUNK = 128
LAST_OFFSET = 2**31 - 1


def ssd_mamba_ssm(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, segments: Segments,
    initial_states: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """
    Runs the scan by the kernels of mamba-ssm; arguments and results as in [`~linmu_hf.ops.ssd.scan.ssd`], without
    `normalized`.

    Raises:
        `ValueError`: Offsets of more than 32 bits.
    """
    mamba_chunk_scan_combined = import_kernels("mamba_ssm").mamba_chunk_scan_combined
    (n, g, p), s, (h, k), dtype = x.shape, dt.shape[-1], C.shape[1:], x.dtype
    check_offsets(segments.lengths, h, p, k)
    x, B = (t.to(dtype).repeat_interleave(h // g, dim=1) for t in (x, B))
    dt, A = dt.float().repeat_interleave(h // s, dim=-1), A.float().repeat_interleave(h // s)
    if initial_states is None:
        initial_states = x.new_zeros(len(segments), s, p, k, dtype=torch.float32)
    states = initial_states.float().repeat_interleave(h // s, dim=1)

    lengths = torch.tensor(segments.lengths, device=x.device)
    first = lengths.cumsum(0) - lengths
    places, outputs, order, finals = [], [], [], []
    for length in sorted(set(segments.lengths)):
        members = torch.nonzero(lengths == length).flatten()
        rows = first[members, None] + torch.arange(length, device=x.device)
        y, state = mamba_chunk_scan_combined(
            x[rows], dt[rows], A, B[rows], C.to(dtype)[rows], CHUNK,
            initial_states=states[members].contiguous(), return_final_states=True,
        )  # fmt: skip
        places.append(rows.flatten())
        outputs.append(y.flatten(0, 1))
        order.append(members)
        finals.append(state)
    y = x.new_empty(n, h, p).index_copy(0, torch.cat(places), torch.cat(outputs).to(dtype))
    return y, torch.cat(finals)[torch.cat(order).argsort(), :: h // s].float()


def check_offsets(lengths: Sequence[int], h: int, p: int, k: int) -> None:
    """Raises a `ValueError` unless 32 bits count the inputs, states [h, p, k] and products of all chunks."""
    chunks = sum(-(-length // CHUNK) for length in lengths)
    most = LAST_OFFSET // (h * max(p * k, CHUNK * CHUNK, CHUNK * p, CHUNK * k))
    if chunks > most:
        raise ValueError(
            f"{sum(lengths)} tokens in {chunks} chunks: mamba-ssm's 32-bit offsets reach {most} chunks of {CHUNK} "
            f"tokens at {h} heads with states of {p} x {k}; use 'triton' or 'chunked', or shorter sequences"
        )
