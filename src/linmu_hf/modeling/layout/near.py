"""What the text tokens of a sequence keep in exact attention: the last of them in a window, the first as sinks.

Text tokens are numbered by *rank*: 0, 1, ... within their sequence, vision tokens left out. A cached sequence keeps
the sinks and its last `text_window` tokens in slots: that of rank i is i for a sink, else
`sinks + (i - sinks) % window`, so a new token takes the place of the one that leaves the window.

Flex-MA scans a text token when it leaves the window: at the place of rank i the scan reads rank i - window. Vision
tokens are scanned at their own place, sinks never.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from ...ops.attention.banded import Blocks


# Vision tokens of a block; blocks of text have as many as the window.
VISION_BLOCK = 256


@dataclass(frozen=True)
class NearText:
    """
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

    def to(self, device, **kwargs) -> "NearText":
        """The same on another device; further arguments as for `torch.Tensor.to`."""
        values = (getattr(self, field.name) for field in fields(self))
        return NearText(*(value if value is None else value.to(device, **kwargs) for value in values))

    @classmethod
    def build(
        cls, config, batch: int, real, sequence, lengths, rows, is_vision=None, scan_vision=None, span=None, past=None
    ):  # fmt: skip
        """
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
        w, s, m, n, device = config.text_window, config.sink_tokens, len(lengths), len(real), real.device
        places = torch.arange(n, device=device) if is_vision is None else (~is_vision).nonzero().squeeze(1)
        of = sequence[places]
        count = of.new_zeros(m).index_add(0, of, torch.ones_like(of))
        first = count.cumsum(0) - count
        batch_rows = torch.arange(m, device=device) if rows is None else rows
        before = torch.zeros_like(count) if past is None else past[batch_rows, 0]
        total, offset = before + count, 0 if past is None else m * (s + w)
        rank = torch.arange(len(places), device=device) - first[of] + before[of]

        def slot(rank):
            return torch.where(rank < s, rank, s + (rank - s) % w)

        def key(of, rank):
            """Place of a text token among [cached slots, new text tokens]."""
            return torch.where(rank >= before[of], offset + first[of] + rank - before[of], of * (s + w) + slot(rank))

        if is_vision is None and past is None:  # nothing to wait for
            starts, ends = [0] * m, list(lengths)
        else:
            starts, ends = torch.stack([before, total]).tolist()
        text_blocks = vision_blocks = None
        if len(places):
            size = min(w, max(end - start for start, end in zip(starts, ends)))
            of_block = torch.tensor([i for i in range(m) for _ in range(starts[i], ends[i], size)], device=device)
            begin = [start for i in range(m) for start in range(starts[i], ends[i], size)]
            begins = torch.tensor(begin, device=device)[:, None]
            ranks = begins + torch.arange(size, device=device)
            queries = torch.where(
                ranks < total[of_block, None], first[of_block, None] + ranks - before[of_block, None], -1
            )
            unused = max(s + w - 1 - max(begin), 0)
            keys = begins + torch.arange(min(unused - w + 1, size), size, device=device)
            text_blocks = cls._blocks(len(places), queries, ranks, keys, total[of_block], s, of_block, key)
        if span is not None:
            # text tokens before each packed place, of its own sequence
            preceding = (~is_vision).long().cumsum(0) - first[sequence] + before[sequence]
            size = torch.bincount(span)
            begins = torch.full_like(size, n).scatter_reduce(0, span, scan_vision, "amin")
            context, of_span = preceding[begins], sequence[begins]
            sizes, contexts = torch.stack([size, context]).tolist()
            of_block = torch.tensor(
                [i for i in range(len(sizes)) for _ in range(0, sizes[i], VISION_BLOCK)], device=device
            )
            start = torch.tensor(
                [j for i in range(len(sizes)) for j in range(0, sizes[i], VISION_BLOCK)], device=device
            )
            inside = start[:, None] + torch.arange(min(VISION_BLOCK, max(sizes)), device=device)
            member = (size.cumsum(0) - size)[of_block, None] + inside
            by_span = torch.argsort(span, stable=True)
            queries = torch.where(inside < size[of_block, None], by_span[member.clamp_max(len(span) - 1)], -1)
            end = context[of_block]
            keys = end[:, None] + torch.arange(min(max(s - max(contexts), -w), 0), 0, device=device)
            ranks = (end - 1)[:, None].expand_as(queries)
            vision_blocks = cls._blocks(len(span), queries, ranks, keys, end, s, of_span[of_block], key)

        leaving = rank - w
        scan = torch.where(
            leaving >= before[of], offset + places[(first[of] + leaving - before[of]).clamp(0, len(places) - 1)],
            of * (s + w) + slot(leaving),
        )  # fmt: skip
        live = torch.ones(n, dtype=torch.bool, device=device).index_copy(0, places, leaving >= s)
        source = (offset + torch.arange(n, device=device)).index_copy(0, places, torch.where(leaving >= s, scan, 0))
        stay, begin_of = [], 0
        for start, end in zip(starts, ends):
            for low, high in ((start, min(s, end)), (max(start, s, end - w), end)):
                stay.append(torch.arange(begin_of + low - start, begin_of + max(low, high) - start, device=device))
            begin_of += end - start
        stay = torch.cat(stay)
        # whether anything was scanned: in this pass up to the place, or before it
        length = torch.tensor(lengths, device=device)
        scanned = torch.nn.functional.pad(live.long().cumsum(0), (1, 0))
        scanned = scanned[1:] > scanned[length.cumsum(0) - length][sequence]
        if past is not None:
            scanned |= ((past[batch_rows, 1] > 0) | (before > w + s))[sequence]
        new = torch.stack([total, length - count], dim=1)
        if past is not None:
            new[:, 1] += past[batch_rows, 1]
        return cls(
            text=real[places],
            cached=None
            if past is None
            else (batch_rows[:, None] * (s + w) + torch.arange(s + w, device=device)).flatten(),
            text_blocks=text_blocks,
            vision_blocks=vision_blocks,
            waiting=places,
            source=source,
            live=live,
            scanned=scanned,
            stay=stay,
            slots=batch_rows[of[stay]] * (s + w) + slot(rank[stay]),
            counts=new
            if rows is None
            else (torch.zeros(batch, 2, dtype=new.dtype, device=device) if past is None else past).index_copy(
                0, rows, new
            ),
        )

    @staticmethod
    def _blocks(n, queries, query_ranks, ranks, end, sinks, of, key) -> Blocks:
        """Blocks of n queries; their keys are the sinks and those of the ranks that exist and come before `end`."""
        first = torch.arange(sinks, device=ranks.device).expand(len(ranks), -1)
        ranks, exists = torch.cat([first, ranks], dim=1), torch.cat([first >= 0, ranks >= sinks], dim=1)
        exists &= ranks < end[:, None]
        at = torch.arange(queries.numel(), device=ranks.device)
        slots = at.new_zeros(n + 1).index_copy(0, torch.where(queries < 0, n, queries).flatten(), at)[
            :n
        ]  # n: no query
        keys = torch.where(exists, key(of[:, None], ranks.clamp_min(0)), -1)
        return Blocks(queries, query_ranks, keys, ranks, slots)


class NearStep(NamedTuple):
    """
    The same for a decode step of one text token per row.

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
    def build(cls, config, batch: int, device, past=None, mask=None) -> "NearStep":
        """Arguments as for [`NearText`], and `mask` `[b]`, 0 at rows that have no token."""
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

    def exchange(self, cache_layer, **values) -> list[torch.Tensor]:
        """Puts `values` of the token `[b, ...]` into its slot; returns those of the one that leaves, or zeros."""
        held = cache_layer.exchange(self.slot, self.real, self.filled.shape[1], **values)
        return [old * self.leaves.view(-1, *[1] * (old.ndim - 1)) for old in held]
