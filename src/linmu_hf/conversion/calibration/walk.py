"""Rows on their way through the decoders of teacher and student, layer by layer.

What is between the layers is kept on the CPU, three states `[b, t, d]` of every batch. A device holds the activations
of one layer and one batch, whatever the number of layers.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...modeling.layout.prompt import Medium, Prompt


@dataclass
class Rows:
    """
    A batch before some layer.

    Args:
        prompt (`Prompt`): Mask, positions and vision layout.
        known, own (`torch.Tensor` of shape `[b, t, d]`): Hidden states of the teacher and of the student.
        target (`torch.Tensor` of shape `[b, t, d]`, *optional*): Output of the teacher's mixer in this layer.
        last (`torch.Tensor` of shape `[b, t, d]`, *optional*): The teacher's last hidden states, of held-out rows.
    """

    prompt: Prompt
    known: Tensor
    own: Tensor
    target: Tensor | None = None
    last: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """Where tokens are no padding, `[b, t]`."""
        mask = self.prompt.mask
        return torch.ones(self.known.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()


class LayerStates(NamedTuple):
    """
    What a mixer is fitted to.

    Args:
        mixer_input (`torch.Tensor` of shape `[b, t, d]`): What the student has reached, normed.
        target (`torch.Tensor` of shape `[b, t, d]`): What leads from there to the teacher's hidden states after its
            mixer, in float64: its output, and what the layers before have missed.
        rope, layout: Where the tokens are.
    """

    mixer_input: Tensor
    target: Tensor
    rope: tuple[Tensor, Tensor]
    layout: Any


class Walk:
    """
    Takes batches through both models, a layer at a time. The last batch is held out, if there are several.

    Args:
        student, teacher (`LinMUForConditionalGeneration`): With equally many layers; each may be on a device.
        batches (`Iterable[Mapping[str, torch.Tensor]]`): Model inputs; gone through once, pixels are not kept.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, batches: Iterable[Mapping[str, Tensor]]):
        self.ours: Any = student.model.language_model
        self.theirs: Any = teacher.model.language_model
        self.rows = [read_rows(student, teacher, batch) for batch in batches]
        if not self.rows:
            raise ValueError("calibration needs at least one batch")
        self.fitted, self.held_out = (self.rows[:-1] or self.rows), self.rows[-1:]
        for rows in self.held_out:
            rows.last = _run(self.theirs, range(len(self.theirs.layers)), rows.known, rows.prompt)

    def enter(self, layer: int) -> None:
        """Finds the teacher's output of a layer's mixer, for every batch."""
        for rows in self.rows:
            hidden, rope, layout, attention = _prepare(self.theirs, [layer], rows.known, rows.prompt)

            def mix(block, hidden, where=(rope, layout, attention)):
                return block.mix(block.input_layernorm(hidden), *where)

            rows.target = self.theirs.layers[layer](hidden, run=mix).cpu()

    def states(self, layer: int, batches: Sequence[Rows]) -> Iterator[LayerStates]:
        """Yields what a layer of the student gets and should give, batch by batch, on its device."""
        block = self.ours.layers[layer]
        for rows in batches:
            assert rows.target is not None
            hidden, rope, layout, _ = _prepare(self.ours, [layer], rows.own, rows.prompt)
            mixer_input = block(hidden, run=lambda block, hidden: block.input_layernorm(hidden))
            target = rows.target.double() + rows.known.double() - rows.own.double()
            yield LayerStates(mixer_input, target.to(hidden.device), rope, layout)

    def leave(self, layer: int) -> None:
        """Takes all rows past a layer, the teacher's by its output and the student's by the layer as it is now."""
        device = _device(self.theirs)
        for rows in self.rows:
            assert rows.target is not None
            hidden, target = rows.known.to(device), rows.target.to(device)
            rows.known = self.theirs.layers[layer](hidden, run=lambda b, h, y=target: b.after_mixer(h, y)).cpu()
            rows.target = None
            rows.own = _run(self.ours, [layer], rows.own, rows.prompt, norm=False)

    def path_error(self, layer: int) -> float:
        """
        Returns the relative error of the student's last hidden states over real tokens of held-out rows, which have
        gone through its layers before this one and go through the others now.
        """
        wrong = size = 0.0
        for rows in self.held_out:
            assert rows.last is not None
            ours = _run(self.ours, range(layer, len(self.ours.layers)), rows.own, rows.prompt)
            ours, theirs = (states[rows.real].double() for states in (ours, rows.last))
            wrong += float((ours - theirs).square().sum())
            size += float(theirs.square().sum())
        return wrong / size


def read_rows(student, teacher, batch: Mapping[str, Tensor]) -> Rows:
    """Embeds a batch of model inputs, labels aside, for both models."""
    known, _ = embed(teacher, batch)
    own, prompt = embed(student, batch)
    return Rows(prompt, known.cpu(), own.cpu())


def embed(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Prompt]:
    """Returns the embeddings `[b, t, d]` of a batch, features of its images and videos in place, and its prompt."""
    inner: Any = model.model
    device = _device(inner.language_model)
    values = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    media = {
        "image": Medium(values.get("pixel_values"), values.get("image_grid_thw")),
        "video": Medium(values.get("pixel_values_videos"), values.get("video_grid_thw")),
    }
    prompt = Prompt.read(
        inner,
        values["input_ids"],
        values.get("attention_mask"),
        media=media,
        second_per_grid_ts=values.get("second_per_grid_ts"),
        mm_token_type_ids=values.get("mm_token_type_ids"),
        use_cache=False,
    )
    return inner.embed_prompt(prompt, inner.encode_media(media)), prompt


def _device(text) -> torch.device:
    return text.embed_tokens.weight.device


def _prepare(text, layers: Sequence[int], hidden: Tensor, prompt: Prompt):
    """Hidden states where and as a decoder takes them, and the rotary tables, layout and attention of some layers."""
    hidden = hidden.to(_device(text), text.embed_tokens.weight.dtype)
    kinds = [text.config.layer_types[layer] for layer in layers]
    where = prompt.mask, prompt.positions, prompt.vision_layout
    return hidden, *text.prepare(hidden, *where, layer_types=kinds)


def _run(text, layers: Sequence[int], hidden: Tensor, prompt: Prompt, norm: bool = True) -> Tensor:
    """Hidden states after some layers, and after the final norm, on the CPU."""
    hidden, rope, layout, attention = _prepare(text, layers, hidden, prompt)
    for layer in layers:
        hidden = text.layers[layer](hidden, rope, layout, attention)[0]
    return (text.norm(hidden) if norm else hidden).cpu()
