"""linmu-hf: linear-complexity vision-language models (LinMU) for Hugging Face Transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor

from .modeling.adapters import lora_targets
from .modeling.configuration_linmu import PRESETS, LinMUConfig, LinMUTextConfig
from .modeling.configuration_nvila import NVILAVisionConfig
from .modeling.modeling_linmu import LinMUForConditionalGeneration, LinMUModel, LinMUTextModel


__version__ = "0.1.0.dev0"

AutoConfig.register("linmu", LinMUConfig)
AutoConfig.register("linmu_text", LinMUTextConfig)
AutoConfig.register("nvila_vision", NVILAVisionConfig)
AutoModel.register(LinMUConfig, LinMUModel)
AutoModel.register(LinMUTextConfig, LinMUTextModel)
AutoModelForImageTextToText.register(LinMUConfig, LinMUForConditionalGeneration)
AutoProcessor.register(LinMUConfig, Qwen2_5_VLProcessor)

__all__ = [
    "PRESETS",
    "LinMUConfig",
    "LinMUForConditionalGeneration",
    "LinMUModel",
    "LinMUTextConfig",
    "LinMUTextModel",
    "NVILAVisionConfig",
    "lora_targets",
]
