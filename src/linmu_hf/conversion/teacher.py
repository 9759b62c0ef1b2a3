"""The teacher as a LinMU model whose every layer keeps full attention: one code path for teacher and student."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.initialization import no_init_weights

from ..modeling.configuration_linmu import LinMUConfig
from ..modeling.mixers import MIXERS, recurrent_layers
from ..modeling.modeling_linmu import LinMUForConditionalGeneration
from ..safetensors_io import OutputTensor, StoredTensor
from .plan import ConversionPlan, parse_dtype
from .source import load_whole, open_source


# What [`check_pair`] compares: of the decoder, at the top, and of the vision side all but the last.
DECODER = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_parameters",
)  # fmt: skip
TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
# What decides how many tokens an image is and where they are, at the end of their names.
SAME_TOKENS = (
    *TOKENS, "patch_size", "spatial_merge_size", "temporal_patch_size", "tokens_per_second", "image_size",
    "projector_type", "image_aspect_ratio", "s2_scales", "min_tiles", "max_tiles", "video_encoder", "pool_sizes",
)  # fmt: skip
IRRELEVANT = {*PreTrainedConfig().to_dict(), "initializer_range", "attention_dropout"}


def load_teacher(
    path: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
) -> LinMUForConditionalGeneration:
    """
    Loads a Qwen2.5-VL or NVILA checkpoint as LinMU with full attention everywhere, frozen and in eval mode.

    Its logits are those of the model it comes from. A folder that is a LinMU model loads as it is.

    Args:
        path (`str` or `Path`): Folder, or model on the Hub.
        dtype (`str` or `torch.dtype`, *optional*): By default the checkpoint's.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        device (`str` or `torch.device`, *optional*): By default the CPU.

    Raises:
        `FileNotFoundError`, `ValueError`: As in [`convert`].
    """
    dtype = parse_dtype(dtype)
    source = open_source(path, revision, allow_linmu=True)
    if source.teacher is None:
        model = load_whole(LinMUForConditionalGeneration, source.folder, dtype=dtype or "auto")
        return model.to(device or "cpu").eval().requires_grad_(False)

    config = LinMUConfig.from_teacher(source.teacher.config, keep_attention="all")
    plan = ConversionPlan(source, config, dtype)
    model = build_model(config, plan.dtype, {tensor.name: tensor for tensor in plan.tensors}, device)
    if source.teacher.generation_config is not None:
        model.generation_config = source.teacher.generation_config
    return model.eval().requires_grad_(False)


@torch.no_grad()
def load_attention(
    student: LinMUForConditionalGeneration, path: str | Path, revision: str | None = None
) -> tuple[dict[int, nn.Module], LinMUConfig] | str:
    """
    Loads of a teacher only what its student has replaced, and compares the rest in the files with the student's.

    Args:
        student (`LinMUForConditionalGeneration`): Converted from the teacher; its type is taken.
        path, revision: As in [`load_teacher`].

    Returns:
        `tuple[dict[int, nn.Module], LinMUConfig] | str`: The attention of every layer that has M-MATE in the student,
        and the teacher's configuration; or what differs between the two.
    """
    source = open_source(path, revision, allow_linmu=True)
    if source.teacher is None:
        return "the kind of checkpoint"
    config = LinMUConfig.from_teacher(source.teacher.config, keep_attention="all")
    plan = ConversionPlan(source, config, student.dtype)
    tensors, attention = dict(student.state_dict()), {}
    device = student.model.language_model.embed_tokens.weight.device
    for index in recurrent_layers(student.config.text_config.layer_types):
        with no_init_weights(), torch.device(device):
            module = MIXERS["full_attention"].module(config.text_config, index).to(student.dtype)
        attention[index] = module.eval().requires_grad_(False)
        prefix = f"model.language_model.layers.{index}.mixer."
        tensors |= {prefix + name: tensor for name, tensor in module.state_dict().items()}
    replaced = tuple(f"model.language_model.layers.{index}.mixer." for index in attention)
    for tensor in plan.tensors:
        if tensor.name not in tensors or tuple(tensors[tensor.name].shape) != tensor.shape:
            return tensor.name
        flat, start = tensors[tensor.name].view(-1), 0
        for chunk in tensor.chunks():
            piece = torch.frombuffer(chunk, dtype=tensor.dtype).to(flat.device)
            part = flat[start : start + len(piece)]
            if tensor.name.startswith(replaced):
                part.copy_(piece)
            elif not torch.equal(part, piece.to(part.dtype)):
                return tensor.name
            start += len(piece)
    return attention, config


def load_processor(path: str | Path, *, revision: str | None = None) -> ProcessorMixin:
    """Loads a teacher's processor, in the form that Transformers uses; arguments and errors as in [`load_teacher`]."""
    return open_source(path, revision, allow_linmu=True).load_processor()


def check_teacher(config: PreTrainedConfig) -> None:
    """Raises a `ValueError` unless every layer of the model keeps attention."""
    changed = {one for one in config.text_config.layer_types if MIXERS[one].recurrent}
    if changed:
        raise ValueError(f"the teacher has layers of {sorted(changed)}: give the model that the student is made of")


def check_pair(student: PreTrainedConfig, teacher: PreTrainedConfig, hidden: bool = True) -> None:
    """
    Checks that a student can learn from a teacher. Vocabularies may be padded to different sizes.

    Args:
        student, teacher (`LinMUConfig`): Their configurations, as loaded.
        hidden (`bool`, *optional*, defaults to `True`): Whether mixers are compared, so that the student must be one
            that can have been converted from this teacher. Otherwise the teacher may be of any size.

    Raises:
        `ValueError`: A setting that both must share differs, or mixers are compared with those of a student.
    """
    if hidden:
        check_teacher(teacher)
    ours, theirs = (teacher_settings(config) for config in (student, teacher))
    if not hidden:
        ours, theirs = ({name: one[name] for name in one if name.endswith(SAME_TOKENS)} for one in (ours, theirs))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"{name} is {ours.get(name)} in the student and {theirs.get(name)} in the teacher: take the teacher "
                "that the student was converted from"
                + ("" if name.endswith(SAME_TOKENS) else ", or stages without `hid`, which learn from any size")
            )


def teacher_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns what a conversion leaves as it is and that changes results, as in `config.json`, by its full name."""
    content = json.loads(json.dumps(config.to_dict(), default=str))
    text = {f"text_config.{name}": content["text_config"][name] for name in DECODER}
    return {name: content[name] for name in TOKENS} | text | _of_vision("vision_config", content["vision_config"])


def _of_vision(prefix: str, content: dict) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            settings |= _of_vision(f"{prefix}.{name}", value)
        elif name not in IRRELEVANT:
            settings[f"{prefix}.{name}"] = value
    return settings


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises a `ValueError` unless every id is the same token for student and teacher."""
    ours, theirs = ({id: token for token, id in each.get_vocab().items()} for each in (student, teacher))
    for id in sorted(ours.keys() | theirs.keys()):
        if ours.get(id) != theirs.get(id):
            raise ValueError(
                f"token {id} is {ours.get(id)!r} for the student and {theirs.get(id)!r} for the teacher: take the "
                "teacher that the student was converted from"
            )


def build_model(
    config: LinMUConfig,
    dtype: torch.dtype,
    tensors: Mapping[str, StoredTensor | OutputTensor],
    device: str | torch.device | None = None,
) -> LinMUForConditionalGeneration:
    """Builds a model with the given tensors, read in chunks; it never takes more memory than its own."""
    # Built where it will live: buffers that no checkpoint holds, such as rotary frequencies, are right from the start.
    with no_init_weights(), torch.device(device or "cpu"):
        model = LinMUForConditionalGeneration._from_config(config, dtype=dtype)
    model.tie_weights()
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if state[name].dtype != tensor.dtype:
                state[name].data = state[name].data.to(tensor.dtype)
            flat, start = state[name].view(-1), 0
            for chunk in tensor.chunks():
                piece = torch.frombuffer(chunk, dtype=tensor.dtype)
                flat[start : start + len(piece)] = piece.to(flat.device)
                start += len(piece)
    return model
