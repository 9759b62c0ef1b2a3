"""Qwen2.5-VL."""

from transformers import AutoProcessor, Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor

from ...modeling.configuration_linmu import LinMUConfig
from ..family import Family, Preset
from .checkpoint import open_qwen2_5_vl
from .vision import Qwen2_5_VLVision
from .weights import WEIGHTS


ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
TOWER = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}


def register() -> None:
    """Registers the processor of folders that name none."""
    AutoProcessor.register(LinMUConfig, Qwen2_5_VLProcessor)


QWEN2_5_VL = Family(
    name="Qwen2.5-VL",
    vision_type="qwen2_5_vl_vision",
    vision=Qwen2_5_VLVision,
    weights=WEIGHTS,
    reads=lambda raw_config: raw_config.get("model_type") == Qwen2_5_VLConfig.model_type,
    open=open_qwen2_5_vl,
    register=register,
    presets={
        "qwen2.5-vl-7b": Preset({"rope_parameters": ROPE}, TOWER),
        "qwen2.5-vl-72b": Preset(
            {
                "rope_parameters": ROPE,
                "hidden_size": 8192,
                "intermediate_size": 29568,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
            },
            TOWER | {"intermediate_size": 3456},
        ),
    },
)
