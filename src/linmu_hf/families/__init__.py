"""The families of teachers: a folder each, of the same files, and one entry here."""

from collections.abc import Mapping
from typing import Any

from ..modeling.vision_side import VISION_SIDES
from .family import Family
from .nvila.family import NVILA
from .qwen2_5_vl.family import QWEN2_5_VL


FAMILIES: dict[str, Family] = {}  # by the model type of the vision side


def add_family(family: Family) -> None:
    """Makes a family known to the whole package, and to Transformers."""
    FAMILIES[family.vision_type] = family
    VISION_SIDES[family.vision_type] = family.vision
    family.register()


def find_family(raw_config: Mapping[str, Any]) -> Family | None:
    """Returns the family of teachers that a `config.json` belongs to."""
    return next((family for family in FAMILIES.values() if family.reads(raw_config)), None)


for _family in (QWEN2_5_VL, NVILA):
    add_family(_family)
