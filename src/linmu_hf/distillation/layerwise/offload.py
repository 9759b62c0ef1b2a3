"""A model in CPU memory whose layers come to the device one by one, as the teacher's pass reaches them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..teacher import SharedTeacher


PLACES = 2  # on the device: one layer runs while the next one arrives
ALIGNMENT = 256  # bytes


class LayerOffload:
    """
    Student and teacher in CPU memory within [`active`], and on the device only what a teacher-fed step needs: what
    every pass reads, see [`always_there`], and in two places in turn what the teacher's pass reads of a layer, see
    [`passing`]. M-MATE mixers are there where [`training`] asks for them.

    Nothing depends on the kind of device, which may be the CPU itself; [`OverlappingOffload`] is for CUDA.

    Args:
        student (`LinMUForConditionalGeneration`): The student, without adapters.
        teacher (`SharedTeacher`): The teacher on its backbone.
        device (`torch.device`): Where steps run.
    """

    def __init__(self, student: Any, teacher: SharedTeacher, device: torch.device):
        self.student, self.teacher, self.device = student, teacher, device
        self.layers = student.model.language_model.layers
        self.tensors = [passing(layer, teacher) for layer in self.layers]
        self.last = len(self.layers) - 1  # layer of a pass

    @contextmanager
    def active(self) -> Iterator["LayerOffload"]:
        """Brings everything to where it belongs, and back into CPU memory at the end."""
        self._bring_home()
        if self.device.type == "cuda":
            for tensor in chain.from_iterable(self.tensors):
                tensor.data = tensor.data.pin_memory()
        for module in always_there(self.student):
            module.to(self.device)
        self.homes = [[tensor.data for tensor in tensors] for tensors in self.tensors]
        size = max(sum(map(span, home)) for home in self.homes)
        self.places = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(PLACES)]
        self.held: list[int | None] = [None] * PLACES
        hooks = [hook for layer in self.layers for hook in self._hook(layer)]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()
            for index, home in enumerate(self.homes):
                self._point(index, home)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # the last copy ends before its place is given back
            del self.places, self.homes
            self._bring_home()

    @contextmanager
    def training(self, group: Sequence[int]) -> Iterator[None]:
        """Keeps the mixers of a group of layers on the device; passes end with the last of these layers."""
        self.last = group[-1]
        for index in group:
            self.layers[index].mixer.to(self.device)
        try:
            yield
        finally:
            for index in group:
                self.layers[index].mixer.cpu()

    def _bring_home(self) -> None:
        self.student.cpu()
        self.teacher.cpu()

    def _hook(self, layer: nn.Module) -> list[Any]:
        return [
            layer.register_forward_pre_hook(lambda layer, _: self._arrive(layer.layer_idx)),
            layer.register_forward_hook(lambda layer, *_: self._leave(layer.layer_idx), always_call=True),
        ]

    def _arrive(self, index: int) -> None:
        if self.held[index % PLACES] != index:
            self._fetch(index)
        self._point(index, self._views(index))
        if index < self.last and self.held[(index + 1) % PLACES] != index + 1:
            self._fetch(index + 1)

    def _leave(self, index: int) -> None:
        self._point(index, self.homes[index])

    def _fetch(self, index: int) -> None:
        for view, home in zip(self._views(index), self.homes[index], strict=True):
            view.copy_(home, non_blocking=True)
        self.held[index % PLACES] = index

    def _point(self, index: int, values: Sequence[Tensor]) -> None:
        for tensor, value in zip(self.tensors[index], values, strict=True):
            tensor.data = value

    def _views(self, index: int) -> list[Tensor]:
        """The parts of its place that hold what the pass reads of a layer."""
        place, views, start = self.places[index % PLACES], [], 0
        for home in self.homes[index]:
            views.append(place[start : start + home.nbytes].view(home.dtype).view(home.shape))
            start += span(home)
        return views


class OverlappingOffload(LayerOffload):
    """
    An offload that copies a layer out of pinned memory while the one before it runs: on a stream of its own, which
    waits until a place has been left, as a layer waits until its own place is filled.
    """

    def __init__(self, student: Any, teacher: SharedTeacher, device: torch.device):
        super().__init__(student, teacher, device)
        self.stream = torch.cuda.Stream(device)
        self.filled, self.left = ([torch.cuda.Event() for _ in range(PLACES)] for _ in range(2))

    @contextmanager
    def active(self) -> Iterator[LayerOffload]:
        with super().active():
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # the places' memory was in use before
            yield self

    def _arrive(self, index: int) -> None:
        super()._arrive(index)
        torch.cuda.current_stream(self.device).wait_event(self.filled[index % PLACES])

    def _leave(self, index: int) -> None:
        super()._leave(index)
        self.left[index % PLACES].record(torch.cuda.current_stream(self.device))

    def _fetch(self, index: int) -> None:
        self.stream.wait_event(self.left[index % PLACES])
        with torch.cuda.stream(self.stream):
            super()._fetch(index)
        self.filled[index % PLACES].record(self.stream)


def open_offload(student: Any, teacher: SharedTeacher, device: torch.device) -> LayerOffload:
    """Returns what keeps a model in CPU memory for steps on a device."""
    kind = OverlappingOffload if device.type == "cuda" else LayerOffload
    return kind(student, teacher, device)


def always_there(student: Any) -> tuple[nn.Module, ...]:
    """Returns what every teacher-fed step reads of a student: all around the decoder's layers but the head."""
    text = student.model.language_model
    return student.model.visual, text.embed_tokens, text.rotary_emb, text.norm


def passing(layer: Any, teacher: SharedTeacher) -> list[Tensor]:
    """Returns the tensors that the teacher's pass reads of a layer: its norms and MLP, and the teacher's attention."""
    attention = teacher.attention[str(layer.layer_idx)] if layer.recurrent else layer.mixer
    modules = (layer.input_layernorm, attention, layer.post_attention_layernorm, layer.mlp)
    return [tensor for module in modules for tensor in chain(module.parameters(), module.buffers())]


def span(tensor: Tensor) -> int:
    """Returns the bytes that a tensor takes of a place."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
