"""Teacher tensor names to student tensor names: what every decoder has, and the reading of each family's table.

Mixers take Eq. 4 (Flex-MA: C <- Q, B <- K, X <- V, O <- O) and Eq. 5 (Local-Swin: the teacher's own projections),
so one teacher tensor becomes several student tensors in an `m_mate` layer. Biases go where their weights go.
"""

import re

from ..families import FAMILIES, Family
from ..modeling.configuration_linmu import LinMUConfig, LinMUTextConfig
from ..modeling.mixers import MIXERS


# What every decoder keeps under the teacher's name, besides the attention.
KEPT = (
    r"model\.language_model\.(embed_tokens|norm)\.weight",
    r"model\.language_model\.layers\.\d+\.(input_layernorm|post_attention_layernorm)\.weight",
    r"model\.language_model\.layers\.\d+\.mlp\.(gate_proj|up_proj|down_proj)\.weight",
    r"lm_head\.weight",
)

_PROJECTION = re.compile(r"(model\.language_model\.layers\.(\d+)\.)self_attn\.([qkvo]_proj)\.(weight|bias)")
_MIXER_PARAMETER = re.compile(r"(model\.language_model\.layers\.(\d+)\.)mixer\.(.+)\.(weight|bias)")


def map_teacher_key(key: str, config: LinMUConfig) -> list[str] | None:
    """
    Returns the student tensors that are copies of a teacher tensor.

    Args:
        key (`str`): A name in the teacher's checkpoint, as on the Hub or as in memory.
        config (`LinMUConfig`): The student: its vision side picks the table, its `layer_types` decide where attention
            weights go.

    Returns:
        `list[str]` or `None`: Student names, or `None` for a tensor that is dropped by name.

    Raises:
        `ValueError`: The table does not know the key.
    """
    family = family_of(config)
    table = family.weights
    if any(re.fullmatch(pattern, key) for pattern in table.dropped):
        return None
    prefix = next((prefix for prefix in table.prefixes if key.startswith(prefix)), None)
    name = table.prefixes[prefix] + key.removeprefix(prefix) if prefix else key
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return None
    if projection := _PROJECTION.fullmatch(name):
        layer_prefix, layer, projection_name, kind = projection.groups()
        layer_types = decoder_config(config).layer_types or []
        if int(layer) < len(layer_types):
            targets = MIXERS[layer_types[int(layer)]].from_teacher[projection_name]
            return [f"{layer_prefix}mixer.{target}.{kind}" for target in targets]
    if prefix and any(re.fullmatch(pattern, name) for pattern in (*KEPT, *table.vision)):
        return [name]
    raise ValueError(f"teacher tensor {key!r} is unknown to the weight map: is the checkpoint a plain {family.name}?")


def is_new(name: str, config: LinMUConfig) -> bool:
    """Returns whether a student tensor has no counterpart in the teacher, so that its mixer initialises it."""
    if ".mixer." not in name:
        return False
    parameter = _MIXER_PARAMETER.fullmatch(name)
    if parameter is None:
        return True
    _, layer, stem, _ = parameter.groups()
    return all(stem not in targets for targets in _mixer(layer, config).values())


def teacher_key(name: str, config: LinMUConfig) -> str:
    """Returns the teacher tensor that a student tensor is a copy of; if the table has several names, the first."""
    if parameter := _MIXER_PARAMETER.fullmatch(name):
        layer_prefix, layer, stem, kind = parameter.groups()
        projection = next(name for name, targets in _mixer(layer, config).items() if stem in targets)
        name = f"{layer_prefix}self_attn.{projection}.{kind}"
    prefixes = family_of(config).weights.prefixes
    prefix, ours = next((prefix, ours) for prefix, ours in prefixes.items() if name.startswith(ours))
    return prefix + name.removeprefix(ours)


def _mixer(layer: str, config: LinMUConfig) -> dict[str, tuple[str, ...]]:
    layer_types = decoder_config(config).layer_types or []
    return MIXERS[layer_types[int(layer)]].from_teacher


def family_of(config: LinMUConfig) -> Family:
    """Returns the family of a student's teacher."""
    return FAMILIES[config.vision_config.model_type]  # type: ignore[union-attr]


def decoder_config(config: LinMUConfig) -> LinMUTextConfig:
    assert isinstance(config.text_config, LinMUTextConfig)
    return config.text_config
