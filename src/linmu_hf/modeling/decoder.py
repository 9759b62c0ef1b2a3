"""The decoder: layers that name their mixer, over hidden states, rotary embeddings and the token layout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLAttention,
    Qwen2_5_VLRMSNorm,
    Qwen2_5_VLRotaryEmbedding,
    Qwen2MLP,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import capture_outputs

from .cache import MMateCacheLayer, counting_layer, open_cache
from .compat import CACHE, takes_aliases
from .configuration_linmu import LinMUConfig, LinMUTextConfig
from .layout.near import NearStep
from .layout.packing import lengths_to_bounds
from .layout.positions import positions_within
from .layout.prompt import Prompt, text_prompt
from .layout.token_layout import TextStep, TokenLayout
from .mixers import MIXERS, AttentionMask, padding_mask, recurrent_layers
from .mixers import attention as varlen
from .mixers.flex_ma import FP32_PARAMETERS
from .mixers.projection import Rope
from .remote_code import InstalledCode


@dataclass
class LinMUModelOutput(BaseModelOutputWithPast):
    """
    The output of [`LinMUModel`] and [`LinMUTextModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `[b, t, d]`): Hidden states after the final norm.
        cache (`Cache`, *optional*): With `use_cache`; `past_key_values` before Transformers 5.24.
        hidden_states (`tuple[torch.Tensor]`, *optional*): With `output_hidden_states`: input of every layer, and the
            last hidden state.
        attentions (`tuple[torch.Tensor]`, *optional*): With `output_attentions` and eager attention: the weights
            `[b, h, t, t]` of each layer with full attention. M-MATE layers have none.
        mixer_inputs, mixer_outputs (`tuple[torch.Tensor]`, *optional*): With `output_mixer_states`: for every layer
            the normed input and the output of its mixer, `[b, t, d]`, as Eq. 6 compares them.
    """

    mixer_inputs: tuple[torch.Tensor, ...] | None = None
    mixer_outputs: tuple[torch.Tensor, ...] | None = None


@dataclass
class LinMUCausalLMOutput(CausalLMOutputWithPast):
    """[`LinMUModelOutput`] with `logits` of shape `[b, t, vocab]` and, given labels, the `loss`."""

    mixer_inputs: tuple[torch.Tensor, ...] | None = None
    mixer_outputs: tuple[torch.Tensor, ...] | None = None


class LinMUDecoderLayer(GradientCheckpointingLayer):
    """Norm, mixer, residual; norm, MLP, residual."""

    def __init__(self, config: LinMUTextConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        mixer = MIXERS[config.layer_types[layer_idx]]
        self.recurrent, self.mixer = mixer.recurrent, mixer.module(config, layer_idx)
        self.mlp = Qwen2MLP(config)
        self.input_layernorm = Qwen2_5_VLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen2_5_VLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def mix(
        self, mixer_input: torch.Tensor, rope: Rope, layout: TextStep | TokenLayout | None = None,
        attention: dict[str, Any] | None = None, past_key_values: Cache | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """
        Returns the mixer's output `[b, t, d]` for a normed input. Recurrent mixers read the `layout`, full attention
        takes the mask and the bounds of packed sequences in `attention` as keyword arguments.
        """
        if self.recurrent:
            cache_layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
            return self.mixer(mixer_input, rope, layout, cache_layer)
        assert attention is not None
        return self.mixer(mixer_input, position_embeddings=rope, **{CACHE: past_key_values}, **attention)[0]

    def after_mixer(self, hidden_states: torch.Tensor, mixer_output: torch.Tensor) -> torch.Tensor:
        """Returns the layer's output `[b, t, d]`: both residual sums and the MLP."""
        hidden_states = hidden_states + mixer_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def forward(
        self, hidden_states: torch.Tensor, rope: Rope | None = None, layout: TextStep | TokenLayout | None = None,
        attention: dict[str, Any] | None = None, past_key_values: Cache | None = None,
        run: Callable[..., Any] | None = None,
    ) -> Any:  # fmt: skip
        """
        Returns the layer's output, its mixer's input and its mixer's output, each `[b, t, d]`.

        Args:
            run (`Callable`, *optional*): Is called with the layer and `hidden_states` instead, for its result. Inside
                `__call__` the hooks of FSDP, DeepSpeed and accelerate have loaded this layer's parameters.
        """
        if run is not None:
            return run(self, hidden_states)
        assert rope is not None
        mixer_input = self.input_layernorm(hidden_states)
        mixer_output = self.mix(mixer_input, rope, layout, attention, past_key_values)
        return self.after_mixer(hidden_states, mixer_output), mixer_input, mixer_output


Model = TypeVar("Model", bound="LinMUPreTrainedModel")


class LinMUPreTrainedModel(InstalledCode, PreTrainedModel):
    config: LinMUConfig
    config_class = LinMUConfig
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["LinMUDecoderLayer"]  # Transformers adds those of the vision tower
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keep_in_fp32_modules_strict = set(FP32_PARAMETERS)
    # float32 in a float16 model, and never quantised: small maps that steer decays and gates
    _keep_in_fp32_modules = {".*dt_proj", ".*flex_ma.gate_proj", ".*fusion_proj"}
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _is_stateful = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_tags = ["linmu"]  # on the model's page after push_to_hub

    @classmethod
    def from_pretrained(cls: type[Model], *args: Any, use_safetensors: bool | None = True, **kwargs: Any) -> Model:
        """Loads as Transformers does, but reads pickled weights only where `use_safetensors=False` asks for them."""
        return super().from_pretrained(*args, use_safetensors=use_safetensors, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "reset_new_parameters"):
            module.reset_new_parameters()


class LinMUTextModel(LinMUPreTrainedModel):
    """The decoder. Layers see hidden states, rotary embeddings and the [`TokenLayout`]; never ids or grids."""

    config: LinMUTextConfig
    config_class = LinMUTextConfig
    input_modalities = ("text",)
    _can_record_outputs = {"hidden_states": LinMUDecoderLayer, "attentions": Qwen2_5_VLAttention}

    def __init__(self, config: LinMUTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([LinMUDecoderLayer(config, idx) for idx in range(config.num_hidden_layers)])
        self.norm = Qwen2_5_VLRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen2_5_VLRotaryEmbedding(config=config)
        if "mrope_section" not in config.rope_parameters:
            self.rotary_emb.mrope_section = [config.head_dim // 2]  # plain positions: the first row serves all
        self.gradient_checkpointing = False
        self.post_init()

    @takes_aliases
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: AttentionMask = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_layout: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_mixer_states: bool = False,
        cu_seq_lens_q: torch.Tensor | None = None,
        prompt: Prompt | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LinMUModelOutput:
        """
        Runs the decoder on ids or embeddings.

        Args:
            input_ids (`torch.LongTensor` of shape `[b, t]`) or inputs_embeds (`torch.Tensor` of shape `[b, t, d]`).
            attention_mask (`torch.Tensor` of shape `[b, past + t]`, *optional*): 0 at padding.
            position_ids (`torch.LongTensor` of shape `[b, t]`, `[3, b, t]` or `[4, b, t]`, *optional*): Text
                positions, M-RoPE positions, or both with the text positions first.
            vision_layout (`torch.LongTensor` of shape `[b, t, 4]`, *optional*): See [`TokenLayout`].
            cu_seq_lens_q (`torch.IntTensor` of shape `[m + 1]`, *optional*): Where the sequences of a packed batch of
                one row begin, and the end. Text positions that begin anew say the same.
            prompt (`Prompt`, *optional*): All of this but the embeddings, as [`LinMUModel`] has read it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if prompt is None:
            prompt = text_prompt(
                self, inputs_embeds, attention_mask, position_ids, past_key_values, vision_layout, use_cache,
                cu_seq_lens_q,
            )  # fmt: skip
        cache = prompt.cache
        rope, layout, attention = self.prepare(
            inputs_embeds, prompt.mask, prompt.positions, prompt.vision_layout, cache, prompt.lengths
        )

        hidden_states, inputs, outputs = inputs_embeds, [], []
        for layer in self.layers:
            hidden_states, mixer_input, mixer_output = layer(hidden_states, rope, layout, attention, cache)
            if output_mixer_states:
                inputs.append(mixer_input)
                outputs.append(mixer_output)
        hidden_states = self.norm(hidden_states)
        if cache is not None:
            for cache_layer in cache.layers:
                if isinstance(cache_layer, MMateCacheLayer):
                    cache_layer.advance(inputs_embeds.shape[1])
            if layout is not None and layout.near is not None:
                counting_layer(cache).count(layout.near.counts)
        return LinMUModelOutput(
            last_hidden_state=hidden_states,
            mixer_inputs=tuple(inputs) if output_mixer_states else None,
            mixer_outputs=tuple(outputs) if output_mixer_states else None,
            **{CACHE: cache},
        )

    def open_cache(
        self, cache: Cache | None, use_cache: bool | None = None, lengths: list[int] | None = None
    ) -> Cache | None:
        """Returns the cache to read and write, which packed sequences of these `lengths` have none of."""
        checkpoints = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        return open_cache(cache, self.config, use_cache if lengths is None else False, checkpoints)

    def run_mixers(
        self, mixer_inputs: Sequence[torch.Tensor], position_ids: torch.Tensor, attention_mask: AttentionMask = None,
        vision_layout: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
        """
        Feeds every M-MATE layer with a given input, as if the layers before it were perfect.

        Args:
            mixer_inputs (`tuple[torch.Tensor]`): For every layer `[b, t, d]`, for example the teacher's.
            position_ids, attention_mask, vision_layout: As in `forward`.

        Returns:
            `tuple[torch.Tensor | None]`: Mixer outputs `[b, t, d]`; `None` for layers with full attention.
        """
        rope, layout, _ = self.prepare(mixer_inputs[0], attention_mask, position_ids, vision_layout)
        return tuple(
            layer.mix(mixer_input, rope, layout) if layer.recurrent else None
            for layer, mixer_input in zip(self.layers, mixer_inputs, strict=True)
        )

    def rope(self, embeds: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cos and sin, `[b, t, p]` each, at positions `[b, t]`, `[3, b, t]` or `[4, b, t]`."""
        if position_ids.ndim == 2:
            position_ids = position_ids[None].expand(3, -1, -1)
        return self.rotary_emb(embeds, position_ids[-3:])

    def prepare(
        self, embeds: torch.Tensor, attention_mask: AttentionMask, position_ids: torch.Tensor,
        vision_layout: torch.Tensor | None, past_key_values: Cache | None = None, packed: list[int] | None = None,
        layer_types: Sequence[str] | None = None,
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], TextStep | TokenLayout | None, dict[str, Any] | None]:  # fmt: skip
        """
        Returns rotary embeddings, and what M-MATE layers and those with full attention need: once per forward pass.

        Args:
            layer_types (`Sequence[str]`, *optional*): The mixers that will run, by default the model's own.
        """
        b, t, _ = embeds.shape
        # a device_map may put the embeddings elsewhere than the ids
        attention_mask, position_ids, vision_layout = (
            value.to(embeds.device) if isinstance(value, torch.Tensor) else value
            for value in (attention_mask, position_ids, vision_layout)
        )
        text_positions = None if packed is None else positions_within(packed, embeds.device)
        if position_ids.ndim == 3 and position_ids.shape[0] == 4:
            text_positions = position_ids[0]
        rope = self.rope(embeds, position_ids)

        layout: TextStep | TokenLayout | None = None
        attention, layer_types = None, layer_types or self.config.layer_types or []
        if "full_attention" in layer_types:
            causal = attention_mask["full_attention"] if isinstance(attention_mask, dict) else attention_mask
            attention = attention_arguments(self.config, embeds, causal, text_positions, past_key_values, packed)
        if recurrent_layers(layer_types):
            mask = padding_mask(attention_mask)
            if mask is not None:
                if mask.ndim != 2:
                    raise ValueError(
                        f"attention_mask of shape {tuple(mask.shape)} is not [batch, tokens]; M-MATE layers know "
                        "padding only, not arbitrary attention patterns"
                    )
                mask = mask[:, -t:].to(embeds.device)
            past = None if past_key_values is None else counting_layer(past_key_values).counts
            if t == 1 and vision_layout is None and past_key_values is not None:
                mask = None if mask is None else mask[:, 0]
                near = NearStep.build(self.config, b, embeds.device, past, mask) if self.config.text_window else None
                layout = TextStep(mask, near)
            else:
                layout = TokenLayout.build(self.config, b, t, embeds.device, mask, vision_layout, packed, past)
        return rope, layout, attention


def attention_arguments(
    config: LinMUTextConfig, embeds: torch.Tensor, causal_mask: torch.Tensor | None,
    text_positions: torch.Tensor | None, past_key_values: Cache | None = None, packed: list[int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """
    Returns the keyword arguments of full attention: its mask, and where the sequences of a packed row begin.

    Args:
        config (`LinMUTextConfig`): Of the attention.
        embeds (`torch.Tensor` of shape `[b, t, d]`), causal_mask, text_positions, past_key_values: As in a forward
            pass.
        packed (`list[int]`, *optional*): Lengths of the sequences of a packed row.
    """
    bounds = {}
    if packed is not None:  # this tells kernels that take no mask what belongs together
        at, longest = lengths_to_bounds(packed, embeds.device).int(), max(packed)
        bounds = {"cu_seq_lens_q": at, "cu_seq_lens_k": at, "max_length_q": longest, "max_length_k": longest}
        if config._attn_implementation in (varlen.NAME, varlen.BY_SEQUENCE):
            return {"attention_mask": None, **bounds}
    if causal_mask is None or causal_mask.ndim == 2:
        causal_mask = create_causal_mask(
            config=config,
            inputs_embeds=embeds,
            attention_mask=causal_mask,
            position_ids=text_positions,
            layer_idx=None if past_key_values is None else config.layer_types.index("full_attention"),
            **{CACHE: past_key_values},
        )
    return {"attention_mask": causal_mask, **bounds}
