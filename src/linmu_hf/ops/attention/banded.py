"""Softmax attention of blocks of queries to lists of keys, by rank: a sliding window with attention sinks.

code        meaning
rank        number of a text token in its sequence, from 0; a vision token has that of the text before its span
window      a query of rank i sees the keys of ranks i - window + 1 to i ...
sinks       ... and those of ranks 0 to sinks - 1
lse         log of the sum of exp(scores): what a result weighs when it is joined with others
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


# Scores that are held at once.
SCORES = 2**22


class Blocks(NamedTuple):
    """
    Queries in blocks, each with its list of keys.

    Args:
        queries (`torch.LongTensor` of shape `[m, a]`): Places of the queries among those given, each once; -1 fills
            up.
        query_ranks (`torch.LongTensor` of shape `[m, a]`): Their ranks.
        keys (`torch.LongTensor` of shape `[m, c]`): Places of the keys; -1 where there is none.
        key_ranks (`torch.LongTensor` of shape `[m, c]`): Their ranks.
        slots (`torch.LongTensor` of shape `[n]`): Place of each query when the blocks are laid end to end.
    """

    queries: Tensor
    query_ranks: Tensor
    keys: Tensor
    key_ranks: Tensor
    slots: Tensor

    def to(self, device: torch.device | str | int, **kwargs: Any) -> "Blocks":
        """Returns the same on another device; further arguments as for `torch.Tensor.to`."""
        return Blocks(*(tensor.to(device, **kwargs) for tensor in self))

    def some(self, which: slice) -> "Blocks":
        """Returns some of the blocks; `slots` stays that of all."""
        return Blocks(
            self.queries[which], self.query_ranks[which], self.keys[which], self.key_ranks[which], self.slots
        )


def banded_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, window: int, sinks: int, with_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """
    Computes the attention of every query to the keys of its block that its window or the sinks hold.

    Args:
        q (`torch.Tensor` of shape `[n, h, p]`): Queries.
        k, v (`torch.Tensor` of shape `[l, g, p]`): Keys and values; h is a multiple of g.
        blocks (`Blocks`): Which keys may meet which queries. Without `with_lse` every query must see a key.
        window, sinks (`int`): See the table above.
        with_lse (`bool`, *optional*, defaults to `False`): Whether lse is wanted too.

    Returns:
        `torch.Tensor` of shape `[n, h, p]`; with lse a tuple of it, zeros at queries that see no key, and lse `[n, h]`
        in fp32, where they have -inf.
    """
    (m, a), h = blocks.queries.shape, q.shape[1]
    if not len(k):
        dtype = torch.promote_types(q.dtype, torch.float32)
        y, lse = torch.zeros_like(q), q.new_full((len(q), h), -math.inf, dtype=dtype)
        return (y, lse) if with_lse else y
    attend, step = (_attend_with_lse, SCORES) if with_lse else (_attend, 8 * SCORES)
    step = max(step // (h * a * blocks.keys.shape[1]), 1)
    parts = [attend(q, k, v, blocks.some(slice(first, first + step)), window, sinks) for first in range(0, m, step)]
    if not with_lse:
        return torch.cat(parts).flatten(0, 1).index_select(0, blocks.slots).to(q.dtype)
    y, lse = (torch.cat(tensors).flatten(0, 1).index_select(0, blocks.slots) for tensors in zip(*parts, strict=True))
    return y.to(q.dtype), lse


def _seen(blocks: Blocks, window: int, sinks: int) -> Tensor:
    """Which key of a block a query sees, [m, a, c]; what fills a block up sees all."""
    behind = blocks.query_ranks[:, :, None] - blocks.key_ranks[:, None]
    seen = (behind >= 0) & ((behind < window) | (blocks.key_ranks < sinks)[:, None]) & (blocks.keys >= 0)[:, None]
    return seen | (blocks.queries < 0)[:, :, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, window: int, sinks: int) -> Tensor:
    """Some of the blocks: output [m, a, h, p]."""
    q, k, v = (
        t[places.clamp_min(0)].transpose(1, 2) for t, places in zip((q, k, v), (blocks[0], blocks[2], blocks[2]))
    )
    seen = _seen(blocks, window, sinks)[:, None]
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


def _attend_with_lse(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, window: int, sinks: int
) -> tuple[Tensor, Tensor]:
    """The same, and lse [m, a, h]."""
    h, g, p = q.shape[1], k.shape[1], q.shape[2]
    m, a = blocks.queries.shape
    q = q[blocks.queries.clamp_min(0)].view(m, a, g, h // g, p).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [m, g, r a, p]
    k, v = (t[blocks.keys.clamp_min(0)].transpose(1, 2) for t in (k, v))  # [m, g, c, p]
    scores = (q @ k.transpose(-1, -2)).unflatten(2, (h // g, a)) / math.sqrt(p)  # [m, g, r, a, c]
    y, lse = masked_softmax(scores, _seen(blocks, window, sinks)[:, None, None], v[:, :, None])
    return y.permute(0, 3, 1, 2, 4).flatten(2, 3), lse.permute(0, 3, 1, 2).flatten(2, 3)


def masked_softmax(scores: Tensor, seen: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor]:
    """
    Returns the softmax of scores `[..., a, c]` where `seen` (everywhere if it is `None`), times v `[..., c, p]`, and
    its lse `[..., a]` in fp32; zeros and -inf in rows without any.
    """
    dtype = torch.promote_types(scores.dtype, torch.float32)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    largest = scores.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, dtype=dtype)
    some = total.clamp_min(torch.finfo(dtype).tiny)
    y = (weights.to(v.dtype) @ v) / some[..., None].to(v.dtype)
    lse = largest[..., 0].to(dtype) + some.log()
    return y, lse if seen is None else lse.masked_fill(total == 0, -math.inf)


def join(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> tuple[Tensor, Tensor]:
    """
    Joins two attentions of the same queries to different keys into that to all of them.

    Args:
        first, second (`torch.Tensor` of shape `[n, h, p]`): Outputs.
        first_lse, second_lse (`torch.Tensor` of shape `[n, h]`): Their lse.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Output and lse of all keys.
    """
    lse = torch.logaddexp(first_lse, second_lse)
    share = torch.exp(second_lse - lse.nan_to_num(neginf=0.0))
    return torch.lerp(first, second.to(first.dtype), share[..., None].to(first.dtype)), lse
