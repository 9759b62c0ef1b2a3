"""LinMU: Qwen2.5-VL's vision side and the decoder in which every layer names its mixer."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.modeling_outputs import ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .configuration_linmu import LinMUConfig
from .decoder import LinMUModelOutput, LinMUPreTrainedModel, LinMUTextModel
from .generation import VisionLayoutGeneration, next_positions, remember_positions
from .vision_qwen2_5_vl import Qwen2_5_VLVision, merged_grid_layout


@dataclass
class LinMUCausalLMOutput(ModelOutput):
    """[`LinMUModelOutput`] with `logits` of shape `[b, t, vocab]` and, given labels, the `loss`."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    mixer_inputs: tuple[torch.Tensor, ...] | None = None
    mixer_outputs: tuple[torch.Tensor, ...] | None = None


class LinMUModel(Qwen2_5_VLVision, LinMUPreTrainedModel):
    """Vision tower and decoder, without the language-model head."""

    accepts_loss_kwargs = False

    def __init__(self, config: LinMUConfig):
        super().__init__(config)
        self.visual = self.tower_class._from_config(config.vision_config)
        self.language_model = LinMUTextModel._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value):
        self.language_model.embed_tokens = value

    def token_types(self, input_ids):
        """0 for text, 1 for image and 2 for video placeholders, like the processor's `mm_token_type_ids`."""
        types = torch.zeros_like(input_ids)
        types[input_ids == self.config.image_token_id] = 1
        types[input_ids == self.config.video_token_id] = 2
        return types

    @torch.no_grad()
    def get_positions(
        self,
        input_ids,
        attention_mask=None,
        image_grid_thw=None,
        video_grid_thw=None,
        second_per_grid_ts=None,
        mm_token_type_ids=None,
        **kwargs,
    ):
        """
        Where every token lies, in M-RoPE and in its image or video.

        Args:
            input_ids (`torch.LongTensor` of shape `[b, t]`): With placeholders for vision tokens.
            attention_mask (`torch.Tensor` of shape `[b, t]`, *optional*): 0 at padding.
            image_grid_thw, video_grid_thw, second_per_grid_ts, mm_token_type_ids: As the processor returns them.

        Returns:
            `tuple[torch.LongTensor, torch.LongTensor | None]`: `position_ids` of shape `[3, b, t]` and `vision_layout`
            of shape `[b, t, 4]`, or `None` for text alone.
        """
        if mm_token_type_ids is None:
            mm_token_type_ids = self.token_types(input_ids)
        if attention_mask is not None:
            mm_token_type_ids = mm_token_type_ids * attention_mask.to(mm_token_type_ids.dtype)
        merge = self.config.vision_config.spatial_merge_size
        if image_grid_thw is None and video_grid_thw is None and not bool(mm_token_type_ids.any()):
            if attention_mask is None:
                text = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
            else:
                text = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
            return text.expand(3, -1, -1), None
        layout = merged_grid_layout(mm_token_type_ids, image_grid_thw, video_grid_thw, merge)
        # in a chunk of a longer prompt a row may be padding alone
        rows = slice(None) if attention_mask is None else attention_mask.bool().any(1)
        positions = input_ids.new_zeros(3, *input_ids.shape)
        positions[:, rows], _ = self.get_rope_index(
            input_ids[rows],
            mm_token_type_ids=mm_token_type_ids[rows],
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            second_per_grid_ts=second_per_grid_ts,
            attention_mask=None if attention_mask is None else attention_mask[rows],
        )
        return positions, layout

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pixel_values=None,
        pixel_values_videos=None,
        image_grid_thw=None,
        video_grid_thw=None,
        second_per_grid_ts=None,
        mm_token_type_ids=None,
        mm_encoder_outputs=None,
        vision_layout=None,
        use_cache=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LinMUModelOutput:
        """
        Takes what the Qwen2.5-VL processor returns. `position_ids` and `vision_layout` are derived when absent; with a
        cache, ids, pixels and grids are those of the new tokens.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        use_cache = self.config.text_config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        has_grids = image_grid_thw is not None or video_grid_thw is not None
        ids = self._placeholder_ids(inputs_embeds) if input_ids is None and has_grids else input_ids
        if ids is not None and vision_layout is None and (position_ids is None or has_grids):
            derived, vision_layout = self._new_positions(
                ids, attention_mask, past_key_values,
                image_grid_thw=image_grid_thw, video_grid_thw=video_grid_thw,
                second_per_grid_ts=second_per_grid_ts, mm_token_type_ids=mm_token_type_ids,
            )  # fmt: skip
            position_ids = derived if position_ids is None else position_ids
        if past_key_values is not None and position_ids is not None:
            # single tokens are counted; one at the beginning ends the note of a cache that was reset
            if position_ids.shape[-1] > 1 or not past_key_values.get_seq_length():
                remember_positions(past_key_values, position_ids, attention_mask)
        encoded = [pixel_values, pixel_values_videos, *(mm_encoder_outputs or {}).values()]
        if vision_layout is None and any(value is not None for value in encoded):
            raise ValueError(
                "images or videos came with position_ids but without their vision_layout; pass both as "
                "`get_positions` returns them, or leave position_ids out"
            )
        inputs_embeds = self._scatter_vision(
            input_ids, inputs_embeds, pixel_values, pixel_values_videos, image_grid_thw, video_grid_thw,
            mm_encoder_outputs or {},
        )  # fmt: skip
        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_layout=vision_layout,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )

    def _placeholder_ids(self, inputs_embeds):
        """Ids `[b, t]` that are right at the placeholders, known by their embedding; 0 elsewhere."""
        ids = inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.long)
        for token, places in zip(
            (self.config.image_token_id, self.config.video_token_id), self.get_placeholder_mask(None, inputs_embeds)
        ):
            ids = ids.masked_fill(places[..., 0], token)
        return ids

    def _new_positions(self, input_ids, attention_mask, past_key_values, **vision):
        """`get_positions` of the new tokens, behind what the cache has seen."""
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        new_mask = None if attention_mask is None or isinstance(attention_mask, dict) else attention_mask
        if new_mask is not None:
            new_mask = new_mask[:, -input_ids.shape[1] :]
        positions, layout = self.get_positions(input_ids, new_mask, **vision)
        if past:
            positions = positions + next_positions(past_key_values, input_ids.shape[0], past, input_ids.device)
        return positions, layout

    def _scatter_vision(self, input_ids, embeds, pixel_values, pixel_values_videos, image_grid, video_grid, encoded):
        """Puts vision features in place of their placeholders."""
        if encoded.get("image") is None and pixel_values is not None:
            encoded["image"] = self.get_image_features(pixel_values, image_grid, return_dict=True)
        if encoded.get("video") is None and pixel_values_videos is not None:
            encoded["video"] = self.get_video_features(pixel_values_videos, video_grid, return_dict=True)
        for index, kind in enumerate(("image", "video")):
            if encoded.get(kind) is not None:
                features = torch.cat(encoded[kind].pooler_output).to(embeds.device, embeds.dtype)
                mask = self.get_placeholder_mask(input_ids, inputs_embeds=embeds, **{f"{kind}_features": features})
                embeds = embeds.masked_scatter(mask[index], features)
        return embeds


class LinMUForConditionalGeneration(VisionLayoutGeneration, LinMUPreTrainedModel, GenerationMixin):
    """LinMU with its language-model head: what `AutoModelForImageTextToText` loads."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    accepts_loss_kwargs = False

    def __init__(self, config: LinMUConfig):
        super().__init__(config)
        self.model = LinMUModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_image_features(self, pixel_values, image_grid_thw=None, **kwargs):
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    def get_video_features(self, pixel_values_videos, video_grid_thw=None, **kwargs):
        return self.model.get_video_features(pixel_values_videos, video_grid_thw, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        mm_token_type_ids: torch.IntTensor | None = None,
        mm_encoder_outputs: dict | None = None,
        vision_layout: torch.LongTensor | None = None,
        output_mixer_states: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LinMUCausalLMOutput:
        """
        Args:
            labels (`torch.LongTensor` of shape `[b, t]`, *optional*): -100 where no loss is wanted.
            vision_layout (`torch.LongTensor` of shape `[b, t, 4]`, *optional*): Span and coordinate of every token;
                derived from the grids when absent.
            output_mixer_states (`bool`, *optional*, defaults to `False`): Return every mixer's input and output.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0): Last positions (0: all), or an index
                into the positions, for which logits are computed.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            second_per_grid_ts=second_per_grid_ts,
            mm_token_type_ids=mm_token_type_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            vision_layout=vision_layout,
            use_cache=use_cache,
            output_mixer_states=output_mixer_states,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return LinMUCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            mixer_inputs=outputs.mixer_inputs,
            mixer_outputs=outputs.mixer_outputs,
        )


__all__ = ["LinMUForConditionalGeneration", "LinMUModel", "LinMUPreTrainedModel", "LinMUTextModel"]
