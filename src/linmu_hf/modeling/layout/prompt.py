"""The prompt: what a forward pass is given, read once where it enters the model and handed on as one value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import Cache

from .. import checks
from ..mixers import AttentionMask, padding_mask, recurrent_layers
from .media import GRIDS, PIXELS, Medium, read_media
from .packing import packed_lengths
from .positions import new_positions, note_hidden, note_rope_deltas, positions_within


@dataclass(frozen=True)
class Prompt:
    """
    The new tokens of a batch.

    Args:
        ids (`torch.LongTensor` of shape `[b, t]`, *optional*): Right at the placeholders, also where tokens came as
            embeddings.
        embeds (`torch.Tensor` of shape `[b, t, d]`, *optional*): The tokens, if they came as embeddings.
        mask (`torch.Tensor` of shape `[b, past + t]`, *optional*): 0 at padding; or a `dict` by layer type.
        positions (`torch.LongTensor` of shape `[b, t]`, `[3, b, t]` or `[4, b, t]`, *optional*): Text positions,
            M-RoPE positions, or both with the text positions first.
        vision_layout (`torch.LongTensor` of shape `[b, t, 4]`, *optional*): Span and coordinate of every token.
        lengths (`list[int]`, *optional*): Of the sequences of a packed row.
        cache (`Cache`, *optional*): What was read before; the layers add these tokens.
        past (`int`): Tokens that were read before.
    """

    ids: torch.Tensor | None = None
    embeds: torch.Tensor | None = None
    mask: Any = None
    positions: torch.Tensor | None = None
    vision_layout: torch.Tensor | None = None
    lengths: list[int] | None = None
    cache: Cache | None = None
    past: Any = 0

    @classmethod
    def read(
        cls, model: nn.Module, input_ids: torch.Tensor | None = None, attention_mask: AttentionMask = None,
        position_ids: torch.Tensor | None = None, cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None, media: dict[str, Medium] | None = None,
        second_per_grid_ts: torch.Tensor | Sequence[float] | None = None,
        mm_token_type_ids: torch.Tensor | None = None, vision_layout: torch.Tensor | None = None,
        use_cache: bool | None = None, cu_seqlens: torch.Tensor | None = None,
    ) -> "Prompt":  # fmt: skip
        """
        Checks the arguments of a forward pass and finds out where their tokens are.

        Args:
            model (`LinMUModel`): Knows its placeholders and the grids of its vision side.

        Raises:
            `ValueError`, `TypeError`: An argument does not fit the others.
        """
        media = media or {}
        checks.check_forward(
            model, input_ids, attention_mask, position_ids, cache, inputs_embeds, vision_layout, media,
            mm_token_type_ids,
        )  # fmt: skip
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        recurrent = bool(recurrent_layers(model.config.text_config.layer_types))
        lengths = packed_lengths(tokens, attention_mask, position_ids, cache, cu_seqlens, recurrent)
        cache = model.language_model.open_cache(cache, use_cache, lengths)
        ids, grids = input_ids, {kind: medium.grids for kind, medium in media.items()}
        has_grids = any(grid is not None for grid in grids.values())
        if ids is None:
            given = has_grids or any(medium.is_given for medium in media.values())
            ids = model.placeholder_ids(inputs_embeds, mm_token_type_ids, given)
        if vision_layout is None and (position_ids is None or has_grids):
            where = {f"{kind}_grid_thw": grid for kind, grid in grids.items()}
            where |= {"second_per_grid_ts": second_per_grid_ts, "mm_token_type_ids": mm_token_type_ids}
            derived, vision_layout = new_positions(model, ids, attention_mask, cache, lengths, **where)
            if position_ids is None or (lengths is not None and position_ids.ndim == 2):
                position_ids = derived  # text positions of a packed row say where sequences begin, no more
        if vision_layout is None and any(medium.is_given for medium in media.values()):
            missing = [
                f"{kind}_grid_thw" for kind, medium in media.items() if medium.is_given and medium.grids is None
            ]
            raise ValueError(
                f"images or videos came with position_ids but without {' and '.join(missing)}; pass these, or a "
                "vision_layout with position_ids as `get_positions` returns them"
            )
        past = tokens_read(cache)
        if cache is not None:
            note_hidden(cache, padding_mask(attention_mask), tokens.shape[1])
            note_rope_deltas(cache, position_ids, padding_mask(attention_mask))
        return cls(ids, inputs_embeds, attention_mask, position_ids, vision_layout, lengths, cache, past)

    @classmethod
    def read_batch(cls, model: nn.Module, inputs: Mapping[str, Any]) -> tuple["Prompt", dict[str, Medium]]:
        """Reads whole sequences as a processor returns them, without a cache; returns their media, too."""
        media = read_media(*(inputs.get(name) for name in (*PIXELS.values(), *GRIDS.values())))
        prompt = cls.read(
            model,
            inputs["input_ids"],
            inputs.get("attention_mask"),
            media=media,
            second_per_grid_ts=inputs.get("second_per_grid_ts"),
            mm_token_type_ids=inputs.get("mm_token_type_ids"),
            use_cache=False,
            cu_seqlens=inputs.get("cu_seq_lens_q"),
        )
        return prompt, media

    @property
    def length(self) -> int:
        """Returns the number t of the new tokens of a row."""
        tokens = self.ids if self.embeds is None else self.embeds
        assert tokens is not None
        return tokens.shape[1]

    def __getitem__(self, part: slice) -> "Prompt":
        """Returns the tokens from `part.start` to `part.stop`, after those before them were read."""
        layout = None if self.vision_layout is None else self.vision_layout[:, part]
        if layout is not None and not bool((layout[..., 0] >= 0).any()):
            layout = None
        return replace(
            self,
            ids=None if self.ids is None else self.ids[:, part],
            embeds=None if self.embeds is None else self.embeds[:, part],
            mask=None if self.mask is None else self.mask[:, : self.past + part.stop],
            positions=None if self.positions is None else self.positions[..., part],
            vision_layout=layout,
            past=self.past + part.start,
        )


def tokens_read(cache: Cache | None) -> Any:
    """Returns how many tokens a cache has read: a number, not the tensor of a static cache, which counts on."""
    past = 0 if cache is None else cache.get_seq_length()
    return past if torch.compiler.is_compiling() else int(past)


def text_prompt(
    decoder: nn.Module, tokens: torch.Tensor, attention_mask: AttentionMask, position_ids: torch.Tensor | None,
    cache: Cache | None, vision_layout: torch.Tensor | None, use_cache: bool | None, cu_seqlens: torch.Tensor | None,
) -> Prompt:  # fmt: skip
    """
    Returns the prompt of a text model that is called by itself; without positions tokens are counted.

    Args:
        decoder (`LinMUTextModel`): Whose cache it opens.
        tokens (`torch.Tensor` of shape `[b, t, d]`): Embeddings.
    """
    recurrent = bool(recurrent_layers(decoder.config.layer_types))
    lengths = packed_lengths(tokens, attention_mask, position_ids, cache, cu_seqlens, recurrent)
    cache = decoder.open_cache(cache, use_cache, lengths)
    past = tokens_read(cache)
    if position_ids is None:
        b, t = tokens.shape[:2]
        position_ids = (torch.arange(t, device=tokens.device) + past).expand(b, t)
        if lengths is not None:
            position_ids = positions_within(lengths, tokens.device)
    return Prompt(
        embeds=tokens, mask=attention_mask, positions=position_ids, vision_layout=vision_layout, lengths=lengths,
        cache=cache, past=past,
    )  # fmt: skip
