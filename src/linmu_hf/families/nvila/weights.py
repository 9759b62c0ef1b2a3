"""Names of NVILA's tensors in the flat layout: SigLIP's with its inner module, as published, and without."""

from ..family import WeightMap


WEIGHTS = WeightMap(
    prefixes={
        "llm.model.": "model.language_model.",
        "llm.lm_head.": "lm_head.",
        "vision_tower.vision_model.": "model.visual.vision_tower.",
        "vision_tower.": "model.visual.vision_tower.",
        "mm_projector.": "model.visual.mm_projector.",
    },
    vision=(
        r"model\.visual\.vision_tower\.embeddings\.(patch_embedding\.(weight|bias)|position_embedding\.weight)",
        r"model\.visual\.vision_tower\.encoder\.layers\.\d+\.layer_norm[12]\.(weight|bias)",
        r"model\.visual\.vision_tower\.encoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj\.(weight|bias)",
        r"model\.visual\.vision_tower\.encoder\.layers\.\d+\.mlp\.fc[12]\.(weight|bias)",
        r"model\.visual\.vision_tower\.post_layernorm\.(weight|bias)",
        r"model\.visual\.mm_projector\.layers\.\d+\.(weight|bias)",
    ),
    dropped={
        r".*\.rotary_emb\.inv_freq": "recomputed from the configuration",
        r"vision_tower\.(vision_model\.)?embeddings\.position_ids": "recomputed from the configuration",
        r"vision_tower\.(vision_model\.)?head\..+": "pools the last layer; features are read before it",
    },
)
