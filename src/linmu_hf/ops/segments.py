"""Packed sequences, and the arguments of a scan over them: the types that every operation shares."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Segments:
    """
    The segments of a packed token dimension: where they begin, and how they are cut into chunks; built once, used by
    every layer.

    Chunks are kept in the order in which states pass through them: the first chunk of every segment, then the second
    of every segment that has one, and so on, longest segment first. What a step needs is then a plain split.

    Args:
        lengths (`tuple[int, ...]`): Tokens of each segment, all at least 1.
        chunk_size (`int`): Tokens of a chunk.
        steps (`tuple[int, ...]`): Number of segments that have a first, a second, ... chunk.
        rank (`torch.LongTensor` of shape `[m]` or `None`): Place of every segment among the longest-first; `None` if
            they are in that order.
        slots (`torch.LongTensor` of shape `[n]` or `None`): Place of every token in the chunks; `None` if tokens fill
            them in their order.
    """

    lengths: tuple[int, ...]
    chunk_size: int
    steps: tuple[int, ...]
    rank: torch.Tensor | None
    slots: torch.Tensor | None

    @classmethod
    def build(
        cls, lengths: Sequence[int], device: torch.device | None = None, chunk_size: int | None = None
    ) -> "Segments":
        """Cuts segments of the given `lengths` into chunks; by default of a size that wastes little padding."""
        lengths = tuple(lengths)
        if chunk_size is None:
            # a chunk costs about as much as 8 tokens more; torch.compile knew sorted with a key before min with one
            chunk_size = sorted((64, 32, 16), key=lambda size: _padded(lengths, size) * (1 + 8 / size))[0]
        chunks = [-(-length // chunk_size) for length in lengths]
        steps = tuple(sum(count > step for count in chunks) for step in range(max(chunks)))
        if len(lengths) == 1 and lengths[0] % chunk_size == 0:
            return cls(lengths, chunk_size, steps, None, None)
        longest_first = sorted(range(len(chunks)), key=lambda segment: -chunks[segment])
        rank = torch.empty(len(chunks), dtype=torch.long)
        rank[longest_first] = torch.arange(len(chunks))
        rank = rank.to(device)
        length, n = torch.tensor(lengths, device=device), sum(lengths)  # passing `output_size=n` avoids a device sync
        position = torch.arange(n, device=device)
        position = position - (length.cumsum(0) - length).repeat_interleave(length, output_size=n)
        step = position // chunk_size
        first_of_step = torch.tensor((0, *steps), device=device).cumsum(0)
        ranks = rank.repeat_interleave(length, output_size=n)
        slots = (first_of_step[step] + ranks) * chunk_size + position % chunk_size
        in_order = longest_first == list(range(len(chunks)))
        return cls(lengths, chunk_size, steps, None if in_order else rank, slots)

    def to(self, device: torch.device | str | int, **kwargs: Any) -> "Segments":
        """Returns the same with its tensors on another device; further arguments as for `torch.Tensor.to`."""
        rank, slots = (t if t is None else t.to(device, **kwargs) for t in (self.rank, self.slots))
        return replace(self, rank=rank, slots=slots)

    def __len__(self) -> int:
        return len(self.lengths)


def _padded(lengths: Sequence[int], size: int) -> int:
    return sum(-(-length // size) * size for length in lengths)


class Scan(NamedTuple):
    """The arguments of one scan, as [`~linmu_hf.ops.ssd.scan.ssd`] takes them."""

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    segments: Segments
    initial_states: torch.Tensor | None = None
