"""Packed batches: several sequences one after another in one row, which must not see each other."""

from itertools import pairwise

import torch
from transformers import Cache


def packed_lengths(
    tokens: torch.Tensor, attention_mask: torch.Tensor | dict | None, position_ids: torch.Tensor | None,
    past_key_values: Cache | None, cu_seq_lens: torch.Tensor | None = None, recurrent: bool = True,
) -> list[int] | None:  # fmt: skip
    """
    Returns the lengths of the sequences of a packed batch, `None` if the batch is not packed.

    Args:
        tokens (`torch.Tensor` of shape `[b, t, ...]`): Ids or embeddings.
        attention_mask (`torch.Tensor`, *optional*): A batch with one is padded, not packed.
        position_ids (`torch.LongTensor` of shape `[1, t]` or `[4, 1, t]`, *optional*): Text positions, alone or in
            front of those of M-RoPE; a sequence ends where they do not go on by 1, as Transformers has it.
        past_key_values (`Cache`, *optional*): A cache has one state for each row.
        cu_seq_lens (`torch.IntTensor` of shape `[m + 1]`, *optional*): Where the sequences begin, and the end.
        recurrent (`bool`, *optional*, defaults to `True`): Whether a layer of the model has a recurrent state.

    Raises:
        `ValueError`: `cu_seq_lens` does not describe one row, or comes with a mask or a cache; or one of several rows
            holds several sequences, which a recurrent state would take for one.
    """
    b, t = tokens.shape[:2]
    if cu_seq_lens is not None:
        bounds = cu_seq_lens.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        if b != 1 or bounds[:1] != [0] or bounds[-1] != t or min(lengths, default=0) < 1:
            raise ValueError(
                f"cu_seq_lens_q={bounds} must rise from 0 to the {t} tokens of a single row (there are {b} rows)"
            )
        if attention_mask is not None or past_key_values is not None:
            given = "past_key_values" if attention_mask is None else "attention_mask"
            raise ValueError(f"cu_seq_lens_q packs sequences without padding or cache: leave {given} out")
        return lengths
    if position_ids is None or t == 1 or attention_mask is not None or past_key_values is not None:
        return None
    if position_ids.ndim == 3 and position_ids.shape[0] != 4:
        return None  # M-RoPE alone: an image repeats positions too
    text = position_ids if position_ids.ndim == 2 else position_ids[0]  # [b, t]
    starts = text.diff(dim=1) != 1
    if b != 1:
        if recurrent and bool(starts.any()):
            row = int(starts.any(1).nonzero()[0])
            raise ValueError(
                f"position_ids of row {row} of {b} begin anew inside it: sequences share a row only where it is "
                "alone; put all of them into one row, or pad them with an attention_mask"
            )
        return None
    bounds = [0, *(starts[0].nonzero().flatten() + 1).tolist(), t]
    return [end - start for start, end in pairwise(bounds)] if len(bounds) > 2 else None


def unpack(row: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a packed row `[1, t]` as a right-padded batch and its mask, both `[m, longest]`."""
    rows = torch.nn.utils.rnn.pad_sequence(list(row[0].split(lengths)), batch_first=True)
    counts = torch.tensor(lengths, device=row.device)
    return rows, (torch.arange(rows.shape[1], device=row.device) < counts[:, None]).long()


def lengths_to_bounds(lengths: list[int], device: torch.device) -> torch.Tensor:
    """Returns `cu_seq_lens` of the lengths, `[m + 1]`."""
    return torch.tensor([0, *lengths], device=device).cumsum(0)
