"""What a launch of the scan's kernels works on: chunks of the packed segments of one or two scans, in windows."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch


CHUNK = 64

Window = tuple[int, int, int, int]  # first and last chunk, first and last piece


class LaunchPlan(NamedTuple):
    """
    All that the operators know of one or two scans besides tensors.

    Args:
        lengths (`tuple[int, ...]`): Tokens of the segments of the scans, one scan after the other.
        counts (`tuple[int, ...]`): Segments of each scan.
        starts, ends (`tuple[bool, ...]`): Whether a scan has initial states, and whether its final states are wanted.
        normalized (`bool`): As in [`~linmu_hf.ops.ssd.scan.ssd`].
        half_states (`bool`): Whether states wait in bfloat16 between the kernels; sums over chunks are in fp32 anyway.
    """

    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    starts: tuple[bool, ...]
    ends: tuple[bool, ...]
    normalized: bool
    half_states: bool

    @property
    def states_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.half_states else torch.float32

    def states_before(self) -> int:
        return sum(count for count, start in zip(self.counts, self.starts) if start)

    def states_after(self) -> int:
        return sum(count for count, end in zip(self.counts, self.ends) if end)


@dataclass(frozen=True)
class ChunkTable:
    """
    Chunks of packed segments, and the pieces of segments that share a window of chunks, as the kernels read them.

    Args:
        chunks (`torch.LongTensor` of shape `[c, 3]`): First token, number of tokens, and which scan.
        pieces (`torch.LongTensor` of shape `[i, 4]`): First chunk within its window, number of chunks, which entering
            state it begins with (-1: zero), and where its last state goes: the entering state of the piece that goes
            on, number of entering states + number of the final state, or nowhere (-1).
        windows (`tuple[tuple[int, int, int, int], ...]`): First and last chunk, first and last piece of each window.
        entries (`int`): Entering states: first the initial states, then those that pieces hand on.
        second (`int`): First chunk of the second scan, or the number of chunks.
    """

    chunks: torch.Tensor
    pieces: torch.Tensor
    windows: tuple[Window, ...]
    entries: int
    second: int


@lru_cache(maxsize=64)
def cut_chunks(
    plan: LaunchPlan, window: int
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int, int]], tuple[Window, ...], int, int]:
    """Returns the rows of a [`ChunkTable`] (chunks, pieces, windows), its entering states and its second scan."""
    chunks: list[tuple[int, int, int]] = []
    pieces: list[tuple[int, int, int, int]] = []
    windows, used, entries, finals, second = [(0, 0)], 0, plan.states_before(), 0, 0
    starts, lengths = 0, iter(plan.lengths)
    for scan, count_segments in enumerate(plan.counts):
        token = 0
        second = len(chunks)
        for _ in range(count_segments):
            length, comes_from = next(lengths), -1
            if plan.starts[scan]:
                comes_from, starts = starts, starts + 1
            left = -(-length // CHUNK)
            while left:
                if used == window:
                    windows.append((len(chunks), len(pieces)))
                    used = 0
                count = min(left, window - used)
                left -= count
                leads_to = -1
                if left:
                    leads_to, entries = entries, entries + 1
                elif plan.ends[scan]:
                    leads_to, finals = -2 - finals, finals + 1
                pieces.append((used, count, comes_from, leads_to))
                comes_from, used = leads_to, used + count
                for _ in range(count):
                    chunks.append((token, min(CHUNK, length), scan))
                    token, length = token + chunks[-1][1], length - chunks[-1][1]
    pieces = [(first, count, before, to if to >= -1 else entries - 2 - to) for first, count, before, to in pieces]
    ends = [*windows[1:], (len(chunks), len(pieces))]
    spans = tuple((chunk, end[0], piece, end[1]) for (chunk, piece), end in zip(windows, ends))
    return chunks, pieces, spans, entries, second if len(plan.counts) == 2 else len(chunks)


@lru_cache(maxsize=16)
def chunk_table(plan: LaunchPlan, window: int, device: torch.device) -> ChunkTable:
    """Cuts the segments of a plan into chunks, and the chunks into windows of at most `window`."""
    chunks, pieces, windows, entries, second = cut_chunks(plan, window)
    return ChunkTable(torch.tensor(chunks).to(device), torch.tensor(pieces).to(device), windows, entries, second)
