"""Rotary positions of tokens: of text, of packed sequences, and after what a cache has read."""

from typing import Any

import torch
from torch import nn
from transformers import Cache

from ..cache import MMateCacheLayer
from ..compat import CACHE
from ..mixers import AttentionMask
from .packing import unpack


def text_positions(tokens: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the number of each token `[b, t]` among the real ones of its row, three times: `[3, b, t]`."""
    if attention_mask is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    else:
        positions = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    return positions.expand(3, -1, -1)


def positions_within(lengths: list[int], device: torch.device) -> torch.Tensor:
    """Returns 0, 1, ... in every sequence: text positions of a packed row, `[1, t]`."""
    return torch.cat([torch.arange(length, device=device) for length in lengths])[None]


def new_positions(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: AttentionMask, cache: Cache | None,
    lengths: list[int] | None = None, mm_token_type_ids: torch.Tensor | None = None, **grids: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """
    Returns `get_positions` of the new tokens of a batch, after what the cache has seen; sequences that share a row, of
    these `lengths`, give `[3, 1, t]` and `[1, t, 4]`.
    """
    if lengths is not None:
        rows, mask = unpack(input_ids, lengths)
        types = None if mm_token_type_ids is None else unpack(mm_token_type_ids, lengths)[0]
        positions, layout = model.get_positions(rows, mask, mm_token_type_ids=types, **grids)
        real = mask.bool()
        return positions[:, real][:, None], None if layout is None else layout[real][None]
    whole = mask = None if isinstance(attention_mask, dict) else attention_mask
    if mask is not None:
        mask = mask[:, -input_ids.shape[1] :]
    positions, layout = model.get_positions(input_ids, mask, mm_token_type_ids=mm_token_type_ids, **grids)
    if cache is not None:
        note_hidden(cache, whole, input_ids.shape[1])
        positions = positions + next_positions(cache, len(input_ids), input_ids.device)
    return positions, layout


def next_positions(cache: Cache | None, batch: int, device: torch.device) -> torch.Tensor:
    """Returns the position of the first new token of every sequence, `[b, 1]`, also of a batch expanded for beams."""
    past = 0 if cache is None else int(cache.get_seq_length())
    deltas = getattr(cache.layers[0], "rope_deltas", None) if cache is not None and past else None
    if deltas is None:
        return torch.full((batch, 1), past, device=device)
    return _of_batch(deltas.to(device) + past, batch)


def _of_batch(values: torch.Tensor, batch: int) -> torch.Tensor:
    """Returns values of each row `[n, 1]` for `batch` rows, where either batch was expanded for beams."""
    if len(values) > batch:
        return values[:: len(values) // batch]
    return values.repeat_interleave(batch // len(values), dim=0)


def note_hidden(cache: Cache | None, attention_mask: torch.Tensor | None, t: int) -> None:
    """
    Notes which tokens a cache has read as real and the mask of all tokens `[b, past + t]` hides now, as those that
    `generate` puts after the end of a row: they take no position.

    Raises:
        `ValueError`: There are some, and a layer has a recurrent state, which cannot forget them.
    """
    first: Any = None if cache is None else cache.layers[0]
    known = getattr(first, "padding", None)
    if known is None or attention_mask is None or attention_mask.ndim != 2 or torch.compiler.is_compiling():
        return
    assert cache is not None
    past = int(cache.get_seq_length())
    if attention_mask.shape[1] != past + t:  # of the new tokens alone
        return
    now = past - attention_mask[:, :past].bool().sum(1, keepdim=True)
    hidden = now - _of_batch(known.to(now.device), len(now))
    if not bool(hidden.any()):
        return
    if any(isinstance(layer, MMateCacheLayer) for layer in cache.layers):
        row = int(hidden.flatten().nonzero()[0])
        raise ValueError(
            f"attention_mask hides {int(now[row])} of the {past} tokens that row {row} of the cache has read, where "
            f"{int(now[row] - hidden[row])} were hidden then: a recurrent state cannot forget them. Rows that ended "
            f"at different times go on one by one, or without {CACHE}"
        )
    hidden = _of_batch(hidden, len(known)).to(known.device)
    first.padding, first.rope_deltas = known + hidden, first.rope_deltas - hidden.to(first.rope_deltas.device)


def note_rope_deltas(cache: Cache, position_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
    """
    Notes, before the layers of a cache see the new tokens, where the positions `[..., b, t]` of these end. A decode
    step advances the offset implicitly; a first token clears a stale one after `cache.reset()`.
    """
    t, first = position_ids.shape[-1], cache.layers[0]
    if t == 1 and torch.compiler.is_compiling():
        return
    if t == 1 and int(cache.get_seq_length()):
        padding = getattr(first, "padding", None)
        if attention_mask is not None and attention_mask.ndim == 2 and padding is not None:
            hidden = 1 - attention_mask[:, -1:].to(padding)  # it takes no position
            first.padding, first.rope_deltas = padding + hidden, first.rope_deltas - hidden
        return
    # the step over a span is its height or width; the frames of a video do not count
    positions = position_ids if position_ids.ndim == 2 else position_ids[-2:].amax(0)  # [b, t]
    real = torch.ones_like(positions, dtype=torch.bool)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        real = attention_mask[:, -t:].bool().to(positions.device)
        positions = positions.expand_as(real)
    last = (real * torch.arange(t, device=real.device)).argmax(1, keepdim=True)
    # a row of padding alone stays where it was
    before = next_positions(cache, len(real), positions.device)
    following = torch.where(real.any(1, keepdim=True), positions.gather(1, last) + 1, before)
    past = int(cache.get_seq_length())
    first.rope_deltas = following - (past + t)
    padding = t - real.sum(1, keepdim=True)
    earlier = getattr(first, "padding", None) if past else None  # a compiled forward pass has no room for it
    first.padding = padding if earlier is None else _of_batch(earlier.to(padding.device), len(padding)) + padding
