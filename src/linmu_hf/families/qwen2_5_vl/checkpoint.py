"""Qwen2.5-VL's checkpoints, which are Transformers' own."""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, Qwen2_5_VLConfig

from ...safetensors_io import read_checkpoint
from ..family import Checkpoint


def open_qwen2_5_vl(folder: Path, raw_config: dict[str, Any]) -> Checkpoint:
    """Reads a folder but for the values of its tensors."""
    generates = (folder / "generation_config.json").is_file()
    return Checkpoint(
        config=Qwen2_5_VLConfig.from_pretrained(folder),
        tensors=read_checkpoint(folder),
        generation_config=GenerationConfig.from_pretrained(folder) if generates else None,
    )
