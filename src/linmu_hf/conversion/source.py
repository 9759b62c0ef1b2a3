"""A teacher's folder: found or downloaded, its configuration read, its weights located. Nothing is loaded."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoProcessor, GenerationConfig, PreTrainedConfig, ProcessorMixin, Qwen2_5_VLConfig
from transformers.utils import is_torchvision_available

from ..families.nvila.checkpoint import DOWNLOADS as NVILA_DOWNLOADS
from ..families.nvila.checkpoint import TOKENIZER_FILES, check_top, in_parts, is_nvila, read_nvila
from ..modeling.configuration_linmu import LinMUConfig
from ..safetensors_io import StoredTensor, read_checkpoint, read_config


# Families that Transformers knows, by `model_type`; NVILA is told by the keys of its config.json.
TEACHER_CONFIGS: dict[str, type[PreTrainedConfig]] = {"qwen2_5_vl": Qwen2_5_VLConfig}

# What stands beside the weights and belongs to the student as it is.
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
class Source:
    """
    A checkpoint on disk.

    Args:
        folder (`Path`): Where it is.
        raw_config (`dict`): Its `config.json`.
        tensors (`dict[str, StoredTensor]`): Where its tensors lie.
        config (`PreTrainedConfig`, *optional*): The teacher's configuration; none for a LinMU model.
        built_processor (`ProcessorMixin`, *optional*): The processor of a checkpoint that holds none in the form
            that `AutoProcessor` loads.
        generation_config (`GenerationConfig`, *optional*): How to generate, if the checkpoint says so.
    """

    folder: Path
    raw_config: dict
    tensors: dict[str, StoredTensor]
    config: PreTrainedConfig | None = None
    built_processor: ProcessorMixin | None = None
    generation_config: GenerationConfig | None = None

    @property
    def is_linmu(self) -> bool:
        return self.config is None

    def load_processor(self) -> ProcessorMixin:
        return self.built_processor or read_processor(self.folder)

    def write_processor(self, folder: Path) -> None:
        """Writes all that stands beside the weights into a folder."""
        if self.built_processor is None:
            for name in PROCESSOR_FILES:
                if (self.folder / name).is_file():
                    shutil.copyfile(self.folder / name, folder / name)
            return
        self.built_processor.save_pretrained(folder)
        assert self.generation_config is not None
        self.generation_config.save_pretrained(folder)


def read_processor(path: str | Path) -> ProcessorMixin:
    """
    `AutoProcessor.from_pretrained`; an `ImportError` names the extra without which Transformers builds no Qwen2.5-VL
    processor.
    """
    try:
        return AutoProcessor.from_pretrained(path)
    except ImportError as error:
        if is_torchvision_available():
            raise
        raise ImportError(f'the processor of {path} needs torchvision: pip install "linmu-hf[video]"') from error


def open_source(path: str | Path, revision: str | None = None, allow_linmu: bool = False) -> Source:
    """
    Finds a teacher and checks all of it that can be checked without reading weights.

    Args:
        path (`str` or `Path`): A folder, or a model on the Hub, which is downloaded.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        allow_linmu (`bool`, *optional*, defaults to `False`): Whether a LinMU model is welcome too.

    Raises:
        `FileNotFoundError`: No such folder or model, or something is missing in it.
        `ValueError`: Not a supported vision-language model, or corrupt weights.
    """
    raw_config = read_raw_config(path, revision)
    _check_model_type(raw_config, path, allow_linmu)
    local = Path(path).expanduser()
    patterns = NVILA_DOWNLOADS if in_parts(raw_config) else DOWNLOADS
    folder = local if local.is_dir() else _download(path, revision, patterns)
    if raw_config["model_type"] == LinMUConfig.model_type:
        return Source(folder, raw_config, read_checkpoint(folder))
    if is_nvila(raw_config):
        found = read_nvila(folder, raw_config)
        return Source(folder, raw_config, found.tensors, found.config, found.processor, found.generation_config)
    config = TEACHER_CONFIGS[raw_config["model_type"]].from_pretrained(folder)
    generates = (folder / "generation_config.json").is_file()
    generation_config = GenerationConfig.from_pretrained(folder) if generates else None
    return Source(folder, raw_config, read_checkpoint(folder), config, generation_config=generation_config)


def _download(path: str | Path, revision: str | None, patterns: Sequence[str] | None = None) -> Path:
    """The snapshot with the files that match, or without patterns the `config.json` alone."""
    try:
        if patterns is None:
            return Path(hf_hub_download(str(path), "config.json", revision=revision))
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise FileNotFoundError(f"there is no folder {path}") from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"there is no folder {path}, and no model of that name could be downloaded") from error
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"there is no folder {path}, and no such model on the Hub (revision {revision or 'main'}): {reason}"
        ) from error


def read_raw_config(path: str | Path, revision: str | None = None) -> dict:
    """The `config.json` of a folder or a model on the Hub; arguments and errors as in [`open_source`]."""
    local = Path(path).expanduser()
    if local.exists() and not local.is_dir():
        raise ValueError(f"{path} is a file: give the folder that holds config.json and the weights")
    file = local / "config.json" if local.is_dir() else _download(path, revision)
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no config.json: give the folder of a model saved with save_pretrained")
    config = read_config(file)
    if "model_type" not in config:
        raise ValueError(f"{file} names no model_type: give the folder of a Transformers model")
    return config


def _check_model_type(config: dict, path: str | Path, allow_linmu: bool) -> None:
    model_type = config["model_type"]
    if model_type == LinMUConfig.model_type:
        if not allow_linmu:
            raise ValueError(f"{path} already is a LinMU model: give the teacher it was made from")
    elif model_type not in TEACHER_CONFIGS and not is_nvila(config):
        is_vision_model = any(key in config for key in ("vision_config", "vision_tower_cfg", "mm_vision_tower"))
        kind = "an unsupported vision-language model" if is_vision_model else "not a vision-language model"
        supported = [*sorted(TEACHER_CONFIGS), "NVILA's"]
        raise ValueError(f"{path} is {kind} (model_type={model_type!r}): supported teachers are {supported}")
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method")
        raise ValueError(f"{path} is quantized ({method}): give the checkpoint it was quantized from")
    if is_nvila(config):
        try:
            check_top(config)  # before anything large is downloaded
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
