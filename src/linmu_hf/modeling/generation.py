"""What generation adds to Transformers' own: the vision layout of the prompt, and positions behind a cache."""

import torch
from torch import nn
from transformers import Cache

from .compat import MediaGeneration


def remember_positions(cache: Cache, position_ids, attention_mask=None):
    """
    Notes on the cache, before its layers see them, the positions of several new tokens: an image advances positions by
    less than its tokens, so what follows cannot be told from the length.
    """
    b, t = position_ids.shape[-2:]
    # the step over a span is its height or width; the frames of a video do not count
    positions = position_ids if position_ids.ndim == 2 else position_ids[-2:].amax(0)  # [b, t]
    positions = positions.expand(b, t)
    real = torch.ones_like(positions, dtype=torch.bool)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        real = attention_mask[:, -t:].bool()
    last = (real * torch.arange(t, device=real.device)).argmax(1, keepdim=True)
    past = cache.get_seq_length()
    # a row of padding alone stays where it was
    before = next_positions(cache, b, past, positions.device)
    following = torch.where(real.any(1, keepdim=True), positions.gather(1, last) + 1, before)
    cache.linmu_next_position = following.squeeze(1)  # [b]
    cache.linmu_seen = past + t


def next_positions(cache: Cache, batch: int, past: int, device):
    """Position of the first new token of every sequence, `[b, 1]`; a batch expanded for beams is followed."""
    known = getattr(cache, "linmu_next_position", None)
    if known is None:
        return torch.full((batch, 1), past, device=device)
    # since the note was taken, generation has added text: one position a token
    known = known.to(device) + (past - cache.linmu_seen)
    return known.repeat_interleave(batch // len(known))[:, None]


class VisionLayoutGeneration(MediaGeneration):
    """
    Hooks of `generate`. It encodes images first and then drops pixels and grids; what the decoder needs of them
    travels as the per-token `vision_layout`, computed together with the positions, before the drop.
    """

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        text_positions = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        input_ids = model_kwargs.get("input_ids", inputs_tensor)
        if input_ids.ndim != 2 or torch.is_floating_point(input_ids) or not input_ids.shape[1]:
            return text_positions
        cache = model_kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = model_kwargs.get("attention_mask")
        if mask is None or mask.shape[1] == input_ids.shape[1]:
            input_ids = input_ids[:, past:]  # who resumes may pass all ids or the new ones, with the mask of all
        t = input_ids.shape[1]
        types = model_kwargs.get("mm_token_type_ids")
        positions, layout = self.model._new_positions(
            input_ids,
            mask,
            cache,
            mm_token_type_ids=None if types is None else types[:, -t:],
            **{name: model_kwargs.get(name) for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")},
        )
        # both begin with the first token of the cache, so that chunks of a prefill can be cut out of them
        if layout is not None:
            model_kwargs["vision_layout"] = nn.functional.pad(layout, (0, 0, past, 0), value=-1)
        positions = nn.functional.pad(positions, (past, 0))
        text_positions = text_positions.expand(len(input_ids), -1)[:, -positions.shape[-1] :]
        return torch.cat([text_positions[None], positions])

    def prepare_inputs_for_generation(
        self, input_ids, is_first_iteration=False, inputs_embeds=None, vision_layout=None, **kwargs
    ):
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, inputs_embeds=inputs_embeds, **kwargs
        )
        # only prefill sees vision tokens; without a cache every step is a prefill
        if vision_layout is not None and (is_first_iteration or not kwargs.get("use_cache", True)):
            embeds = inputs.get("inputs_embeds")
            length = (inputs["input_ids"] if embeds is None else embeds).shape[1]
            cache = kwargs.get("past_key_values")
            start = 0 if cache is None else int(cache.get_seq_length())
            inputs["vision_layout"] = cut_layout(vision_layout, start, start + length)
        return inputs


def cut_layout(vision_layout, start: int, end: int):
    """The layout of the tokens from `start` to `end`; tokens behind the layout are text."""
    inside, behind = vision_layout[:, start:end], vision_layout[:, end:, 0]
    if torch.isin(behind[behind >= 0], inside[..., 0]).any():
        raise ValueError(
            f"a chunk of the prefill ends before token {end}, inside an image or video, whose tokens must be read "
            "together; leave prefill_chunk_size out, or choose one whose borders lie between images"
        )
    return nn.functional.pad(inside, (0, 0, 0, end - start - inside.shape[1]), value=-1)
