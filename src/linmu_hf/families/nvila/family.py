"""NVILA."""

from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoVideoProcessor
from transformers.utils import DummyObject

from ..family import DOWNLOADS, Family, Preset
from .checkpoint import PARTS_DOWNLOADS, check_top, in_parts, is_nvila, open_nvila
from .configuration import NVILAVisionConfig
from .image_processing import NVILAImageProcessor
from .processing import NVILAProcessor
from .video_processing import NVILAVideoProcessor
from .vision import NVILAVision
from .weights import WEIGHTS


SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
}
TEXT = {"vocab_size": 151648, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
S2 = {"image_aspect_ratio": "dynamic_s2", "s2_scales": [448, 896, 1344], "tower_config": SO400M}
POOLED = {"image_aspect_ratio": "resize", "video_encoder": "tsp", "pool_sizes": [[8, 1, 1]], "tower_config": SO400M}


def register() -> None:
    """Registers NVILA's classes, except with those Auto classes that are mere dummies without torchvision."""
    AutoConfig.register(NVILAVisionConfig.model_type, NVILAVisionConfig)
    AutoProcessor.register(NVILAVisionConfig, NVILAProcessor)
    if not isinstance(AutoImageProcessor, DummyObject):
        AutoImageProcessor.register(NVILAVisionConfig, image_processor_classes={"pil": NVILAImageProcessor})
    if not isinstance(AutoVideoProcessor, DummyObject):
        AutoVideoProcessor.register(NVILAVisionConfig, NVILAVideoProcessor)


NVILA = Family(
    name="NVILA",
    vision_type=NVILAVisionConfig.model_type,
    vision=NVILAVision,
    weights=WEIGHTS,
    reads=is_nvila,
    open=open_nvila,
    check=check_top,
    downloads=lambda raw_config: PARTS_DOWNLOADS if in_parts(raw_config) else DOWNLOADS,
    register=register,
    in_transformers=False,
    separators=True,
    license_note="NVILA's published weights are under CC BY-NC 4.0.",
    # An image of 4:3 is read in 3 x 4 blocks of 16 x 16.
    presets={"nvila-8b": Preset(TEXT, S2, "image", "48x64"), "nvila-8b-video": Preset(TEXT, POOLED)},
)
