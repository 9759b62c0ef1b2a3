"""Rows on their way through the teacher's decoder, layer by layer.

What is between the layers is kept on the CPU, three states `[b, t, d]` of every batch. A device holds the activations
of one layer and one batch, whatever the number of layers.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...modeling.layout.prompt import Prompt


@dataclass
class Rows:
    """
    A batch before some layer of the teacher.

    Args:
        prompt (`Prompt`): Mask, positions and vision layout.
        start (`torch.Tensor` of shape `[b, t, d]`): Embeddings, features of images and videos in place.
        hidden (`torch.Tensor` of shape `[b, t, d]`): Hidden states before the layer.
        target (`torch.Tensor` of shape `[b, t, d]`, *optional*): Output of its mixer.
    """

    prompt: Prompt
    start: Tensor
    hidden: Tensor
    target: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """Returns where tokens are not padding, `[b, t]`."""
        mask = self.prompt.mask
        return torch.ones(self.start.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()


class LayerStates(NamedTuple):
    """
    The data that a mixer is fitted to.

    Args:
        mixer_input (`torch.Tensor` of shape `[b, t, d]`): The teacher's hidden states, normed by the student's layer.
        target (`torch.Tensor` of shape `[b, t, d]`): What the teacher's mixer gives for them.
        rope, layout: Where the tokens are.
    """

    mixer_input: Tensor
    target: Tensor
    rope: tuple[Tensor, Tensor]
    layout: Any


class Walk:
    """
    A walk of batches through the teacher, a layer at a time. The last batch is held out, if there are several.

    Args:
        student, teacher (`LinMUForConditionalGeneration`): With equally many layers; each may be on a device.
        batches (`Iterable[Mapping[str, torch.Tensor]]`): Model inputs; gone through once, pixels are not kept.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, batches: Iterable[Mapping[str, Tensor]]):
        self.ours: Any = student.model.language_model
        self.theirs: Any = teacher.model.language_model
        self.rows = []
        for batch in batches:
            start, prompt = embed(teacher, batch)
            self.rows.append(Rows(prompt, start.cpu(), start.cpu()))
        if not self.rows:
            raise ValueError("calibration needs at least one batch")
        self.fitted, self.held_out = (self.rows[:-1] or self.rows), self.rows[-1]
        self.last = _run(self.theirs, self.held_out)

    def layers(self) -> Iterator[int]:
        """Yields every layer in turn, when all rows are before it and its mixer's outputs are known."""
        for rows in self.rows:
            rows.hidden = rows.start
        for layer, block in enumerate(self.theirs.layers):
            for rows in self.rows:
                hidden, *where = _prepare(self.theirs, [layer], rows.hidden, rows.prompt)
                rows.target = block(hidden, run=lambda b, h, where=where: b.mix(b.input_layernorm(h), *where)).cpu()
            yield layer
            for rows in self.rows:
                assert rows.target is not None
                hidden, target = (states.to(_device(self.theirs)) for states in (rows.hidden, rows.target))
                rows.hidden = block(hidden, run=lambda b, h, y=target: b.after_mixer(h, y)).cpu()
                rows.target = None

    def states(self, layer: int, batches: Sequence[Rows]) -> Iterator[LayerStates]:
        """Yields what the student's mixer of the layer that rows are at gets and should give, batch by batch."""
        block = self.ours.layers[layer]
        for rows in batches:
            assert rows.target is not None
            hidden, rope, layout, _ = _prepare(self.ours, [layer], rows.hidden, rows.prompt)
            mixer_input = block(hidden, run=lambda block, hidden: block.input_layernorm(hidden))
            yield LayerStates(mixer_input, rows.target.double().to(hidden.device), rope, layout)

    def path_error(self) -> float:
        """Returns the relative error of the student's last hidden states, on its own path, over held-out tokens."""
        ours, theirs = (last[self.held_out.real].double() for last in (_run(self.ours, self.held_out), self.last))
        return float((ours - theirs).square().sum() / theirs.square().sum())


def embed(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Prompt]:
    """Returns the embeddings `[b, t, d]` of a batch, features of its images and videos in place, and its prompt."""
    inner: Any = model.model
    device = _device(inner.language_model)
    values = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    prompt, media = Prompt.read_batch(inner, values)
    return inner.embed_prompt(prompt, inner.encode_media(media)), prompt


def _device(text: nn.Module) -> torch.device:
    return text.embed_tokens.weight.device


def _prepare(
    text: nn.Module, layers: Sequence[int], hidden: Tensor, prompt: Prompt
) -> tuple[Tensor, tuple[Tensor, Tensor], Any, dict[str, Any] | None]:
    """Hidden states where and as a decoder takes them, and the rotary tables, layout and attention of some layers."""
    hidden = hidden.to(_device(text), text.embed_tokens.weight.dtype)
    kinds = [text.config.layer_types[layer] for layer in layers]
    where = prompt.mask, prompt.positions, prompt.vision_layout
    return hidden, *text.prepare(hidden, *where, layer_types=kinds)


def _run(text: nn.Module, rows: Rows) -> Tensor:
    """Last hidden states `[b, t, d]` of a batch, after the final norm, on the CPU."""
    layers = range(len(text.layers))
    hidden, rope, layout, attention = _prepare(text, layers, rows.start, rows.prompt)
    for layer in layers:
        hidden = text.layers[layer](hidden, rope, layout, attention)[0]
    return text.norm(hidden).cpu()
