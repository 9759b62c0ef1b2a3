"""linmu-hf: linear-complexity vision-language models (LinMU) for Hugging Face Transformers."""

from . import quiet_import  # noqa: F401  before anything imports Transformers


# isort: split
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoVideoProcessor,
)
from transformers.models.auto import modeling_auto
from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.utils import DummyObject

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
AutoConfig.register("nvila_vision", NVILAVisionConfig)
AutoModel.register(LinMUConfig, LinMUModel)
AutoModel.register(LinMUTextConfig, LinMUTextModel)
AutoModelForImageTextToText.register(LinMUConfig, LinMUForConditionalGeneration)
AutoModelForMultimodalLM.register(LinMUConfig, LinMUForConditionalGeneration)
# `transformers serve` looks the model type up in this list of names, which no registration enters.
modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["linmu"] = "LinMUForConditionalGeneration"
# A saved folder names its processor; LinMUConfig's own is that of a folder which names none.
AutoProcessor.register(LinMUConfig, Qwen2_5_VLProcessor)
AutoProcessor.register(NVILAVisionConfig, NVILAProcessor)
# Without torchvision some of Transformers' Auto classes are mere dummies; NVILAProcessor does not need them.
if not isinstance(AutoImageProcessor, DummyObject):
    AutoImageProcessor.register(NVILAVisionConfig, image_processor_classes={"pil": NVILAImageProcessor})
if not isinstance(AutoVideoProcessor, DummyObject):
    AutoVideoProcessor.register(NVILAVisionConfig, NVILAVideoProcessor)

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
