"""What the rest of the package knows of the mixers: a further one is a file beside these and one `register_mixer`."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import nn
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention

from ..cache import MMateCacheLayer
from ..configuration_linmu import LAYER_TYPES, LinMUTextConfig
from .m_mate import MMate


@dataclass(frozen=True)
class Mixer:
    """
    The contract of a mixer.

    Args:
        module (`type[nn.Module]`): Built from the configuration and the layer's index. A recurrent one is called with
            the normed input, rotary tables, [`TokenLayout`] or [`TextStep`], and cache layer, and sets its new
            parameters in `reset_new_parameters`; another is called as Transformers calls attention.
        from_teacher (`dict[str, tuple[str, ...]]`): The teacher's self-attention projections, onto the module's own.
        recurrent (`bool`): Whether its cache is a state of one size ([`MMateCacheLayer`]) instead of keys and values.
        state_shapes (`Callable`): Shapes by name of what the cache holds per sequence, or per token of it, from a
            configuration.
        flops_per_token (`Callable`): Multiplications and additions of a decode step at a context length.
    """

    module: type[nn.Module]
    from_teacher: dict[str, tuple[str, ...]]
    recurrent: bool
    state_shapes: Callable
    flops_per_token: Callable


MIXERS: dict[str, Mixer] = {}

# One for all layers, or one for each layer type.
AttentionMask: TypeAlias = torch.Tensor | dict[str, torch.Tensor | None] | None


def register_mixer(layer_type: str, mixer: Mixer) -> None:
    """Lets `layer_types` of a configuration name the mixer, and Transformers' caches hold its state."""
    MIXERS[layer_type] = mixer
    LAYER_TYPES.append(layer_type)
    if mixer.recurrent:
        DYNAMIC_LAYER_TYPE_MAPPING[layer_type] = STATIC_LAYER_TYPE_MAPPING[layer_type] = MMateCacheLayer


def recurrent_layers(layer_types: Iterable[str]) -> list[int]:
    """Returns the indices of the layers with a recurrent mixer: all but those that keep the teacher's attention."""
    return [index for index, layer_type in enumerate(layer_types) if MIXERS[layer_type].recurrent]


def state_bytes(config: LinMUTextConfig, itemsize: int = 2) -> int:
    """
    Returns the bytes that recurrent layers keep of a sequence, however long it is: their states and steps of time in
    float32, the rest in the model's type of `itemsize` bytes.
    """
    shapes = [
        MIXERS[config.layer_types[index]].state_shapes(config) for index in recurrent_layers(config.layer_types or ())
    ]
    kept = ((name, math.prod(shape)) for layer in shapes for name, shape in layer.items())
    return sum(count * (4 if name in ("state", "dt") else itemsize) for name, count in kept)


def padding_mask(attention_mask: AttentionMask) -> torch.Tensor | None:
    """Returns the mask that recurrent layers read, out of one mask for all or one for each layer type."""
    if isinstance(attention_mask, dict):
        return next((mask for layer_type, mask in attention_mask.items() if MIXERS[layer_type].recurrent), None)
    return attention_mask


def _attention_flops(config: LinMUTextConfig, past: int) -> int:
    h, g, p, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
    return 4 * d * (h + g) * p + 4 * h * p * past


register_mixer(
    "m_mate",
    Mixer(
        module=MMate,
        from_teacher={
            "q_proj": ("flex_ma.forward_scan.c_proj", "flex_ma.reverse_scan.c_proj", "local_swin.q_proj"),
            "k_proj": ("flex_ma.forward_scan.b_proj", "flex_ma.reverse_scan.b_proj", "local_swin.k_proj"),
            "v_proj": ("flex_ma.x_proj", "local_swin.v_proj"),
            "o_proj": ("flex_ma.o_proj", "local_swin.o_proj"),
        },
        recurrent=True,
        state_shapes=MMate.state_shapes,
        flops_per_token=MMate.flops_per_token,
    ),
)
register_mixer(
    "full_attention",
    Mixer(
        module=Qwen2_5_VLAttention,
        from_teacher={name: (name,) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
        recurrent=False,
        state_shapes=lambda config: dict.fromkeys(("keys", "values"), (config.num_key_value_heads, config.head_dim)),
        flops_per_token=_attention_flops,
    ),
)

# Small changes of a decay, a step size or a gate move every later output.
STEERING = r"\.mixer\..*\b(A_log|dt_bias|dt_proj|gate_proj|(text_)?fusion_proj)\b"
_NO_DECAY = r"(norm\d?\.|\.bias$|\.D$|conv_weight$|_features$)"


def decays(name: str) -> bool:
    """Returns whether a parameter is one for weight decay: a matrix of the model, and no small map that steers it."""
    return re.search(f"{STEERING}|{_NO_DECAY}", name) is None
