"""Models by folder or Hub id, with one clear error for each thing that can be wrong with them."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ..conversion.source import load_whole, open_source, read_processor, read_raw_config
from ..conversion.teacher import load_teacher
from ..data.formats import first_line
from ..families import find_family


PACKAGES = (
    "linmu-hf", "torch", "transformers", "peft", "trl", "accelerate", "datasets",
    "triton", "mamba-ssm", "flash-linear-attention", "flash-attn",
)  # fmt: skip


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name: str | None) -> torch.device:
    """Returns the device of that name, by default a GPU if there is one; a `ValueError` if it is not there."""
    name = name or default_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name} is unknown: give cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name} needs a CUDA GPU and a PyTorch built for it; give --device cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):  # which of them depends on the device
        raise ValueError(f"--device {name} is not there, or holds no numbers: give cpu or cuda") from None
    return device


def check_model(path: str) -> None:
    """Raises a one-line `ValueError` unless `path` is an image-text-to-text model, reading only its configuration."""
    folder = Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not folder.is_dir():
        raise ValueError(
            f"{path} is not a folder: give a model folder or a Hub id such as Qwen/Qwen2.5-VL-7B-Instruct"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: give the folder of a saved model")
    if _is_foreign(path):
        return
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {first_line(error)}") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"{path} is a {config.model_type!r} model, which takes no images: give a vision-language model"
        )


def load_model(path: str, *, device: str | None = None, dtype: str = "auto") -> tuple[Any, Any]:
    """
    Loads a model for evaluation together with its processor.

    Args:
        path (`str`):
            Folder or Hub id of any image-text-to-text model, or of a teacher that Transformers does not know.
        device (`str`, *optional*):
            Where to put it; by default a GPU if there is one.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Its parameters' type; `"auto"` is the checkpoint's own.

    Returns:
        `tuple`: the model in evaluation mode and its processor.
    """
    processor = load_processor(path)
    if _is_foreign(path):
        return load_teacher(path, dtype=dtype, device=device or default_device()), processor
    try:
        model = load_whole(AutoModelForImageTextToText, path, dtype=dtype)
    except OSError as error:
        raise ValueError(f"{path}: {first_line(error)}") from error
    return model.to(device or default_device()).eval(), processor


def load_processor(path: str) -> Any:
    """Loads the processor of an image-text-to-text model, named as for [`load_model`]."""
    check_model(path)
    if _is_foreign(path):
        return open_source(path).load_processor()
    try:
        return read_processor(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {first_line(error)}") from error


def _is_foreign(path: str) -> bool:
    """Whether it is a teacher that Transformers does not load."""
    try:
        family = find_family(read_raw_config(path))
        return family is not None and not family.in_transformers
    except (OSError, ValueError):
        return False  # what is wrong with it is reported where it is opened


def library_versions() -> dict[str, str]:
    """Returns the versions that a result depends on, of Python and of the packages that are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
