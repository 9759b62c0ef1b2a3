"""What generation adds to Transformers' own: the layout of the prompt, chunks, positions after cached tokens."""

import bisect
import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import (
    Cache,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedConfig,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)
from transformers.masking_utils import create_causal_mask

from .checks import check_prompt, is_checked, mark_checked
from .compat import CACHE, MediaGeneration, takes_aliases
from .decoder import LinMUCausalLMOutput
from .layout.media import GRIDS, PIXELS, read_media
from .layout.positions import new_positions
from .layout.prompt import Prompt
from .mixers import padding_mask, recurrent_layers


MEDIA_KEYS = (
    *PIXELS.values(), *GRIDS.values(), "second_per_grid_ts", "mm_token_type_ids", "mm_encoder_outputs",
)  # fmt: skip


def chunk_sizes(
    vision_layout: torch.Tensor | None, length: int, chunk_size: int, reverse_scope: str = "span"
) -> list[int]:
    """
    Returns the sizes of the chunks of a prefill: at most `chunk_size` tokens each, cut between images and videos. A
    span longer than that is read in one chunk.

    Args:
        vision_layout (`torch.LongTensor` of shape `[b, length, 4]` or `None`): Of the tokens to read.
        length, chunk_size (`int`): Tokens in all, and of a chunk.
        reverse_scope (`str`): With `"sequence"`, all vision tokens of a row are one span.
    """
    # spans that a cut in front of a token would cut
    inside = torch.zeros(length + 1, dtype=torch.long, device="cpu")
    for row in () if vision_layout is None else vision_layout[..., 0].cpu():
        places = (row >= 0).nonzero().flatten()
        row = row.clamp_max(0) if reverse_scope == "sequence" else row
        spans, member = row[places].unique(return_inverse=True)
        first = torch.full_like(spans, length).scatter_reduce(0, member, places, "amin")
        last = torch.zeros_like(spans).scatter_reduce(0, member, places, "amax")
        inside.index_add_(0, first + 1, torch.ones_like(first))
        inside.index_add_(0, last + 1, -torch.ones_like(last))
    cuts = (inside.cumsum(0) == 0).nonzero().flatten().tolist()
    ends = [0]
    while ends[-1] < length:
        within = cuts[bisect.bisect_right(cuts, ends[-1] + chunk_size) - 1]
        ends.append(within if within > ends[-1] else cuts[bisect.bisect_right(cuts, ends[-1])])
    return [end - start for start, end in pairwise(ends)]


def join_padding(sizes: Sequence[int], attention_mask: torch.Tensor | None) -> list[int]:
    """Joins chunks that are padding in all rows, by the mask `[b, past + t]`, with the next one, or with the last."""
    if attention_mask is None:
        return list(sizes)
    real = attention_mask[:, -sum(sizes) :].bool().any(0).split(list(sizes))
    joined, waiting = [], 0
    for size, part in zip(sizes, real):
        waiting += size
        if bool(part.any()):
            joined.append(waiting)
            waiting = 0
    if waiting and joined:
        joined[-1] += waiting
    return joined or [waiting]


class WideScores(LogitsProcessor):
    """
    A wrapper that lends a processor scores for placeholders outside the vocabulary, which it looks up because the
    prompt has them.

    Args:
        processor (`LogitsProcessor`): What changes the scores.
        width (`int`): Ids that the prompt may have.
    """

    LOOK_UP_PROMPT = (
        RepetitionPenaltyLogitsProcessor,
        EncoderRepetitionPenaltyLogitsProcessor,
        NoRepeatNGramLogitsProcessor,
        EncoderNoRepeatNGramLogitsProcessor,
        SequenceBiasLogitsProcessor,  # and bad words
    )

    def __init__(self, processor: LogitsProcessor, width: int):
        self.processor, self.width = processor, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        known = scores.shape[-1]
        wide = nn.functional.pad(scores, (0, max(0, self.width - known)), value=-torch.inf)
        return self.processor(input_ids, wide)[:, :known]


class VisionLayoutGeneration(MediaGeneration):
    """
    Hooks of `generate`. It encodes images first and then drops pixels and grids; what the decoder needs of them
    travels as the per-token `vision_layout`, computed together with the positions, before the drop.
    """

    config: Any
    model: Any
    lm_head: nn.Module

    @takes_aliases
    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if CACHE != "past_key_values" and "past_key_values" in kwargs:
            kwargs[CACHE] = kwargs.pop("past_key_values")
        return super().generate(*args, **kwargs)

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        input_ids = model_kwargs.get("input_ids", inputs_tensor)
        if "inputs_embeds" not in model_kwargs:
            check_prompt(self.model, input_ids, model_kwargs.get("attention_mask"), model_kwargs.get(CACHE))
        text_positions = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        types, embeds = (model_kwargs.get(name) for name in ("mm_token_type_ids", "inputs_embeds"))
        if embeds is not None and any(model_kwargs.get(name) is not None for name in GRIDS.values()):
            input_ids = self.model.placeholder_ids(embeds, types, True)
        if input_ids.ndim != 2 or torch.is_floating_point(input_ids) or not input_ids.shape[1]:
            return text_positions
        cache = model_kwargs.get(CACHE)
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = model_kwargs.get("attention_mask")
        if mask is None or mask.shape[1] == input_ids.shape[1]:
            input_ids = input_ids[:, past:]  # a resumed call may pass all ids or the new ones, with the mask of all
        t = input_ids.shape[1]
        positions, layout = new_positions(
            self.model,
            input_ids,
            mask,
            cache,
            mm_token_type_ids=None if types is None else types[:, -t:],
            **{name: model_kwargs.get(name) for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")},
        )
        # both begin with the first token of the cache, so that chunks of a prefill can be cut out of them
        if layout is not None:
            model_kwargs["vision_layout"] = mark_checked(nn.functional.pad(layout, (0, 0, past, 0), value=-1))
        positions = nn.functional.pad(positions, (past, 0))
        text_positions = text_positions.expand(len(input_ids), -1)[:, -positions.shape[-1] :]
        return torch.cat([text_positions[None], positions])

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        width = 1 + max(self.model.placeholders.values())
        if width <= self.model.n_embeddings:
            return processors
        return LogitsProcessorList(
            WideScores(one, width) if isinstance(one, WideScores.LOOK_UP_PROMPT) else one for one in processors
        )

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, is_first_iteration: bool = False, inputs_embeds: torch.Tensor | None = None,
        vision_layout: torch.Tensor | None = None, **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, inputs_embeds=inputs_embeds, **kwargs
        )
        # only prefill sees vision tokens; without a cache every step is a prefill
        if vision_layout is not None and (is_first_iteration or not kwargs.get("use_cache", True)):
            embeds = inputs.get("inputs_embeds")
            length = (inputs["input_ids"] if embeds is None else embeds).shape[1]
            cache = kwargs.get(CACHE)
            start = 0 if cache is None else int(cache.get_seq_length())
            layout = vision_layout[:, start : start + length]
            inputs["vision_layout"] = nn.functional.pad(layout, (0, 0, 0, length - layout.shape[1]), value=-1)
            if is_checked(vision_layout):
                mark_checked(inputs["vision_layout"])
        return inputs

    @staticmethod
    @takes_aliases
    def create_masks_for_generate(
        config: PreTrainedConfig, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None,
        past_key_values: Cache | None, position_ids: torch.Tensor | None = None, **kwargs: Any,
    ) -> dict[str, torch.Tensor | None]:  # fmt: skip
        """
        Returns the mask of each layer type: causal for attention, and for M-MATE the padding among the new tokens.
        """
        config, masks = config.get_text_config(), {}
        if "full_attention" in config.layer_types:
            masks["full_attention"] = create_causal_mask(
                config=config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids if position_ids is None or position_ids.ndim == 2 else position_ids[0],
                layer_idx=config.layer_types.index("full_attention"),
                **{CACHE: past_key_values},
            )
        if attention_mask is not None:
            new = attention_mask[:, -inputs_embeds.shape[1] :]
            attention_mask = new.clone(memory_format=torch.contiguous_format)  # strides that do not grow
        recurrent = {config.layer_types[index] for index in recurrent_layers(config.layer_types)}
        return masks | dict.fromkeys(recurrent, attention_mask)

    def _prefill(
        self, input_ids: torch.Tensor | None, generation_config: GenerationConfig, model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> LinMUCausalLMOutput:  # fmt: skip
        """Transformers' own cuts the prompt every `prefill_chunk_size` tokens; here images and videos stay whole."""
        chunk_size = generation_config.prefill_chunk_size
        if chunk_size is None:
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        cache = model_kwargs.get(CACHE)
        if cache is None:
            raise ValueError(f"prefill_chunk_size={chunk_size} needs a cache: leave use_cache=False out")
        past = int(cache.get_seq_length())
        mask, positions, layout = (
            model_kwargs.get(key) for key in ("attention_mask", "position_ids", "vision_layout")
        )
        embeds = model_kwargs.get("inputs_embeds") if is_first_iteration else None
        if embeds is not None:
            input_ids, embeds = None, embeds[:, past:]
        elif positions is not None:  # of all tokens; ids may be all or the new ones
            input_ids = input_ids[:, past - positions.shape[-1] :]
        return self.prefill(
            input_ids,
            mask,
            cache,
            chunk_size=chunk_size,
            inputs_embeds=embeds,
            position_ids=None if positions is None else positions[..., past:],
            vision_layout=None if layout is None else layout[:, past:],
            output_hidden_states=generation_config.output_hidden_states,
            output_attentions=generation_config.output_attentions,
            **{key: model_kwargs[key] for key in MEDIA_KEYS if model_kwargs.get(key) is not None},
        )

    @takes_aliases
    @torch.no_grad()
    def prefill(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        *,
        chunk_size: int = 8192,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        vision_layout: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        second_per_grid_ts: torch.Tensor | Sequence[float] | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
    ) -> LinMUCausalLMOutput:
        """
        Reads a prompt of any length in chunks, so that the memory of activations is that of one chunk. Chunks end
        between images and videos; a longer one is read whole (`max_span_frames` of the configuration bounds a video).

        Args:
            input_ids (`torch.LongTensor` of shape `[b, t]`): The new tokens.
            attention_mask (`torch.Tensor` of shape `[b, past + t]`, *optional*): 0 at padding.
            past_key_values (`Cache`, *optional*): What was read before; a new `DynamicCache` by default.
            chunk_size (`int`, *optional*, defaults to 8192): Most tokens of a chunk, beside those that are padding in
                all rows.
            output_hidden_states, output_attentions (`bool`, *optional*): Whether to return those of the last chunk.
            inputs_embeds (`torch.Tensor` of shape `[b, t, d]`, *optional*): In place of ids.
            pixel_values, image_grid_thw, ... (*optional*): As in `forward`, of the new tokens.

        Returns:
            [`LinMUCausalLMOutput`] with the logits of the last token, `[b, 1, vocab]`, and the cache, from which
            `generate` and `forward` go on.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} must be at least 1")
        media = read_media(pixel_values, pixel_values_videos, image_grid_thw, video_grid_thw, mm_encoder_outputs)
        prompt = Prompt.read(
            self.model, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, media,
            second_per_grid_ts, mm_token_type_ids, vision_layout, use_cache=True,
        )  # fmt: skip
        features, start = self.model.encode_media(media), 0
        scope = self.config.text_config.reverse_scope
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        sizes = chunk_sizes(prompt.vision_layout, prompt.length, chunk_size, scope)
        for size in join_padding(sizes, padding_mask(prompt.mask)):
            embeds = self.model.embed_prompt(prompt, features, start, start + size)
            outputs = self.model.language_model(inputs_embeds=embeds, prompt=prompt[start : start + size], **asked)
            start += size
        return LinMUCausalLMOutput(
            logits=self.lm_head(outputs.last_hidden_state[:, -1:]),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: prompt.cache},
        )

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            "continuous batching pages keys and values; a recurrent state has none. Use generate with a padded batch"
        )
