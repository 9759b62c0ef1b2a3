"""A teacher's folder: found or downloaded, its configuration read, its weights located. Nothing is loaded."""

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedConfig, Qwen2_5_VLConfig

from ..modeling.configuration_linmu import LinMUConfig
from .checkpoint import StoredTensor, read_checkpoint


# Teacher families by `model_type`.
TEACHER_CONFIGS: dict[str, type[PreTrainedConfig]] = {"qwen2_5_vl": Qwen2_5_VLConfig}

# What stands beside the weights and belongs to the student as it is.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
)
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk: `folder`, the `config.json` in it, and where its tensors lie."""

    folder: Path
    raw_config: dict
    tensors: dict[str, StoredTensor]

    @property
    def is_linmu(self) -> bool:
        return self.raw_config.get("model_type") == LinMUConfig.model_type

    @property
    def config(self) -> PreTrainedConfig:
        """The teacher's configuration."""
        return TEACHER_CONFIGS[self.raw_config["model_type"]].from_pretrained(self.folder)


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
    local = Path(path).expanduser()
    if local.is_dir():
        raw_config = _read_config(local / "config.json", path)
    elif local.exists():
        raise ValueError(f"{path} is a file: give the folder that holds config.json and the weights")
    else:
        raw_config = _read_config(_download(path, revision, only_config=True), path)
    _check_model_type(raw_config, path, allow_linmu)
    folder = local if local.is_dir() else _download(path, revision)
    return Source(folder, raw_config, read_checkpoint(folder))


def _download(path: str | Path, revision: str | None, only_config: bool = False) -> Path:
    try:
        if only_config:
            return Path(hf_hub_download(str(path), "config.json", revision=revision))
        patterns = ["config.json", *PROCESSOR_FILES, *WEIGHT_PATTERNS]
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise FileNotFoundError(f"there is no folder {path}") from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(f"there is no folder {path}, and no model of that name could be downloaded") from error
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"there is no folder {path}, and no such model on the Hub (revision {revision or 'main'}): {reason}"
        ) from error


def _read_config(file: Path, path: str | Path) -> dict:
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no config.json: give the folder of a model saved with save_pretrained")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no valid JSON ({error}): download or copy it again") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{file} names no model_type: give the folder of a Transformers model")
    return config


def _check_model_type(config: dict, path: str | Path, allow_linmu: bool) -> None:
    model_type, supported = config["model_type"], sorted(TEACHER_CONFIGS)
    if model_type == LinMUConfig.model_type:
        if not allow_linmu:
            raise ValueError(f"{path} already is a LinMU model: give the teacher it was made from")
    elif model_type not in TEACHER_CONFIGS:
        is_vision_model = any(key in config for key in ("vision_config", "vision_tower_cfg", "mm_vision_tower"))
        kind = "an unsupported vision-language model" if is_vision_model else "not a vision-language model"
        raise ValueError(f"{path} is {kind} (model_type={model_type!r}): supported teachers are {supported}")
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method")
        raise ValueError(f"{path} is quantized ({method}): give the checkpoint it was quantized from")
