"""What generation adds to Transformers' own: the vision layout of the prompt, and positions behind a cache."""

import torch
from torch import nn
from transformers import Cache


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


class VisionLayoutGeneration:
    """
    Hooks of `generate`. It encodes images first and then drops pixels and grids; what the decoder needs of them
    travels as the per-token `vision_layout`, computed together with the positions, before the drop.
    """

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        text_positions = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        input_ids = model_kwargs.get("input_ids", inputs_tensor)
        if input_ids.ndim != 2 or torch.is_floating_point(input_ids):
            return text_positions
        cache = model_kwargs.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        mask = model_kwargs.get("attention_mask")
        types = model_kwargs.get("mm_token_type_ids")
        positions, layout = self.model._new_positions(
            input_ids[:, past:],
            mask,
            cache,
            mm_token_type_ids=None if types is None else types[:, past:],
            **{name: model_kwargs.get(name) for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")},
        )
        model_kwargs["vision_layout"] = layout
        text_positions = text_positions.expand(input_ids.shape[0], -1)[:, -positions.shape[-1] :]
        return torch.cat([text_positions[None], positions])

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration=False, vision_layout=None, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        # only prefill sees vision tokens; without a cache every step is a prefill
        if vision_layout is not None and (is_first_iteration or not kwargs.get("use_cache", True)):
            embeds = inputs.get("inputs_embeds")
            length = (inputs["input_ids"] if embeds is None else embeds).shape[1]
            grown = length - vision_layout.shape[1]
            inputs["vision_layout"] = nn.functional.pad(vision_layout, (0, 0, 0, grown), value=-1)
        return inputs
