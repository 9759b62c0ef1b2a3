"""What the rest of the package knows about a family of teachers: one value, made of the files of its folder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, ProcessorMixin

from ..modeling.vision_side import VisionSide
from ..safetensors_io import StoredTensor


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
# What is in a folder besides configuration and weights, and belongs to the student as it is.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    *TOKENIZER_FILES,
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
)
DOWNLOADS = ("config.json", *PROCESSOR_FILES, "*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class WeightMap:
    """
    A map of teacher tensor names to student tensor names.

    Args:
        prefixes (`dict[str, str]`): Beginnings of teacher names, onto the student's; the first that matches counts.
        vision (`tuple[str, ...]`): Patterns of the student's names on the vision side, which stays as it is.
        dropped (`dict[str, str]`): Patterns of teacher names that the student does without, and why.
    """

    prefixes: dict[str, str]
    vision: tuple[str, ...]
    dropped: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """
    A teacher's folder, read but for the values of its tensors.

    Args:
        config (`PreTrainedConfig`): Its configuration, in the form that [`LinMUConfig.from_teacher`] takes.
        tensors (`dict[str, StoredTensor]`): Its tensors.
        processor (`ProcessorMixin`, *optional*): Where the folder holds none in the form that `AutoProcessor` loads.
        generation_config (`GenerationConfig`, *optional*): How to generate, if the folder says so.
    """

    config: PreTrainedConfig
    tensors: dict[str, StoredTensor]
    processor: ProcessorMixin | None = None
    generation_config: GenerationConfig | None = None


@dataclass(frozen=True)
class Preset:
    """Sizes of a published model for benchmarks, over the defaults, and the medium and grid of its prompts."""

    text: dict[str, Any]
    vision: dict[str, Any] = field(default_factory=dict)
    media: str = "video"
    grid: str = "16x16"


def _accept(raw_config: Mapping[str, Any]) -> None:
    pass


@dataclass(frozen=True)
class Family:
    """
    A family of teachers.

    Args:
        name (`str`): What messages and cards call it.
        vision_type (`str`): `model_type` of its vision configuration, which tells the families of students apart.
        vision (`type[VisionSide]`): Its vision side.
        weights (`WeightMap`): The names of its tensors.
        reads (`Callable`): Whether a `config.json` is one of the family's, supported or not.
        open (`Callable`): Reads a folder, given its `config.json` too, into a [`Checkpoint`].
        check (`Callable`, *optional*): Raises a `ValueError` for what `config.json` alone tells to be unsupported.
        downloads (`Callable`, *optional*): What to download of a model with this `config.json`.
        register (`Callable`, *optional*): Enters classes of its own into Transformers' Auto classes.
        in_transformers (`bool`, *optional*, defaults to `True`): Whether Transformers loads the teachers.
        separators (`bool`, *optional*, defaults to `False`): Whether a text token follows every frame and image.
        license_note (`str`, *optional*): What a card says of the license where none was found.
        presets (`dict[str, Preset]`, *optional*): For benchmarks.
    """

    name: str
    vision_type: str
    vision: type[VisionSide]
    weights: WeightMap
    reads: Callable[[Mapping[str, Any]], bool]
    open: Callable[[Path, dict[str, Any]], Checkpoint]
    check: Callable[[dict[str, Any]], None] = _accept
    downloads: Callable[[Mapping[str, Any]], Sequence[str]] = lambda raw_config: DOWNLOADS
    register: Callable[[], None] = lambda: None
    in_transformers: bool = True
    separators: bool = False
    license_note: str = ""
    presets: dict[str, Preset] = field(default_factory=dict)
