"""Teacher tensor names to student tensor names: a table, and the one function that reads it.

The table holds Eq. 4 (Flex-MA: C <- Q, B <- K, X <- V, O <- O) and Eq. 5 (Local-Swin: the teacher's own projections),
so one teacher tensor becomes several student tensors in an `m_mate` layer. Biases go where their weights go.
"""

import re

from ..modeling.configuration_linmu import LinMUConfig, LinMUTextConfig


# Hub names and Transformers' in-memory names, onto the student's; the first matching prefix counts.
PREFIXES = {
    "model.visual.": "model.visual.",
    "visual.": "model.visual.",
    "model.language_model.": "model.language_model.",
    "model.": "model.language_model.",
    "lm_head.": "lm_head.",
}

# What the student's decoder keeps under the teacher's name, besides the attention.
KEPT = (
    r"model\.visual\..+",
    r"model\.language_model\.(embed_tokens|norm)\.weight",
    r"model\.language_model\.layers\.\d+\.(input_layernorm|post_attention_layernorm)\.weight",
    r"model\.language_model\.layers\.\d+\.mlp\.(gate_proj|up_proj|down_proj)\.weight",
    r"lm_head\.weight",
)

# The teacher's self-attention projections, onto the projections of each mixer.
MIXERS: dict[str, dict[str, tuple[str, ...]]] = {
    "full_attention": {
        "q_proj": ("q_proj",),
        "k_proj": ("k_proj",),
        "v_proj": ("v_proj",),
        "o_proj": ("o_proj",),
    },
    "m_mate": {
        "q_proj": ("flex_ma.forward_scan.c_proj", "flex_ma.reverse_scan.c_proj", "local_swin.q_proj"),
        "k_proj": ("flex_ma.forward_scan.b_proj", "flex_ma.reverse_scan.b_proj", "local_swin.k_proj"),
        "v_proj": ("flex_ma.x_proj", "local_swin.v_proj"),
        "o_proj": ("flex_ma.o_proj", "local_swin.o_proj"),
    },
}

# Teacher tensors that the student does without, and why.
DROPPED = {
    r".*\.rotary_(pos_)?emb\.inv_freq": "recomputed from the configuration",
}

_PROJECTION = re.compile(r"(model\.language_model\.layers\.(\d+)\.)self_attn\.([qkvo]_proj)\.(weight|bias)")
_MIXER_PARAMETER = re.compile(r"model\.language_model\.layers\.(\d+)\.mixer\.(.+)\.(?:weight|bias)")


def map_teacher_key(key: str, config: LinMUConfig) -> list[str] | None:
    """
    The student tensors that are copies of a teacher tensor.

    Args:
        key (`str`): A name in the teacher's checkpoint, as on the Hub or as in memory.
        config (`LinMUConfig`): The student, whose `layer_types` decide where attention weights go.

    Returns:
        `list[str]` or `None`: Student names, or `None` for a tensor that is dropped by name.

    Raises:
        `ValueError`: The table does not know the key.
    """
    if any(re.fullmatch(pattern, key) for pattern in DROPPED):
        return None
    prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), None)
    name = PREFIXES[prefix] + key.removeprefix(prefix) if prefix else key
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return None
    if projection := _PROJECTION.fullmatch(name):
        layer_prefix, layer, projection_name, kind = projection.groups()
        layer_types = decoder_config(config).layer_types or []
        if int(layer) < len(layer_types):
            targets = MIXERS[layer_types[int(layer)]][projection_name]
            return [f"{layer_prefix}mixer.{target}.{kind}" for target in targets]
    if any(re.fullmatch(pattern, name) for pattern in KEPT):
        return [name]
    raise ValueError(f"teacher tensor {key!r} is unknown to the weight map: is the checkpoint a plain Qwen2.5-VL?")


def is_new(name: str, config: LinMUConfig) -> bool:
    """Whether a student tensor has no counterpart in the teacher, so that its mixer initialises it."""
    if ".mixer." not in name:
        return False
    parameter = _MIXER_PARAMETER.fullmatch(name)
    if parameter is None:
        return True
    layer, stem = parameter.groups()
    layer_types = decoder_config(config).layer_types or []
    return all(stem not in targets for targets in MIXERS[layer_types[int(layer)]].values())


def decoder_config(config: LinMUConfig) -> LinMUTextConfig:
    assert isinstance(config.text_config, LinMUTextConfig)
    return config.text_config
