"""A teacher's folder: found or downloaded, its configuration read, its weights located. Nothing is loaded."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoProcessor, ProcessorMixin
from transformers.utils import is_torchvision_available

from ..data.formats import first_line
from ..families import FAMILIES, find_family
from ..families.family import DOWNLOADS, PROCESSOR_FILES, Checkpoint, Family
from ..modeling.configuration_linmu import LinMUConfig
from ..safetensors_io import StoredTensor, read_checkpoint, read_config


@dataclass(frozen=True)
class Source:
    """
    A checkpoint on disk.

    Args:
        folder (`Path`): Where it is.
        raw_config (`dict`): Its `config.json`.
        tensors (`dict[str, StoredTensor]`): Where its tensors are.
        teacher (`Checkpoint`, *optional*): What its family makes of it; nothing for a LinMU model.
    """

    folder: Path
    raw_config: dict
    tensors: dict[str, StoredTensor]
    teacher: Checkpoint | None = None

    def load_processor(self) -> ProcessorMixin:
        return (self.teacher and self.teacher.processor) or read_processor(self.folder)

    def write_processor(self, folder: Path) -> None:
        """Writes all but configuration and weights into a folder."""
        if self.teacher is None or self.teacher.processor is None:
            for name in PROCESSOR_FILES:
                if (self.folder / name).is_file():
                    shutil.copyfile(self.folder / name, folder / name)
            return
        self.teacher.processor.save_pretrained(folder)
        if self.teacher.generation_config is not None:
            self.teacher.generation_config.save_pretrained(folder)


def load_whole(model_class: Any, path: str | Path, **kwargs: Any) -> Any:
    """
    Returns `model_class.from_pretrained(path, ...)` if every weight is there; Transformers alone gives those that are
    missing random values.

    Raises:
        `ValueError`: Weights are missing, of another shape, not readable, or more than the model has.
    """
    try:
        model, found = model_class.from_pretrained(path, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise ValueError(f"{path}: its weights cannot be read ({first_line(error)}): save it again") from error
    except RuntimeError as error:  # shapes that differ: Transformers has printed which
        raise ValueError(f"{path}: the weights do not fit its config.json, see above; save the model again") from error
    ours = isinstance(model.config, LinMUConfig) and getattr(model, "hf_quantizer", None) is None
    for kind, problem in (("missing_keys", "are missing"), ("unexpected_keys", "are unknown to the model")):
        names = sorted(found[kind])
        if names and (ours or kind == "missing_keys"):
            raise ValueError(f"{path} is not whole: {len(names)} tensors {problem}, {names[0]!r} first; save it again")
    return model


def read_processor(path: str | Path) -> ProcessorMixin:
    """
    Returns `AutoProcessor.from_pretrained`.

    Raises:
        `ImportError`: Names the extra without which Transformers builds no Qwen2.5-VL processor.
        `ValueError`: A file of it is not what it should be.
    """
    try:
        return AutoProcessor.from_pretrained(path)
    except ImportError as error:
        if is_torchvision_available():
            raise
        raise ImportError(f'the processor of {path} needs torchvision: pip install "linmu-hf[video]"') from error
    except (KeyError, TypeError, AttributeError) as error:  # its files raise whatever they like
        raise ValueError(f"{path}: its processor does not load ({error!r}): save it again") from error


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
    family = _check_model_type(raw_config, path, allow_linmu)
    local = Path(path).expanduser()
    patterns = family.downloads(raw_config) if family else DOWNLOADS
    folder = local if local.is_dir() else _download(path, revision, patterns)
    if family is None:
        return Source(folder, raw_config, read_checkpoint(folder))
    teacher = family.open(folder, raw_config)
    return Source(folder, raw_config, teacher.tensors, teacher)


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
    """Reads the `config.json` of a folder or a model on the Hub; arguments and errors as in [`open_source`]."""
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


def _check_model_type(config: dict, path: str | Path, allow_linmu: bool) -> Family | None:
    """The teacher's family, or `None` for a LinMU model; a `ValueError` for what is not supported."""
    family = find_family(config)
    if config["model_type"] == LinMUConfig.model_type:
        if not allow_linmu:
            raise ValueError(f"{path} already is a LinMU model: give the teacher it was made from")
    elif family is None:
        is_vision_model = any(key in config for key in ("vision_config", "vision_tower_cfg", "mm_vision_tower"))
        kind = "an unsupported vision-language model" if is_vision_model else "not a vision-language model"
        supported = ", ".join(family.name for family in FAMILIES.values())
        raise ValueError(f"{path} is {kind} (model_type={config['model_type']!r}): supported teachers are {supported}")
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method")
        raise ValueError(f"{path} is quantized ({method}): give the checkpoint it was quantized from")
    if family is not None:
        try:
            family.check(config)  # before anything large is downloaded
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return family
