"""linmu-hf: linear-complexity vision-language models (LinMU) for Hugging Face Transformers."""

from . import quiet_import  # noqa: F401  before anything imports Transformers


# isort: split
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.models.auto import modeling_auto

from .families.nvila.configuration import NVILAVisionConfig
from .families.nvila.image_processing import NVILAImageProcessor
from .families.nvila.processing import NVILAProcessor
from .families.nvila.video_processing import NVILAVideoProcessor
from .modeling.adapters import lora_targets
from .modeling.configuration_linmu import PRESETS, LinMUConfig, LinMUTextConfig
from .modeling.modeling_linmu import LinMUForConditionalGeneration, LinMUModel, LinMUTextModel


__version__ = "0.1.0.dev0"

AutoConfig.register("linmu", LinMUConfig)
AutoConfig.register("linmu_text", LinMUTextConfig)
AutoModel.register(LinMUConfig, LinMUModel)
AutoModel.register(LinMUTextConfig, LinMUTextModel)
AutoModelForImageTextToText.register(LinMUConfig, LinMUForConditionalGeneration)
AutoModelForMultimodalLM.register(LinMUConfig, LinMUForConditionalGeneration)
# `transformers serve` looks the model type up in this list of names, which no registration enters.
modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["linmu"] = "LinMUForConditionalGeneration"

__all__ = [
    "PRESETS",
    "LinMUConfig",
    "LinMUForConditionalGeneration",
    "LinMUModel",
    "LinMUTextConfig",
    "LinMUTextModel",
    "NVILAImageProcessor",
    "NVILAProcessor",
    "NVILAVideoProcessor",
    "NVILAVisionConfig",
    "lora_targets",
]
