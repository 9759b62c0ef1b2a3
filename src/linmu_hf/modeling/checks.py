"""What enters the model is checked before work starts, so that an error names the argument and the remedy.

Shapes are checked in every call. Values are looked at only where a prompt is read: a decode step must not wait for the
device. Nothing is checked while compiling.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from .layout.media import KINDS, Medium
from .mixers import AttentionMask, padding_mask, recurrent_layers


def check_forward(
    model: nn.Module, input_ids: Tensor | None = None, attention_mask: AttentionMask = None,
    position_ids: Tensor | None = None, past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None,
    vision_layout: Tensor | None = None, media: dict[str, Medium] | None = None,
    mm_token_type_ids: Tensor | None = None,
) -> None:  # fmt: skip
    """
    Checks the arguments of [`LinMUModel`]'s forward, but for pixels and grids, which are checked where they are read.

    Args:
        media (`dict[str, Medium]`): Images and videos.

    Raises:
        `ValueError`, `TypeError`: An argument is of the wrong kind, or does not fit the others.
    """
    if torch.compiler.is_compiling():
        return
    text = model.config.text_config
    check_tokens(model, input_ids, inputs_embeds, past_key_values)
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    check_decoder_inputs(tokens, attention_mask, position_ids, past_key_values, vision_layout, text.layer_types)
    if not _reads_prompt(tokens, past_key_values):
        return
    if input_ids is None:
        if mm_token_type_ids is not None:
            expect("mm_token_type_ids", mm_token_type_ids, tuple(tokens.shape[:2]), "[batch, tokens]")
        return
    media = media or {}
    for kind, medium in media.items():
        if medium.grids is not None and not medium.is_given:
            pixels = "pixel_values" if kind == "image" else "pixel_values_videos"
            raise ValueError(f"{kind}_grid_thw came without {pixels}; pass both as the processor returned them")
    mask = padding_mask(attention_mask)
    mask = None if mask is None else mask[:, -input_ids.shape[1] :]
    grids = {f"{kind}_grid_thw": medium.grids for kind, medium in media.items()}
    has_grids = any(grid is not None for grid in grids.values())
    given = any(medium.is_given for medium in media.values())
    # positions of four rows are those of `generate`, which has seen the prompt that they belong to
    unseen = position_ids is not None and position_ids.shape[:-2] != (4,) and not given
    if vision_layout is not None and not is_checked(vision_layout):
        check_spans(vision_layout, model.token_types(input_ids), mask, model.vision.all_cells and given)
    if (vision_layout is not None and has_grids) or (vision_layout is None and unseen):
        check_media(model.token_types(input_ids), mask, model.vision, **grids)


def mark_checked(vision_layout: Tensor | None) -> Tensor | None:
    """Returns a layout that was made here from checked grids, so that no forward pass looks at its values again."""
    if vision_layout is not None and not torch.compiler.is_compiling():
        vision_layout.linmu_checked = True
    return vision_layout


def is_checked(vision_layout: Tensor) -> bool:
    return getattr(vision_layout, "linmu_checked", False)


def check_prompt(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: Cache | None = None
) -> None:
    """
    Checks ids `[b, t]` and mask of a prompt that `generate` is given: all tokens, or those after the cached ones.

    Raises:
        `ValueError`, `TypeError`: As in [`check_forward`].
    """
    if torch.compiler.is_compiling():
        return
    check_tokens(model, input_ids)
    b, t = input_ids.shape
    if attention_mask is not None:
        seen = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        all_given = isinstance(attention_mask, torch.Tensor) and tuple(attention_mask.shape) == (b, t)
        _check_mask(attention_mask, b, t, 0 if all_given else seen, True)


def check_tokens(
    model: nn.Module, input_ids: Tensor | None, inputs_embeds: Tensor | None = None,
    past_key_values: Cache | None = None,
) -> None:  # fmt: skip
    """
    Checks ids or embeddings.

    Args:
        model (`LinMUModel`): Whose placeholders may be outside the vocabulary.
        input_ids (`torch.LongTensor` of shape `[b, t]`) or inputs_embeds (`torch.Tensor` of shape `[b, t, d]`).
        past_key_values (`Cache`, *optional*): With one, the values of single tokens are not looked at.

    Raises:
        `ValueError`, `TypeError`: Both or none are given; wrong type or shape; no token; an id without an embedding.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    embedding = model.get_input_embeddings()
    if inputs_embeds is not None:
        width = model.config.text_config.hidden_size
        expect("inputs_embeds", inputs_embeds, (None, None, width), "[batch, tokens, hidden_size]", True)
        weight = getattr(embedding, "weight", inputs_embeds)
        if inputs_embeds.dtype != weight.dtype and not torch.is_autocast_enabled(inputs_embeds.device.type):
            raise ValueError(
                f"inputs_embeds are {inputs_embeds.dtype} and the model is {weight.dtype}; cast one like the other"
            )
    else:
        expect("input_ids", input_ids, (None, None), "[batch, tokens]")
    name, tokens = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    if not tokens.shape[0] or not tokens.shape[1]:
        raise ValueError(f"{name} of shape {tuple(tokens.shape)} hold no token; pass at least one row and one token")
    if input_ids is not None and _reads_prompt(input_ids, past_key_values):
        lowest, highest = (int(one) for one in model.embeddable(input_ids).aminmax())
        if lowest < 0 or highest >= model.n_embeddings:
            raise ValueError(
                f"input_ids hold {lowest if lowest < 0 else highest}, outside the vocabulary of "
                f"{model.n_embeddings}; use the tokenizer of this model, and a padding id that it knows"
            )


def check_decoder_inputs(
    tokens: Tensor, attention_mask: AttentionMask = None, position_ids: Tensor | None = None,
    past_key_values: Cache | None = None, vision_layout: Tensor | None = None,
    layer_types: Sequence[str] = ("m_mate",),
) -> None:  # fmt: skip
    """
    Checks mask, positions, cache and layout against the new tokens, `[b, t]` or `[b, t, d]`.

    Raises:
        `ValueError`, `TypeError`: A shape that does not fit, or values that cannot be.
    """
    b, t = tokens.shape[:2]
    past = 0
    if past_key_values is not None:
        if not isinstance(past_key_values, Cache):
            raise TypeError(f"past_key_values is a {type(past_key_values).__name__}; pass a transformers.Cache")
        rows = _cached_rows(past_key_values)
        if rows not in (None, b):
            raise ValueError(
                f"past_key_values hold {rows} sequences and the batch has {b}; pass the cache of this batch"
            )
        past = int(past_key_values.get_seq_length()) if t > 1 else 0
    reads_prompt = _reads_prompt(tokens, past_key_values)
    # the decoder reads other masks, or one for each layer type, beside positions that cannot be told from them
    attends = position_ids is not None and not recurrent_layers(layer_types)
    pattern = attends and getattr(attention_mask, "ndim", 0) == 4
    if attention_mask is not None and not isinstance(attention_mask, dict) and not pattern:
        _check_mask(attention_mask, b, t, past, reads_prompt)
    if position_ids is not None:
        expect("position_ids", position_ids, None, "")
        axes, rows = position_ids.shape[:-2], position_ids.shape[-2:]
        if axes not in ((), (3,), (4,)) or rows not in ((b, t), (1, t)):
            raise ValueError(
                f"position_ids of shape {tuple(position_ids.shape)} do not fit {b} rows of {t} tokens; pass "
                "[batch, tokens], or 3 (M-RoPE) or 4 (text positions and M-RoPE) of these, or leave them out"
            )
    if vision_layout is not None:
        expect("vision_layout", vision_layout, (b, t, 4), "[batch, tokens, 4]")
        if reads_prompt and not is_checked(vision_layout):
            _check_layout(vision_layout)


def check_media(
    types: Tensor, attention_mask: Tensor | None, vision: Any, image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None, second_per_grid_ts: Tensor | Sequence[float] | None = None,
) -> None:  # fmt: skip
    """
    Checks placeholders against grids: the runs of image (1) and video (2) tokens of `types` `[b, t]` are those that
    the vision side expects for the grids.

    Raises:
        `ValueError`, `TypeError`: Grids are not valid, or describe other media than the placeholders.
    """
    rows = torch.arange(types.shape[0], device=types.device)[:, None] * 4 + types.long()
    real = rows.flatten() if attention_mask is None else rows[attention_mask.bool()]
    keys, runs = torch.unique_consecutive(real, return_counts=True)
    runs = list(zip(keys.tolist(), runs.tolist()))
    for name, kind in KINDS.items():
        found = [(key // 4, count) for key, count in runs if key % 4 == kind]
        grids = {"image": image_grid_thw, "video": video_grid_thw}[name]
        media = [] if grids is None else vision.runs(name, grids)
        counts, sizes = [count for _, count in found], [size for medium in media for size in medium]
        if sizes != counts:
            raise ValueError(
                f"the prompt has {sum(counts)} {name} tokens{_in_runs(counts)} but {name}_grid_thw describes "
                f"{sum(sizes)} ({len(media)} {name}s{_in_runs(sizes)}); pass the grids that the processor returned "
                "with these input_ids"
            )
        places = iter(row for row, _ in found)
        for number, medium in enumerate(media):
            if len({next(places) for _ in medium}) > 1:
                raise ValueError(
                    f"{name}_grid_thw has the entry {grids[number].tolist()}, whose tokens would be in several rows "
                    "of the batch; pass the grids in the order in which the processor returned them"
                )
    videos = 0 if video_grid_thw is None else len(video_grid_thw)
    if videos and second_per_grid_ts is not None:
        seconds = second_per_grid_ts.tolist() if isinstance(second_per_grid_ts, torch.Tensor) else second_per_grid_ts
        if not isinstance(seconds, (list, tuple)) or len(seconds) != videos:
            raise ValueError(
                f"second_per_grid_ts={second_per_grid_ts} must have one entry for each of {videos} videos"
            )
        if not all(isinstance(one, Real) and math.isfinite(one) and one >= 0 for one in seconds):
            raise ValueError(f"second_per_grid_ts={second_per_grid_ts} must be seconds, none negative")


def check_values(name: str, pixels: Tensor) -> None:
    """Raises a `ValueError` if pixels are not finite."""
    if not bool(pixels.isfinite().all()):
        raise ValueError(f"{name} hold NaN or infinite values; look at the images, or at their normalisation")


def check_types(types: Tensor, expected: Tensor, attention_mask: Tensor | None = None) -> None:
    """Checks `mm_token_type_ids` `[b, t]` against what the placeholders of the prompt say."""
    expect("mm_token_type_ids", types, tuple(expected.shape), "[batch, tokens]")
    wrong = types != expected
    if attention_mask is not None:
        wrong = wrong & attention_mask.bool()
    if bool(wrong.any()):
        raise ValueError(
            f"mm_token_type_ids differ from the placeholders among input_ids at {int(wrong.sum())} tokens; they are "
            "1 at image and 2 at video placeholders and 0 elsewhere: pass what the processor returned, or nothing"
        )


def check_spans(
    vision_layout: Tensor, expected: Tensor, attention_mask: Tensor | None = None, complete: bool = False
) -> None:
    """Checks that the vision tokens of a layout `[b, t, 4]` are placeholders; with `complete`, all of them."""
    inside, places = vision_layout[..., 0] >= 0, expected > 0
    if attention_mask is not None:
        places = places & attention_mask.bool()
    if bool((inside & ~places).any()) or (complete and not torch.equal(inside, places)):
        raise ValueError(
            f"vision_layout has {int(inside.sum())} vision tokens that are not the {int(places.sum())} placeholders "
            "of input_ids; pass what `get_positions` returns for these input_ids"
        )


def check_head_inputs(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, vocabulary: int, labels: Tensor | None = None,
    logits_to_keep: int | Tensor = 0,
) -> None:  # fmt: skip
    """
    Checks labels and the choice of logits against the new tokens, `[b, t]` or `[b, t, d]`.

    Raises:
        `ValueError`, `TypeError`: Wrong shape, a label that is not a token, a choice outside the sequence, or labels
            of which some have no logits.
    """
    tokens, dims = (input_ids, 2) if inputs_embeds is None else (inputs_embeds, 3)
    if torch.compiler.is_compiling() or getattr(tokens, "ndim", 0) != dims or not all(tokens.shape):
        return  # such tokens are refused where they are read
    b, t = tokens.shape[:2]
    if isinstance(logits_to_keep, torch.Tensor):
        expect("logits_to_keep", logits_to_keep, (None,), "[positions]")
        if logits_to_keep.numel() and not -t <= int(logits_to_keep.min()) <= int(logits_to_keep.max()) < t:
            raise ValueError(f"logits_to_keep={logits_to_keep.tolist()} must be within the {t} tokens")
        everything = len(logits_to_keep) == t
    elif isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int) or logits_to_keep < 0:
        raise ValueError(
            f"logits_to_keep={logits_to_keep!r} must be a number of last tokens (0: all) or their indices"
        )
    else:
        everything = logits_to_keep in (0, t) or logits_to_keep > t
    if labels is not None:
        expect("labels", labels, (b, t), "[batch, tokens], as input_ids")
        if not everything:
            raise ValueError(f"labels need the logits of all tokens: leave logits_to_keep={logits_to_keep} out")
        lowest, highest = (int(one) for one in labels.masked_fill(labels == -100, 0).aminmax())
        if lowest < 0 or highest >= vocabulary:
            raise ValueError(
                f"labels hold {lowest if lowest < 0 else highest}, outside the vocabulary of {vocabulary}; use -100 "
                "where no loss is wanted"
            )


def _reads_prompt(tokens: Tensor, past_key_values: Cache | None) -> bool:
    """Whether this is more than a decode step."""
    return past_key_values is None or tokens.shape[1] > 1


def _check_mask(mask: Any, b: int, t: int, past: int, reads_prompt: bool) -> None:
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"attention_mask is a {type(mask).__name__}; pass a tensor [batch, tokens], 0 at padding")
    if mask.ndim != 2:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} is not [batch, tokens]; M-MATE layers know padding only, "
            "not arbitrary attention patterns: pass 0 at padding and 1 elsewhere"
        )
    if mask.shape[0] != b or mask.shape[1] < t or (reads_prompt and mask.shape[1] != past + t):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} does not fit {b} rows of {past} cached and {t} new tokens; "
            "pass one entry for each of these"
        )
    if reads_prompt and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError("attention_mask must be 0 at padding and 1 elsewhere; it is not added to scores")


def _check_layout(layout: Tensor) -> None:
    """Each frame of each span of each row is a whole grid, every cell of it once, and no frame is missing."""
    inside = layout[..., 0] >= 0
    if bool(((layout < 0) == inside[..., None]).any()):
        raise ValueError("vision_layout must be -1 in all four entries of text and nowhere negative at vision tokens")
    if not bool(inside.any()):
        return
    cells = torch.cat([inside.nonzero()[:, :1], layout[inside].long()], dim=1)  # row, span, T, H, W
    frames, member, counts = cells[:, :3].unique(dim=0, return_inverse=True, return_counts=True)
    extent = _extents(member, cells[:, 3:] + 1, len(frames))
    spans, member, present = frames[:, :2].unique(dim=0, return_inverse=True, return_counts=True)
    last = _extents(member, frames[:, 2:] + 1, len(spans))
    whole = (
        len(cells.unique(dim=0)) == len(cells)
        and torch.equal(extent.prod(1), counts)
        and torch.equal(last[:, 0], present)
    )
    if not whole:
        raise ValueError(
            "vision_layout has a span that is no whole grid: an image or video must be read together, each of its "
            "cells once; pass what `get_positions` returns"
        )


def _extents(member: Tensor, values: Tensor, n: int) -> Tensor:
    """Largest values `[n, ...]` of each of n groups."""
    extent = torch.zeros(n, values.shape[1], dtype=torch.long, device=values.device)
    return extent.scatter_reduce(0, member[:, None].expand_as(values), values, "amax")


def _cached_rows(cache: Cache) -> int | None:
    """Sequences of a cache, if it holds any."""
    for layer in cache.layers:
        for held in (getattr(layer, "keys", None), (getattr(layer, "recurrent_states", None) or [None])[0]):
            if isinstance(held, torch.Tensor) and held.ndim == 4:
                return held.shape[0]
    return None


def expect(name: str, value: Any, shape: tuple[int | None, ...] | None, meaning: str, floating: bool = False) -> None:
    """
    Checks that `value` is a tensor of integers (or of floating-point numbers) of this shape; `None` is any size, or
    any shape.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; pass a tensor (return_tensors='pt' in the processor)")
    if shape is not None and (
        value.ndim != len(shape) or any(size not in (None, own) for size, own in zip(shape, value.shape))
    ):
        expected = "" if None in shape else f" = {list(shape)}"
        raise ValueError(f"{name} of shape {tuple(value.shape)} must be {meaning}{expected}")
    if floating != value.dtype.is_floating_point or value.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise TypeError(f"{name} is {value.dtype}; it must be {'floating-point' if floating else 'an integer type'}")


def _in_runs(sizes: list[int]) -> str:
    return f" of {sizes} tokens" if 1 < len(sizes) <= 8 else ""
