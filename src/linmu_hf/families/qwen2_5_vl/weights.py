"""Names of Qwen2.5-VL's tensors: on the Hub, and in memory in Transformers."""

from ..family import WeightMap


WEIGHTS = WeightMap(
    prefixes={
        "model.visual.": "model.visual.",
        "visual.": "model.visual.",
        "model.language_model.": "model.language_model.",
        "model.": "model.language_model.",
        "lm_head.": "lm_head.",
    },
    vision=(r"model\.visual\..+",),
    dropped={r".*\.rotary_(pos_)?emb\.inv_freq": "recomputed from the configuration"},
)
