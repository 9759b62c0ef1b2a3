"""The teacher of a distillation as a value: attention beside the student's own backbone, or a model of its own."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from ..modeling.configuration_linmu import LinMUConfig
from ..modeling.decoder import attention_arguments
from ..modeling.layout.media import Medium
from ..modeling.layout.positions import positions_within
from ..modeling.layout.prompt import Prompt
from ..modeling.mixers import recurrent_layers
from ..modeling.mixers.attention import BY_SEQUENCE
from ..modeling.modeling_linmu import LinMUForConditionalGeneration


@dataclass(frozen=True)
class Given:
    """
    A batch as a teacher reads it.

    Args:
        prompt (`Prompt`): Padded on the right or packed.
        embeds (`Tensor` of shape `[b, t, d]`): The student's embeddings of it, vision features in their places.
        features (`Mapping[str, Tensor]`, *optional*): Of the student's vision side.
        media (`Mapping[str, Medium]`, *optional*): Pixels and grids, for a vision side of the teacher's own.
    """

    prompt: Prompt
    embeds: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)
    media: Mapping[str, Medium] = field(default_factory=dict)


# Gets a layer's number, its mixer's input and output, and the student's layer if its parameters are loaded now.
See = Callable[[int, Tensor, Tensor, nn.Module | None], Any]


class Teacher(nn.Module):
    """
    The module that a student learns from. Frozen, always in evaluation mode, never in a checkpoint.

    Called with a batch, it goes through its layers one by one, or through the first `num_layers`, shows each mixer's
    input and output to `see`, keeps nothing of them, and returns the hidden states after the final norm.
    """

    @property
    def head(self) -> nn.Module:
        """Returns the language-model head, which maps `[n, d]` to logits `[n, v]`."""
        raise NotImplementedError

    def as_model(self) -> LinMUForConditionalGeneration:
        """Returns the teacher as a model that generates; it shares all memory with this one."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)


class SharedTeacher(Teacher):
    """
    The teacher that a student was converted from, as the student's backbone with attention in its layers.

    The student's layers run with the teacher's attention in the place of M-MATE and without adapters, so that memory
    holds one backbone. Right as long as nothing of the student outside its M-MATE mixers and adapters is trained.

    Args:
        student (`LinMUForConditionalGeneration`): The student; not registered as a part of this module.
        attention (`Mapping[int, nn.Module]`): The teacher's attention of every layer that has M-MATE in the student.
        config (`LinMUConfig`): The teacher's, with attention in every layer.
    """

    def __init__(self, student, attention: Mapping[int, nn.Module], config: LinMUConfig):
        super().__init__()
        self.config: Any = config
        without_mask(self.config.text_config)
        self.attention = nn.ModuleDict({str(index): module for index, module in attention.items()})
        self._student = (student,)  # in a tuple: a module here would be a part of this one
        self.requires_grad_(False).eval()

    @property
    def student(self) -> LinMUForConditionalGeneration:
        return self._student[0]

    @property
    def head(self) -> nn.Module:
        return self.student.lm_head

    def forward(self, given: Given, see: See | None = None, num_layers: int | None = None) -> Tensor:
        prompt, embeds = given.prompt, given.embeds
        text: Any = self.student.model.language_model
        with torch.no_grad(), adapters_off(self.student):
            rope = text.rope(embeds, prompt.positions)
            text_positions = None if prompt.lengths is None else positions_within(prompt.lengths, embeds.device)
            attention = attention_arguments(
                self.config.text_config, embeds, None, text_positions, None, prompt.lengths
            )

            def run(layer, hidden_states):
                mixer_input = layer.input_layernorm(hidden_states)
                own = self.attention[str(layer.layer_idx)] if layer.recurrent else layer.mixer
                mixer_output = own(mixer_input, position_embeddings=rope, **attention)[0]
                seen = None if see is None else see(layer.layer_idx, mixer_input, mixer_output, layer)
                return layer.after_mixer(hidden_states, mixer_output), seen

            hidden_states = embeds
            for layer in text.layers[:num_layers]:
                hidden_states, _ = layer(hidden_states, run=run)
            return text.norm(hidden_states)

    def as_model(self) -> LinMUForConditionalGeneration:
        with no_init_weights(), torch.device("meta"):
            model = LinMUForConditionalGeneration._from_config(copy.deepcopy(self.config), dtype=self.student.dtype)
        student, ours = self.student.model, model.model
        model.generation_config, model.lm_head, ours.visual = (
            self.student.generation_config, self.student.lm_head, student.visual,
        )  # fmt: skip
        text, own = ours.language_model, student.language_model
        text.embed_tokens, text.norm, text.rotary_emb = own.embed_tokens, own.norm, own.rotary_emb
        for index, (layer, source) in enumerate(zip(text.layers, own.layers, strict=True)):
            layer.mixer = self.attention[str(index)] if source.recurrent else source.mixer
            layer.mlp = source.mlp
            layer.input_layernorm, layer.post_attention_layernorm = (
                source.input_layernorm, source.post_attention_layernorm,
            )  # fmt: skip
        return model.eval()


class SeparateTeacher(Teacher):
    """
    A model of its own as the teacher, of the student's tokenizer; of any size where L_hid is not taken.

    Args:
        model (`LinMUForConditionalGeneration`): As [`load_teacher`] gives it.
        shares_vision (`bool`, *optional*, defaults to `False`): Whether its vision side is the student's, whose
            features then serve both.
    """

    def __init__(self, model: LinMUForConditionalGeneration, shares_vision: bool = False):
        super().__init__()
        self.model, self.shares_vision = model, shares_vision
        self.config: Any = model.config
        without_mask(self.config.text_config)
        # Padding is on the right, where no real token sees it: causal attention then needs no mask of t x t.
        self.is_causal = not recurrent_layers(self.config.text_config.layer_types)
        self.requires_grad_(False).eval()

    @property
    def head(self) -> nn.Module:
        return self.model.lm_head

    @torch.no_grad()
    def forward(self, given: Given, see: See | None = None, num_layers: int | None = None) -> Tensor:
        model, text, prompt = self.model.model, self.model.model.language_model, given.prompt
        features = given.features if self.shares_vision else model.encode_media(given.media)
        hidden_states = model.embed_prompt(prompt, features)
        mask = None if self.is_causal else prompt.mask
        rope, layout, attention = text.prepare(
            hidden_states, mask, prompt.positions, prompt.vision_layout, packed=prompt.lengths
        )
        for layer in text.layers[:num_layers]:
            hidden_states, mixer_input, mixer_output = layer(hidden_states, rope, layout, attention)
            if see is not None:
                see(layer.layer_idx, mixer_input, mixer_output, None)
        return text.norm(hidden_states)

    def as_model(self) -> LinMUForConditionalGeneration:
        return self.model


def without_mask(config) -> None:
    """Lets attention that would read packed rows through a mask of t x t read one sequence after the other."""
    if config._attn_implementation == "sdpa":
        config._attn_implementation = BY_SEQUENCE


def as_teacher(student, teacher, shared: bool | None = None) -> Teacher:
    """
    Returns a model as the value that a distillation takes.

    Args:
        student (`LinMUForConditionalGeneration`): The student.
        teacher (`LinMUForConditionalGeneration` or `Teacher`): The teacher; a `Teacher` is returned as it is.
        shared (`bool`, *optional*):
            Whether its attention runs on the student's backbone; by default if all other weights are equal.

    Raises:
        `ValueError`: `shared=True`, and a weight outside the mixers differs.
    """
    if isinstance(teacher, Teacher):
        return teacher
    replaced = recurrent_layers(student.config.text_config.layer_types)
    if shared is not False:
        reason = differing_weight(student, teacher, replaced)
        if reason is None:
            layers = teacher.model.language_model.layers
            return SharedTeacher(student, {index: layers[index].mixer for index in replaced}, teacher.config)
        if shared:
            raise ValueError(f"shared_teacher=True, but {reason} of student and teacher differ: leave it out")
    return SeparateTeacher(teacher, shares_vision=equal_weights(student.model.visual, teacher.model.visual))


def differing_weight(student, teacher, replaced: list[int]) -> str | None:
    """Returns the first weight outside the replaced mixers in which two models differ, or `None`."""
    if recurrent_layers(teacher.config.text_config.layer_types):
        return "the layers"
    prefixes = tuple(f"model.language_model.layers.{index}.mixer." for index in replaced)
    ours, theirs = (
        {
            name.replace(".base_layer.", "."): tensor  # what adapters adapt
            for name, tensor in model.state_dict().items()
            if not name.startswith(prefixes) and ".lora_" not in name
        }
        for model in (student, teacher)
    )
    for name in ours.keys() | theirs.keys():
        if name not in ours or name not in theirs or not _equal(ours[name], theirs[name]):
            return f"the weights {name}"
    return None


def equal_weights(one: nn.Module, other: nn.Module) -> bool:
    """Returns whether two modules hold the same tensors."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b.to(a.device))


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Runs a model without its LoRA adapters, whose `requires_grad` stays as it is."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [layer.disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True  # PEFT's own `enable_adapters` would also freeze them
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value
