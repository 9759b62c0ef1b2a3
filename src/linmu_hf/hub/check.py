"""Checks that a folder is a whole model before it is uploaded."""

import json
from pathlib import Path

import torch
from transformers import GenerationConfig, ProcessorMixin

from ..conversion.plan import student_tensors
from ..conversion.source import read_processor
from ..data.formats import first_line
from ..modeling.configuration_linmu import LinMUConfig
from ..modeling.modeling_linmu import LinMUForConditionalGeneration
from ..safetensors_io import read_checkpoint


def check_folder(folder: str | Path) -> None:
    """
    Raises unless `folder` loads whole: configuration, weights, remote code, processor.

    Of the weights only the headers are read: every tensor that the model has must be there, in its shape, and no
    other, in safetensors files that are as long as their headers say. No memory is needed, whatever the model's size.

    Args:
        folder (`str` or `Path`): A saved model with its processor.

    Raises:
        `FileNotFoundError`: Something is missing.
        `ValueError`: Something does not fit; the message names it and the remedy.
        `ImportError`: The processor needs torchvision, which is not installed.
    """
    folder = Path(folder).expanduser()
    config = _check_config(folder)
    _check_weights(folder, config)
    _check_processor(folder, config)


def _check_config(folder: Path) -> LinMUConfig:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json: give the folder of a saved model")
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = LinMUConfig.from_pretrained(folder) if raw["model_type"] == LinMUConfig.model_type else None
        if (folder / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever Transformers and its validation raise
        raise ValueError(f"{folder}: its configuration does not load ({first_line(error)})") from error
    if config is None:
        raise ValueError(f"{folder} is a {raw['model_type']!r} model, not a LinMU model: convert it first")
    if "quantization_config" in raw:
        raise ValueError(f"{folder} is quantized, which is not checked here: push it with model.push_to_hub")
    name = LinMUForConditionalGeneration.__name__
    if config.architectures != [name]:
        raise ValueError(f"{folder} holds architectures={config.architectures}: save a {name}, head included")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter beside the model: merge it (merge_and_unload) and save that")
    auto_map = getattr(config, "auto_map", None) or {}
    missing = {f"{entry.split('.')[0]}.py" for entry in auto_map.values()}
    missing = {file for file in missing if not (folder / file).is_file()}
    if missing or not set(config.remote_classes) <= set(auto_map):
        what = f"lacks {sorted(missing)[0]}" if missing else "names no auto_map in its config.json"
        raise ValueError(f"{folder} {what}, so trust_remote_code would not load it: save it with save_pretrained")
    return config


def _check_weights(folder: Path, config: LinMUConfig) -> None:
    stored = read_checkpoint(folder)
    used = {tensor.file.name for tensor in stored.values()}
    if extra := sorted({file.name for file in folder.glob("*.safetensors")} - used):
        raise ValueError(f"{folder / extra[0]} is no part of the model's weights: delete it")
    with torch.device("meta"):  # names and shapes without memory
        expected = student_tensors(LinMUForConditionalGeneration(config))
    for names, problem in (
        (expected.keys() - stored.keys(), "are missing"),
        (stored.keys() - expected.keys(), "are unknown to the model"),
        (
            {name for name in expected.keys() & stored.keys() if tuple(expected[name].shape) != stored[name].shape},
            "have another shape than config.json says",
        ),
    ):
        if names:
            raise ValueError(
                f"{folder} is not whole: {len(names)} tensor(s) {problem}, {sorted(names)[0]!r} first; save it again"
            )


def _check_processor(folder: Path, config: LinMUConfig) -> None:
    remedy = "save the processor beside the model (processor.save_pretrained)"
    try:
        processor = read_processor(folder)
    except ImportError:
        raise  # of this installation, not of the folder
    except Exception as error:  # its parts raise whatever they like
        raise ValueError(f"{folder}: its processor does not load ({first_line(error)}): {remedy}") from error
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(f"{folder} holds a {type(processor).__name__} alone, no processor: {remedy}")
    if not processor.chat_template:
        raise ValueError(f"{folder}: its processor has no chat template, which pipelines need: {remedy}")
    if (found := getattr(processor, "image_token_id", None)) != config.image_token_id:
        raise ValueError(
            f"{folder}: image_token_id is {found} in the processor, but {config.image_token_id} in config.json: "
            f"{remedy}"
        )
