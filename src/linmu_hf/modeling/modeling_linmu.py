"""LinMU: Qwen2.5-VL's vision side and one decoder in which every layer names its mixer."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLAttention,
    Qwen2_5_VLRMSNorm,
    Qwen2_5_VLRotaryEmbedding,
    Qwen2MLP,
)

from .cache import MMateCacheLayer
from .configuration_linmu import LinMUConfig, LinMUTextConfig
from .flex_ma import FlexMA, ScanDirection, ZeroLinear
from .generation import VisionLayoutGeneration, next_positions, remember_positions
from .m_mate import MMate
from .token_layout import TokenLayout
from .vision_qwen2_5_vl import Qwen2_5_VLVision, merged_grid_layout


@dataclass
class LinMUModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.Tensor` of shape `[b, t, d]`): Hidden states after the final norm.
        past_key_values (`Cache`, *optional*): With `use_cache`.
        hidden_states (`tuple[torch.Tensor]`, *optional*): With `output_hidden_states`: input of every layer, and the
            last hidden state.
        mixer_inputs, mixer_outputs (`tuple[torch.Tensor]`, *optional*): With `output_mixer_states`: for every layer
            the normed input and the output of its mixer, `[b, t, d]`, as Eq. 6 compares them.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    mixer_inputs: tuple[torch.Tensor, ...] | None = None
    mixer_outputs: tuple[torch.Tensor, ...] | None = None


@dataclass
class LinMUCausalLMOutput(ModelOutput):
    """[`LinMUModelOutput`] with `logits` of shape `[b, t, vocab]` and, given labels, the `loss`."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    mixer_inputs: tuple[torch.Tensor, ...] | None = None
    mixer_outputs: tuple[torch.Tensor, ...] | None = None


class LinMUDecoderLayer(GradientCheckpointingLayer):
    """Norm, mixer, residual; norm, MLP, residual."""

    def __init__(self, config: LinMUTextConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.is_m_mate = config.layer_types[layer_idx] == "m_mate"
        self.mixer = (MMate if self.is_m_mate else Qwen2_5_VLAttention)(config, layer_idx)
        self.mlp = Qwen2MLP(config)
        self.input_layernorm = Qwen2_5_VLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen2_5_VLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def mix(self, mixer_input, rope, layout=None, causal_mask=None, past_key_values=None):
        """The mixer's output `[b, t, d]` for a normed input."""
        if self.is_m_mate:
            cache_layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
            return self.mixer(mixer_input, rope, layout, cache_layer)
        return self.mixer(
            mixer_input, attention_mask=causal_mask, position_embeddings=rope, past_key_values=past_key_values
        )[0]

    def forward(self, hidden_states, rope, layout=None, causal_mask=None, past_key_values=None):
        mixer_input = self.input_layernorm(hidden_states)
        mixer_output = self.mix(mixer_input, rope, layout, causal_mask, past_key_values)
        hidden_states = hidden_states + mixer_output
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states, mixer_input, mixer_output


class LinMUPreTrainedModel(PreTrainedModel):
    config: LinMUConfig
    config_class = LinMUConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["LinMUDecoderLayer", "Qwen2_5_VLVisionBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = {"A_log", "dt_bias", "D"}
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _is_stateful = True

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (ScanDirection, ZeroLinear)):
            module.reset_new_parameters()


class LinMUTextModel(LinMUPreTrainedModel):
    """The decoder. Layers see hidden states, rotary embeddings and the [`TokenLayout`]; never ids or grids."""

    config: LinMUTextConfig
    config_class = LinMUTextConfig

    def __init__(self, config: LinMUTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([LinMUDecoderLayer(config, idx) for idx in range(config.num_hidden_layers)])
        self.norm = Qwen2_5_VLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2_5_VLRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        vision_layout=None,
        use_cache=None,
        output_hidden_states=None,
        output_mixer_states=False,
        **kwargs,
    ) -> LinMUModelOutput:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `[b, t]`) or inputs_embeds (`torch.Tensor` of shape `[b, t, d]`).
            attention_mask (`torch.Tensor` of shape `[b, past + t]`, *optional*): 0 at padding.
            position_ids (`torch.LongTensor` of shape `[b, t]`, `[3, b, t]` or `[4, b, t]`, *optional*): Text
                positions, M-RoPE positions, or both with the text positions first.
            vision_layout (`torch.LongTensor` of shape `[b, t, 4]`, *optional*): See [`TokenLayout`].
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if not use_cache:
            past_key_values = None
        rope, layout, causal_mask = self._prepare(
            inputs_embeds, attention_mask, position_ids, vision_layout, past_key_values
        )

        hidden_states, all_states, inputs, outputs = inputs_embeds, [], [], []
        for layer in self.layers:
            all_states.append(hidden_states)
            hidden_states, mixer_input, mixer_output = layer(hidden_states, rope, layout, causal_mask, past_key_values)
            if output_mixer_states:
                inputs.append(mixer_input)
                outputs.append(mixer_output)
        hidden_states = self.norm(hidden_states)
        if past_key_values is not None:
            for cache_layer in past_key_values.layers:
                if isinstance(cache_layer, MMateCacheLayer):
                    cache_layer.advance(inputs_embeds.shape[1])
        return LinMUModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=(*all_states, hidden_states) if output_hidden_states else None,
            mixer_inputs=tuple(inputs) if output_mixer_states else None,
            mixer_outputs=tuple(outputs) if output_mixer_states else None,
        )

    def run_mixers(self, mixer_inputs, attention_mask=None, position_ids=None, vision_layout=None):
        """
        Feeds every M-MATE layer with a given input, as if the layers before it were perfect.

        Args:
            mixer_inputs (`tuple[torch.Tensor]`): For every layer `[b, t, d]`, for example the teacher's.

        Returns:
            `tuple[torch.Tensor | None]`: Mixer outputs `[b, t, d]`; `None` for layers with full attention.
        """
        rope, layout, _ = self._prepare(mixer_inputs[0], attention_mask, position_ids, vision_layout, None)
        return tuple(
            layer.mix(mixer_input, rope, layout) if layer.is_m_mate else None
            for layer, mixer_input in zip(self.layers, mixer_inputs, strict=True)
        )

    def _prepare(self, embeds, attention_mask, position_ids, vision_layout, past_key_values):
        """Rotary embeddings, token layout and (if a layer needs it) the causal mask: once per forward pass."""
        b, t, _ = embeds.shape
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(past, past + t, device=embeds.device).expand(b, t)
        text_positions = None
        if position_ids.ndim == 2:
            position_ids = position_ids[None].expand(3, -1, -1)
        elif position_ids.shape[0] == 4:
            text_positions, position_ids = position_ids[0], position_ids[1:]
        rope = self.rotary_emb(embeds, position_ids)

        layout = causal_mask = None
        if "full_attention" in self.config.layer_types:
            causal_mask = attention_mask
            if isinstance(attention_mask, dict):
                causal_mask = attention_mask["full_attention"]
            elif attention_mask is None or attention_mask.ndim == 2:
                causal_mask = create_causal_mask(
                    config=self.config,
                    inputs_embeds=embeds,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    position_ids=text_positions,
                )
        if "m_mate" in self.config.layer_types:
            if attention_mask is not None:
                if attention_mask.ndim != 2:
                    raise ValueError(
                        f"attention_mask of shape {tuple(attention_mask.shape)} is not [batch, tokens]; M-MATE layers "
                        "know padding only, not arbitrary attention patterns"
                    )
                attention_mask = attention_mask[:, -t:]
            layout = TokenLayout.build(self.config, b, t, embeds.device, attention_mask, vision_layout)
        return rope, layout, causal_mask


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
        **kwargs,
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
        if input_ids is not None and vision_layout is None and (position_ids is None or has_grids):
            derived, vision_layout = self._new_positions(
                input_ids, attention_mask, past_key_values,
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
            **kwargs,
        )

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
        output_hidden_states: bool | None = None,
        output_mixer_states: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
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
            output_hidden_states=output_hidden_states,
            output_mixer_states=output_mixer_states,
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
            mixer_inputs=outputs.mixer_inputs,
            mixer_outputs=outputs.mixer_outputs,
        )


__all__ = [
    "FlexMA",
    "LinMUForConditionalGeneration",
    "LinMUModel",
    "LinMUPreTrainedModel",
    "LinMUTextModel",
    "MMate",
]
