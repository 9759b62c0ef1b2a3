"""What the text tokens of a sequence keep in exact attention: the last of them in a window, the first as sinks.

Text tokens are numbered by *rank*: 0, 1, ... within their sequence, vision tokens left out. A cached sequence keeps
the sinks and its last `text_window` tokens in slots: that of rank i is i for a sink, else
`sinks + (i - sinks) % window`, so a new token takes the place of the one that leaves the window.

Flex-MA scans a text token when it leaves the window: at the place of rank i the scan reads rank i - window. Vision
tokens are scanned at their own place, sinks never.
"""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from ...ops.attention.banded import Blocks
from ..cache import MMateCacheLayer
from ..configuration_linmu import LinMUTextConfig


# Vision tokens of a block; blocks of text have as many as the window.
VISION_BLOCK = 256


@dataclass(frozen=True)
class NearText:
    """
    The layout of text tokens in exact attention.

    Args:
        text (`torch.LongTensor` of shape `[l]`): Places in the flattened batch of the new text tokens.
        cached (`torch.LongTensor` of shape `[m (s + w)]` or `None`): Slots of the cache, counted over the batch, that
            come before the new text tokens among the keys and the tokens that wait to be scanned; `None` without any.
        text_blocks, vision_blocks (`Blocks` or `None`): Text tokens, in the order of `text`, and vision tokens, in
            the order of the layout's `vision`, each with the keys that it may meet.
        waiting (`torch.LongTensor` of shape `[l]`): Packed places of the new text tokens.
        source (`torch.LongTensor` of shape `[n]`): Which of [cached slots, packed tokens] is scanned at each place.
        live (`torch.BoolTensor` of shape `[n]`): Whether there is one.
        scanned (`torch.BoolTensor` of shape `[n]`): Whether the scan has read a token yet.
        stay (`torch.LongTensor` of shape `[k]`): Which of the new text tokens the cache keeps.
        slots (`torch.LongTensor` of shape `[k]`): Their slots, counted over the batch.
        counts (`torch.LongTensor` of shape `[b, 2]`): Text and vision tokens of every row so far.
    """

    text: torch.Tensor
    cached: torch.Tensor | None
    text_blocks: Blocks | None
    vision_blocks: Blocks | None
    waiting: torch.Tensor
    source: torch.Tensor
    live: torch.Tensor
    scanned: torch.Tensor
    stay: torch.Tensor
    slots: torch.Tensor
    counts: torch.Tensor

    def to(self, device: torch.device | str | int, **kwargs: Any) -> "NearText":
        """Returns the same on another device; further arguments as for `torch.Tensor.to`."""
        values = (getattr(self, field.name) for field in fields(self))
        return NearText(*(value if value is None else value.to(device, **kwargs) for value in values))

    @classmethod
    def build(
        cls, config: LinMUTextConfig, batch: int, real: torch.Tensor, sequence: torch.Tensor, lengths: list[int],
        rows: torch.Tensor | None, is_vision: torch.Tensor | None = None, scan_vision: torch.Tensor | None = None,
        span: torch.Tensor | None = None, past: torch.Tensor | None = None,
    ) -> "NearText":  # fmt: skip
        """
        Builds the layout of the new text tokens.

        Args:
            config (`LinMUTextConfig`): Its `text_window` and `sink_tokens`.
            batch (`int`): Rows of the batch.
            real (`torch.LongTensor` of shape `[n]`): Place in the flattened batch of every packed token.
            sequence (`torch.LongTensor` of shape `[n]`): Number of its sequence.
            lengths (`list[int]`): Tokens of the m sequences.
            rows (`torch.LongTensor` of shape `[m]` or `None`): Row of each sequence, if not every row has one.
            is_vision (`torch.BoolTensor` of shape `[n]`), scan_vision, span (`torch.LongTensor` of shape `[v]`,
                *optional*): Which are vision tokens, their packed places, and the span of each.
            past (`torch.LongTensor` of shape `[b, 2]`, *optional*): Text and vision tokens in the cache.
        """
        m, n, device = len(lengths), len(real), real.device
        width = config.text_window + config.sink_tokens
        places = torch.arange(n, device=device) if is_vision is None else (~is_vision).nonzero().squeeze(1)
        batch_rows = torch.arange(m, device=device) if rows is None else rows
        length = torch.tensor(lengths, device=device)
        before = length.new_zeros(m, 2) if past is None else past[batch_rows]
        ranks = _Ranks.count(config, sequence[places], before[:, 0], 0 if past is None else m * width)
        if is_vision is None and past is None:  # nothing to wait for
            starts, ends = [0] * m, list(lengths)
        else:
            starts, ends = torch.stack([ranks.before, ranks.total]).tolist()
        source, live = _scan_order(ranks, places, n)
        # whether anything was scanned: in this pass up to the place, or before it
        scanned = torch.nn.functional.pad(live.long().cumsum(0), (1, 0))
        scanned = scanned[1:] > scanned[length.cumsum(0) - length][sequence]
        scanned |= ((before[:, 1] > 0) | (before[:, 0] > width))[sequence]
        counts = torch.stack([ranks.total, before[:, 1] + length - (ranks.total - ranks.before)], dim=1)
        if rows is not None:
            counts = (counts.new_zeros(batch, 2) if past is None else past).index_copy(0, rows, counts)
        stay = _kept(ranks, starts, ends)
        slots = batch_rows[:, None] * width + torch.arange(width, device=device)
        return cls(
            text=real[places],
            cached=None if past is None else slots.flatten(),
            text_blocks=_text_blocks(ranks, starts, ends) if len(places) else None,
            vision_blocks=None if span is None else _vision_blocks(ranks, is_vision, sequence, scan_vision, span),
            waiting=places,
            source=source,
            live=live,
            scanned=scanned,
            stay=stay,
            slots=batch_rows[ranks.of[stay]] * width + ranks.slot(ranks.rank[stay]),
            counts=counts,
        )


@dataclass(frozen=True)
class _Ranks:
    """
    Where text tokens are by their sequence and rank.

    Args:
        window, sinks (`int`): `text_window` and `sink_tokens`.
        cached (`int`): Slots of the cache, which come before the new text tokens.
        of, rank (`torch.LongTensor` of shape `[l]`): Sequence and rank of the new text tokens.
        first (`torch.LongTensor` of shape `[m]`): Number of every sequence's first one among them.
        before, total (`torch.LongTensor` of shape `[m]`): Text tokens of every sequence in the cache; with the new.
    """

    window: int
    sinks: int
    cached: int
    of: torch.Tensor
    rank: torch.Tensor
    first: torch.Tensor
    before: torch.Tensor
    total: torch.Tensor

    @classmethod
    def count(cls, config: LinMUTextConfig, of: torch.Tensor, before: torch.Tensor, cached: int) -> "_Ranks":
        new = torch.zeros_like(before).index_add(0, of, torch.ones_like(of))
        first = new.cumsum(0) - new
        rank = torch.arange(len(of), device=of.device) - first[of] + before[of]
        return cls(config.text_window, config.sink_tokens, cached, of, rank, first, before, before + new)

    def slot(self, rank: torch.Tensor) -> torch.Tensor:
        """Slot of a token in its sequence's part of the cache."""
        return torch.where(rank < self.sinks, rank, self.sinks + (rank - self.sinks) % self.window)

    def new(self, of: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
        """Number of a token among the new text tokens, if it is one of them."""
        return self.first[of] + rank - self.before[of]

    def key(self, of: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
        """Place of a text token among [cached slots, new text tokens]."""
        held = of * (self.sinks + self.window) + self.slot(rank)
        return torch.where(rank >= self.before[of], self.cached + self.new(of, rank), held)

    def blocks(
        self, of: torch.Tensor, n: int, queries: torch.Tensor, query_ranks: torch.Tensor, ranks: torch.Tensor,
        end: torch.Tensor,
    ) -> Blocks:  # fmt: skip
        """
        Blocks of n queries; their keys are the sinks and the tokens of those `ranks` that exist and come before `end`.
        """
        first = torch.arange(self.sinks, device=ranks.device).expand(len(ranks), -1)
        ranks, exists = torch.cat([first, ranks], dim=1), torch.cat([first >= 0, ranks >= self.sinks], dim=1)
        exists &= ranks < end[:, None]
        at = torch.arange(queries.numel(), device=ranks.device)
        places = torch.where(queries < 0, n, queries).flatten()  # n: no query
        slots = at.new_zeros(n + 1).index_copy(0, places, at)[:n]
        keys = torch.where(exists, self.key(of[:, None], ranks.clamp_min(0)), -1)
        return Blocks(queries, query_ranks, keys, ranks, slots)


def _text_blocks(ranks: _Ranks, starts: list[int], ends: list[int]) -> Blocks:
    """Blocks of as many text tokens as the window has, from rank `starts` to `ends` of every sequence."""
    w, device = ranks.window, ranks.of.device
    size = min(w, max(end - start for start, end in zip(starts, ends)))
    pieces = [(i, at) for i, (start, end) in enumerate(zip(starts, ends)) for at in range(start, end, size)]
    of, begins = torch.tensor(pieces, device=device).unbind(1)
    begins = begins[:, None]
    inside = begins + torch.arange(size, device=device)
    queries = torch.where(inside < ranks.total[of, None], ranks.new(of[:, None], inside), -1)
    unused = max(ranks.sinks + w - 1 - max(begin for _, begin in pieces), 0)
    keys = begins + torch.arange(min(unused - w + 1, size), size, device=device)
    return ranks.blocks(of, len(ranks.of), queries, inside, keys, ranks.total[of])


def _vision_blocks(
    ranks: _Ranks, is_vision: torch.Tensor, sequence: torch.Tensor, scan_vision: torch.Tensor, span: torch.Tensor
) -> Blocks:
    """Blocks of a span's vision tokens, which meet the sinks and the text in the window before their span."""
    device = span.device
    # text tokens before each packed place, of its own sequence
    preceding = (~is_vision).long().cumsum(0) - ranks.first[sequence] + ranks.before[sequence]
    size = torch.bincount(span)
    begins = torch.full_like(size, len(sequence)).scatter_reduce(0, span, scan_vision, "amin")
    context, of_span = preceding[begins], sequence[begins]
    sizes, contexts = torch.stack([size, context]).tolist()
    pieces = [(i, at) for i, count in enumerate(sizes) for at in range(0, count, VISION_BLOCK)]
    of_block, start = torch.tensor(pieces, device=device).unbind(1)
    inside = start[:, None] + torch.arange(min(VISION_BLOCK, max(sizes)), device=device)
    member = (size.cumsum(0) - size)[of_block, None] + inside
    by_span = torch.argsort(span, stable=True)
    queries = torch.where(inside < size[of_block, None], by_span[member.clamp_max(len(span) - 1)], -1)
    end = context[of_block]
    keys = end[:, None] + torch.arange(min(max(ranks.sinks - max(contexts), -ranks.window), 0), 0, device=device)
    return ranks.blocks(of_span[of_block], len(span), queries, (end - 1)[:, None].expand_as(queries), keys, end)


def _scan_order(ranks: _Ranks, places: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`source` and `live`: at a text token's place the token that leaves the window for it, if it is not a sink."""
    leaving, of = ranks.rank - ranks.window, ranks.of
    new = places[ranks.new(of, leaving).clamp(0, max(len(places) - 1, 0))]
    held = of * (ranks.sinks + ranks.window) + ranks.slot(leaving)
    leaves = leaving >= ranks.sinks
    scan = torch.where(leaves, torch.where(leaving >= ranks.before[of], ranks.cached + new, held), 0)
    live = torch.ones(n, dtype=torch.bool, device=places.device).index_copy(0, places, leaves)
    return (ranks.cached + torch.arange(n, device=places.device)).index_copy(0, places, scan), live


def _kept(ranks: _Ranks, starts: list[int], ends: list[int]) -> torch.Tensor:
    """Which of the new text tokens stay in the cache: sinks, and the last `window` of every sequence."""
    w, s, stay, begin = ranks.window, ranks.sinks, [], 0
    for start, end in zip(starts, ends):
        for low, high in ((start, min(s, end)), (max(start, s, end - w), end)):
            stay.append(torch.arange(begin + low - start, begin + max(low, high) - start, device=ranks.of.device))
        begin += end - start
    return torch.cat(stay)


class NearStep(NamedTuple):
    """
    The same layout for a decode step of one text token per row.

    Args:
        slot (`torch.LongTensor` of shape `[b]`): Where the token goes.
        leaves (`torch.BoolTensor` of shape `[b]`): Whether one leaves the window for it, to be scanned.
        filled (`torch.BoolTensor` of shape `[b, s + w]`): Slots that then hold a token.
        scanned (`torch.BoolTensor` of shape `[b]`): Whether the scan then has read a token.
        real (`torch.BoolTensor` of shape `[b]` or `None`): Rows that have a token; the others stay as they are.
        counts (`torch.LongTensor` of shape `[b, 2]`): Text and vision tokens of every row after it.
    """

    slot: torch.Tensor
    leaves: torch.Tensor
    filled: torch.Tensor
    scanned: torch.Tensor
    real: torch.Tensor | None
    counts: torch.Tensor

    @classmethod
    def build(
        cls, config: LinMUTextConfig, batch: int, device: torch.device, past: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> "NearStep":  # fmt: skip
        """
        Builds the layout of a step; arguments as for [`NearText`], and `mask` `[b]`, 0 at rows that have no token.
        """
        w, s = config.text_window, config.sink_tokens
        past = torch.zeros(batch, 2, dtype=torch.long, device=device) if past is None else past.to(device)
        rank, vision = past.unbind(1)
        slot = torch.where(rank < s, rank, s + (rank - s) % w)
        real = None if mask is None else mask.bool()
        leaves = rank >= s + w if real is None else (rank >= s + w) & real
        filled = torch.arange(s + w, device=device) < (rank + 1)[:, None]
        new = torch.ones_like(rank) if real is None else real.long()
        counts = torch.stack([rank + new, vision], dim=1)
        return cls(slot, leaves, filled, (vision > 0) | (rank >= w + s), real, counts)

    def exchange(self, cache_layer: MMateCacheLayer, **values: torch.Tensor) -> list[torch.Tensor]:
        """Puts `values` of the token `[b, ...]` into its slot; returns those of the one that leaves, or zeros."""
        held = cache_layer.exchange(self.slot, self.real, self.filled.shape[1], **values)
        return [old * self.leaves.view(-1, *[1] * (old.ndim - 1)) for old in held]
