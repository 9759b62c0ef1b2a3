"""Layers that come to the device for the teacher's pass: the same figures, few layers at a time, none left behind."""

import types

import pytest
import torch

from linmu_hf.distillation.layerwise import offload as offload_module
from linmu_hf.distillation.layerwise.layer_groups import freeze_others
from linmu_hf.distillation.layerwise.offload import PLACES, LayerOffload, OverlappingOffload, always_there, passing
from linmu_hf.distillation.model import DistillationModel
from linmu_hf.distillation.stages import FLEX, Stage, set_trainable

from ...helpers.training_memory import build, student_config, video_batch


pytestmark = pytest.mark.core_training

STAGE = Stage("align", trains=(FLEX,), max_steps=1, learning_rate=1e-3, hid=0.1, hidden_input="teacher")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts():
    """Student and teacher of six layers, of which the third keeps its attention."""
    config = student_config(layers=6, hidden_size=128, intermediate_size=96)
    config.text_config.layer_types[2] = "full_attention"
    model = build(config, STAGE, shared=True, checkpoints=False)
    return model.student, model.teacher


def step(student, teacher, group):
    """Loss and gradients of a step, the layers of `group` alone being compared."""
    set_trainable(student, STAGE)
    freeze_others(student, group)
    batch = video_batch(96, 64, 8)
    batch.pop("pseudo_labels")
    model = DistillationModel(student, teacher, STAGE, layers=group).train()
    loss, _ = model(batch, torch.tensor([96, 8, 8]))
    student.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def homes(student, teacher):
    return set().union(*(pointers(layer, teacher) for layer in layers_of(student)))


def layers_of(student):
    return student.model.language_model.layers


@pytest.mark.parametrize("group", [[0], [1, 3], [4, 5]], ids=str)
def test_a_step_is_the_same_with_one_layer_at_a_time_on_the_device(parts, group):
    student, teacher = parts
    expected = step(student, teacher, group)
    at_home, running, seen = homes(student, teacher), [], []

    def enter(layer, args):
        running.append(layer.layer_idx)
        away = [i for i, one in enumerate(layers_of(student)) if not at_home & pointers(one, teacher)]
        partly = [i for i, one in enumerate(layers_of(student)) if not at_home >= pointers(one, teacher)]
        seen.append((layer.layer_idx, away, partly))

    with LayerOffload(student, teacher, CPU).active() as offload, offload.training(group):
        hooks = [layer.register_forward_pre_hook(enter) for layer in layers_of(student)]
        loss, gradients = step(student, teacher, group)
        for hook in hooks:
            hook.remove()
    # in every layer's call this one is on the device, whole, and no other; the pass ends with the group
    assert seen == [(index, [index], [index]) for index in range(group[-1] + 1)]
    assert loss == expected[0] and gradients.keys() == expected[1].keys()
    assert all(torch.equal(gradient, expected[1][name]) for name, gradient in gradients.items())
    assert homes(student, teacher) == at_home
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers_of(student))


def pointers(layer, teacher):
    return {tensor.data_ptr() for tensor in passing(layer, teacher)}


def test_what_a_step_reads_is_there(parts):
    """All else may be lost meanwhile: the head, other mixers, and layers in CPU memory once they were copied."""
    student, teacher = parts
    expected, group = step(student, teacher, [3, 4]), [3, 4]
    kept = {id(p) for module in always_there(student) for p in module.parameters()}
    kept |= {id(p) for index in group for p in layers_of(student)[index].mixer.parameters()}
    lost = {}

    class Losing(LayerOffload):
        def _fetch(self, index):
            for home, value in zip(self.homes[index], lost[index], strict=True):
                home.copy_(value)
            super()._fetch(index)
            for home in self.homes[index]:
                home.fill_(torch.nan)

    with Losing(student, teacher, CPU).active() as offload, offload.training(group), torch.no_grad():
        for index, home in enumerate(offload.homes):
            lost[index] = [tensor.clone() for tensor in home]
        others = [p for p in student.parameters() if id(p) not in kept]
        saved = [p.detach().clone() for p in others]
        for parameter in (*others, *teacher.parameters()):
            parameter.fill_(torch.nan)
        with torch.enable_grad():
            loss, gradients = step(student, teacher, group)
        for parameter, value in zip(others, saved, strict=True):
            parameter.copy_(value)
        for home, values in zip(offload.homes, lost.values(), strict=True):
            for tensor, value in zip(home, values, strict=True):
                tensor.copy_(value)
    assert loss == expected[0]
    assert all(torch.equal(gradient, expected[1][name]) for name, gradient in gradients.items())


def test_an_error_within_a_layer_leaves_all_in_its_place(parts, monkeypatch):
    student, teacher = parts
    at_home = homes(student, teacher)
    with (
        pytest.raises(ZeroDivisionError),
        LayerOffload(student, teacher, CPU).active() as offload,
        offload.training([3]),
        monkeypatch.context() as patch,
    ):
        patch.setattr(type(layers_of(student)[1]), "after_mixer", lambda *_: 1 / 0)
        step(student, teacher, [3])
    assert homes(student, teacher) == at_home


def test_a_wrapped_model_of_some_layers_is_not_moved(parts):
    student, teacher = parts
    assert DistillationModel(student, teacher, STAGE, layers=[1]).to(torch.float64).student.dtype == torch.float32
    assert DistillationModel(student, teacher, STAGE).moves


# ---- Copies on a stream of their own: who waits for whom


class Stream:
    """Knows the operations that have ended before what is given to it next: its own and those it waited for."""

    def __init__(self, device=None):
        self.done = set()

    def wait_event(self, event):
        self.done |= event.done

    def wait_stream(self, stream):
        self.done |= stream.done

    def __enter__(self):
        Stream.current, self.before = self, Stream.current

    def __exit__(self, *_):
        Stream.current = self.before


class Event:
    done = frozenset()

    def record(self, stream):
        self.done = frozenset(stream.done)


@pytest.fixture
def streams(monkeypatch):
    Stream.current = Stream()
    fakes = {"Stream": Stream, "Event": Event, "current_stream": lambda device: Stream.current, "stream": lambda s: s}
    monkeypatch.setattr(offload_module.torch, "cuda", types.SimpleNamespace(**fakes))


class Watched(OverlappingOffload):
    """Notes every copy into a place and every use of one, and checks that they have waited for each other."""

    def __init__(self, *args):
        super().__init__(*args)
        self.uses, self.copied, self.overlaps = [set() for _ in range(PLACES)], {}, 0

    def _fetch(self, index):
        super()._fetch(index)
        # the copy was given to the stream between its wait and its record, so what it knew then it knows now
        assert self.uses[index % PLACES] <= self.stream.done, f"layer {index} is written over one that may still run"

    def use(self, index):
        operation = object()
        assert self.copied[index] in Stream.current.done, f"layer {index} may run before it is there"
        self.overlaps += self.copied.get(index + 1) is not None and self.copied[index + 1] not in Stream.current.done
        Stream.current.done.add(operation)
        self.uses[index % PLACES].add(operation)

    def _views(self, index):
        if Stream.current is self.stream:
            self.copied[index] = object()
            self.stream.done.add(self.copied[index])
        return super()._views(index)


def test_copies_and_layers_wait_for_each_other_and_overlap(parts, streams):
    student, teacher = parts
    offload = Watched(student, teacher, CPU)
    with offload.active(), offload.training([4, 5]):
        for layer in layers_of(student):
            layer.register_forward_hook(lambda layer, *_: offload.use(layer.layer_idx), prepend=True)
        for _ in range(3):
            step(student, teacher, [4, 5])
    assert offload.overlaps == 3 * 5  # with every layer but the first
    for layer in layers_of(student):
        layer._forward_hooks.clear()
