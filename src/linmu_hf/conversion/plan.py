"""What to write: every tensor of the student, its dtype, and where its bytes come from."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import nn

from ..modeling.configuration_linmu import LinMUConfig
from ..modeling.mixers.flex_ma import feature_scale
from ..modeling.modeling_linmu import LinMUForConditionalGeneration
from ..safetensors_io import OutputTensor, StoredTensor, tensor_chunks
from .source import Source
from .weight_map import is_new, map_teacher_key, teacher_key


FLOAT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
_FEATURE_BIAS = re.compile(r".+\.layers\.(\d+)\.mixer\.flex_ma\.forward_scan\.([bc])_proj\.bias")


class ConversionPlan:
    """
    Every tensor of the student, in the model's own order, and where its bytes come from.

    Args:
        source (`Source`): The teacher.
        config (`LinMUConfig`): The student.
        dtype (`torch.dtype`, *optional*): Of the floating-point tensors.

    Raises:
        `ValueError`: A teacher tensor is unknown, missing, or of a shape that does not fit.
    """

    def __init__(self, source: Source, config: LinMUConfig, dtype: torch.dtype | None):
        self.source, self.config = source, config
        counts: Counter = Counter()
        for tensor in source.tensors.values():
            if tensor.dtype.is_floating_point:
                counts[tensor.dtype] += tensor.numel
        self.cast = dtype
        self.dtype = dtype or counts.most_common(1)[0][0]  # of the model as a whole, and of new parameters
        mapped = self._map_teacher()
        config.dtype = self.dtype
        config.architectures = [LinMUForConditionalGeneration.__name__]
        with torch.device("meta"):  # names and shapes without memory
            self.skeleton = LinMUForConditionalGeneration(config)
        self._layer: tuple[int, dict[str, torch.Tensor]] = (-1, {})

        origins: dict[str, str] = {}
        self.used: list[str] = []
        self.dropped: list[str] = []
        for key, targets in mapped.items():
            (self.dropped if targets is None else self.used).append(key)
            for name in targets or ():
                if name in origins:
                    raise ValueError(f"teacher tensors {origins[name]!r} and {key!r} both become {name!r}")
                origins[name] = key
        expected = student_tensors(self.skeleton)
        if unknown := sorted(set(origins) - set(expected)):
            raise ValueError(f"teacher tensor {origins[unknown[0]]!r} has no place in the model of its config.json")
        if missing := [name for name in expected if name not in origins and not is_new(name, config)]:
            keys = list(dict.fromkeys(teacher_key(name, config) for name in missing))
            raise ValueError(
                f"{source.folder} lacks {len(keys)} tensor(s) that its config.json asks for, {keys[0]!r} first: "
                + ("set tie_word_embeddings there if it is the embedding, or " if missing == [HEAD] else "")
                + "download or copy it again"
            )
        self.origins = origins
        self.tensors = [self._output(name, tensor, origins.get(name)) for name, tensor in expected.items()]

    def _map_teacher(self) -> dict[str, list[str] | None]:
        """
        What becomes of every teacher tensor; decides whether the head is the embedding.

        As in Transformers, a head that the file holds counts, whatever `tie_word_embeddings` says, and where the file
        holds no other, it is the embedding too.
        """
        tied, self.config.tie_word_embeddings = self.config.tie_word_embeddings, False
        mapped = {key: map_teacher_key(key, self.config) for key in self.source.tensors}
        keys = {names[0]: key for key, names in mapped.items() if names}
        if tied and HEAD in keys and EMBEDDING in keys:
            tied = _same_values(self.source.tensors[keys[HEAD]], self.source.tensors[keys[EMBEDDING]])
        if tied and HEAD in keys:
            mapped[keys[HEAD]] = None if EMBEDDING in keys else [EMBEDDING]
        self.config.tie_word_embeddings = tied
        return mapped

    def _output(self, name: str, expected: torch.Tensor, origin: str | None) -> OutputTensor:
        shape = tuple(expected.shape)
        in_fp32 = set(name.split(".")) & set(LinMUForConditionalGeneration._keep_in_fp32_modules_strict or ())
        if origin is None:
            dtype = torch.float32 if in_fp32 else self.dtype
            return OutputTensor(name, dtype, shape, partial(self._new_tensor, name, dtype))
        stored = self.source.tensors[origin]
        if stored.shape != shape:
            raise ValueError(
                f"teacher tensor {origin!r} has shape {stored.shape}, its config.json asks for {shape}: "
                "config.json and weights do not belong together"
            )
        dtype = (self.cast or stored.dtype) if stored.dtype.is_floating_point else stored.dtype
        return OutputTensor(name, dtype, shape, partial(_finite_chunks, origin, stored, dtype))

    def _new_tensor(self, name: str, dtype: torch.dtype) -> Iterator[memoryview]:
        layer = int(name.removeprefix("model.language_model.layers.").split(".")[0])
        if self._layer[0] != layer:
            biases = self._biases(rf"model\.language_model\.layers\.{layer}\.mixer\..+\.bias")
            self._layer = (layer, new_parameters(self.skeleton, self.config, layer, biases))
        return tensor_chunks(self._layer[1][name].to(dtype))

    def _biases(self, pattern: str) -> dict[str, torch.Tensor]:
        """The teacher's biases, by the student's names that match."""
        found = {name: self.source.tensors[key] for name, key in self.origins.items() if re.fullmatch(pattern, name)}
        return {name: torch.cat([*stored.values()]) for name, stored in found.items()}

    def scaled_heads(self) -> dict[str, float]:
        """Names heads whose features start scaled down (`layers.0 C head 3`), with the bias that saturates them."""
        text, scaled = self.skeleton.config.text_config, {}
        for name, bias in self._biases(_FEATURE_BIAS.pattern).items() if text.bc_feature_map else ():
            layer, letter = _FEATURE_BIAS.findall(name)[0]
            for head, own in enumerate(bias.float().view(-1, text.head_dim)):
                if (feature_scale(own, text.scan_rope) < 1).any():
                    scaled[f"layers.{layer} {letter.upper()} head {head}"] = float(own.abs().max())
        return scaled

    def fingerprint(self, shards: dict[str, list[OutputTensor]]) -> str:
        """Returns a hash of what decides the output: the teacher's files, the configuration, the files to write."""
        folder = self.source.folder
        files = {str(tensor.file.relative_to(folder)): tensor.file.stat() for tensor in self.source.tensors.values()}
        content = {
            "teacher": {name: (stat.st_size, stat.st_mtime_ns) for name, stat in sorted(files.items())},
            "tensors": [(name, t.begin, t.end, str(t.dtype)) for name, t in sorted(self.source.tensors.items())],
            "config": self.config.to_dict(),
            "shards": {file: [(t.name, str(t.dtype)) for t in tensors] for file, tensors in shards.items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _same_values(first: StoredTensor, second: StoredTensor) -> bool:
    digests = [hashlib.sha256() for _ in range(2)]
    for digest, tensor in zip(digests, (first, second)):
        for values in tensor.values():
            digest.update(_bytes(values.to(torch.promote_types(first.dtype, second.dtype))))
    return first.shape == second.shape and digests[0].digest() == digests[1].digest()


def _finite_chunks(name: str, stored: StoredTensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of a tensor in `dtype`; a `ValueError` at the first value that is not finite there."""
    for given in stored.values():
        values = given.to(dtype)
        if dtype.is_floating_point and not (finite := values.isfinite()).all():
            value = given[~finite][0].item()
            remedy = "the teacher is damaged; download or copy it again"
            if math.isfinite(value):
                remedy = f"{dtype} ends at {torch.finfo(dtype).max:g}; choose another dtype, such as float32"
            raise ValueError(f"teacher tensor {name!r} has the value {value:g}: {remedy}")
        yield _bytes(values)


def _bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.view(torch.uint8).numpy())


def student_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the tensors of a checkpoint of the model: its state dict, less a head tied to the embedding."""
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def new_parameters(
    skeleton: nn.Module, config: LinMUConfig, layer: int, biases: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    Returns the parameters of one layer's mixer that no teacher has, at their initial values, by full name. Some
    depend on the teacher's `biases` in this mixer.
    """
    prefix = f"model.language_model.layers.{layer}.mixer."
    mixer = skeleton.get_submodule(prefix.removesuffix("."))
    new = {name for name, _ in mixer.named_parameters() if is_new(prefix + name, config)}
    real = {name: torch.empty(mixer.get_parameter(name).shape, dtype=torch.float32) for name in new}
    real |= {name.removeprefix(prefix): bias for name, bias in biases.items()}
    meta = {name: _replace(mixer, name, nn.Parameter(tensor)) for name, tensor in real.items()}
    mixer.reset_new_parameters()
    values = {prefix + name: mixer.get_parameter(name).detach() for name in new}
    for name, parameter in meta.items():
        _replace(mixer, name, parameter)
    return values


def _replace(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    """Sets a parameter and returns the one before."""
    owner, _, leaf = name.rpartition(".")
    before = module.get_parameter(name)
    setattr(module.get_submodule(owner), leaf, parameter)
    return before


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype in (None, "auto"):
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in FLOAT_DTYPES:
        raise ValueError(f"dtype={name!r} must be one of {sorted(FLOAT_DTYPES)}")
    return FLOAT_DTYPES[name]
