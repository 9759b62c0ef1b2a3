"""The teachers that LinMU knows: one folder each, of the same files, and one entry here."""

from ..modeling.vision_side import VISION_SIDES
from .nvila.vision import NVILAVision
from .qwen2_5_vl.vision import Qwen2_5_VLVision


VISION_SIDES |= {"qwen2_5_vl_vision": Qwen2_5_VLVision, "nvila_vision": NVILAVision}
