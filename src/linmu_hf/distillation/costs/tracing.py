"""What a training step holds and multiplies, found by running it on tensors without data."""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.initialization import no_init_weights

from ...modeling.compat import checkpoint_activations
from ...modeling.layout.prompt import Prompt
from ...modeling.layout.token_layout import TokenLayout
from ...modeling.mixers import recurrent_layers
from ...modeling.modeling_linmu import LinMUForConditionalGeneration
from ...ops.ssd import plain
from ..lora import add_lora
from ..model import DistillationModel
from ..muon import Muon
from ..stages import LOSSES, Stage, parameter_groups, set_trainable
from ..teacher import Given, SeparateTeacher, SharedTeacher
from .accounting import Account


# Layers of the decoders that are run: more than one, for the first reads the embeddings themselves, and two apart, for
# every other layer shifts its windows.
FEW, MORE = 2, 4
ATTENTION = 2  # that keep attention

# Text and vision tokens that are run in place of more: once the windows of all branches are full, memory grows in
# proportion to both. Full attention is counted by the square of the length.
TEXT, VISION = 640, 512

GIVEN = "given"  # held before the step


@dataclass(frozen=True)
class Shape:
    """
    The size of a micro-batch and how a step runs.

    Args:
        sequence_length (`int`): Tokens of a sequence.
        batch (`int`, *optional*, defaults to 1): Sequences of a micro-batch.
        vision_share (`float`, *optional*, defaults to 0.75): Share of vision tokens, those of one video.
        answer_share (`float`, *optional*, defaults to 0.125): Share of tokens that the losses on the logits count.
        on_gpu (`bool`, *optional*, defaults to `True`): Whether the scan takes pieces as on a GPU.
        half (`bool`, *optional*, defaults to `True`): bfloat16: frozen weights, and products by autocast.
        shared (`bool`, *optional*, defaults to `True`): One backbone, see [`SharedTeacher`].
        checkpoints (`bool`, *optional*, defaults to `False`): Gradient checkpointing.
        accumulates (`bool`, *optional*, defaults to `False`): Gradients of earlier micro-batches are there.
        logits_chunk_size (`int`, *optional*, defaults to 1024): As in [`DistillConfig`].
        layers (`int`, *optional*): Its `layers_at_a_time`.
        completion (`int`, *optional*, defaults to 128): Its `max_completion_length`.
    """

    sequence_length: int
    batch: int = 1
    vision_share: float = 0.75
    answer_share: float = 0.125
    on_gpu: bool = True
    half: bool = True
    shared: bool = True
    checkpoints: bool = False
    accumulates: bool = False
    logits_chunk_size: int = 1024
    layers: int | None = None
    completion: int = 128

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence_length

    @property
    def vision(self) -> int:
        """Returns the vision tokens of a sequence, in whole frames of 4 x 4."""
        return int(self.sequence_length * self.vision_share) // 16 * 16

    @property
    def answers(self) -> int:
        """Returns the tokens of a micro-batch that losses on the logits count."""
        return max(int(self.tokens * self.answer_share), 1)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.half else torch.float32


@dataclass(frozen=True)
class Trace:
    """
    The memory and the multiplications of a training step.

    Args:
        peaks (`dict[str, Counter]`): Of every part of a step, the bytes held by tag when it held most; without
            parameters and optimizer states.
        flops (`float`): Multiplications and additions of the step, those of the vision side left out.
        attention (`float`): Those of causal attention, which `flops` does not hold.
    """

    peaks: dict[str, Counter]
    flops: float
    attention: float

    def at_peak(self) -> Counter:
        """Returns what is held at the step's peak, by tag."""
        return max(self.peaks.values(), key=lambda held: held.total())

    def plus(self, other: "Trace", times: float) -> "Trace":
        """Returns the sum of this trace and `times` another one."""
        peaks = {}
        for part in self.peaks.keys() | other.peaks.keys():
            one, two = self.peaks.get(part, Counter()), other.peaks.get(part, Counter())
            peaks[part] = Counter({tag: one[tag] + times * two[tag] for tag in one.keys() | two.keys()})
        return Trace(peaks, self.flops + times * other.flops, self.attention + times * other.attention)


def build_on_meta(config: Any, dtype: torch.dtype = torch.float32) -> LinMUForConditionalGeneration:
    """Builds a model without values."""
    with no_init_weights(), torch.device("meta"):
        return LinMUForConditionalGeneration._from_config(copy.deepcopy(config), dtype=dtype)


def build_student(config: Any, stage: Stage, dtype: torch.dtype) -> LinMUForConditionalGeneration:
    """Builds a student without values as a stage trains it: adapters in place, and what trains in float32."""
    with torch.device("meta"):
        student = build_on_meta(config, dtype)
        prepare_student(student, stage)
    return student


def prepare_student(student: LinMUForConditionalGeneration, stage: Stage) -> None:
    """Puts a stage's adapters in place, and what it trains into float32."""
    if stage.lora_r:
        add_lora(student, stage.lora_r, stage.alpha())
    set_trainable(student, stage)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def fill(model: Any) -> Any:
    """Puts tensors of a `FakeTensorMode`, on a device where they run, in the place of those of the meta device."""
    known: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None and value not in known:
                new = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                known[value] = nn.Parameter(new, requires_grad=value.requires_grad)
            module._parameters[name] = None if value is None else known[value]
        for name, value in module._buffers.items():
            module._buffers[name] = None if value is None else torch.empty(value.shape, dtype=value.dtype)
    return model


def with_layers(config: Any, layer_types: list[str]) -> Any:
    """Returns the same configuration with other layers, and a vision tower of one layer where it knows depths."""
    config = copy.deepcopy(config)
    text: Any = config.text_config
    text.num_hidden_layers, text.layer_types = len(layer_types), layer_types
    if hasattr(config.vision_config, "depth"):
        config.vision_config.depth = 1
    return config


def trace_step(student: Any, stage: Stage, shape: Shape) -> Trace:
    """
    Counts a training step of a student: every kind of layer is run a few times, and taken as often as it is there.

    Args:
        student (`LinMUConfig`): Configuration of the student; the teacher has attention in every layer.
        stage (`Stage`): What trains, and on which losses.
        shape (`Shape`): The micro-batch.
    """
    length, vision = shape.sequence_length, shape.vision
    text = length - vision
    few_text, few_vision = min(text, TEXT), min(vision, VISION)
    trace = base = _trace(student, stage, shape, few_text, few_vision)
    if vision > few_vision:
        more = _trace(student, stage, shape, few_text, 2 * few_vision)
        trace = trace.plus(more.plus(base, -1), (vision - few_vision) / few_vision)
    if text > few_text:
        more = _trace(student, stage, shape, 2 * few_text, few_vision)
        trace = trace.plus(more.plus(base, -1), (text - few_text) / few_text)
    return replace(trace, attention=base.attention * (length / (few_text + few_vision)) ** 2)


def _trace(student: Any, stage: Stage, shape: Shape, text: int, vision: int) -> Trace:
    types = student.text_config.layer_types
    recurrent = [types[index] for index in recurrent_layers(types)]
    kept = len(types) - len(recurrent)
    # what a step holds and multiplies depends on nothing else of a stage; `_run` remembers steps
    losses: dict[str, Any] = {name: float(getattr(stage, name) > 0) for name in LOSSES}
    stage = Stage(
        "any", stage.trains, 1, 1.0, **losses, lora_r=stage.lora_r, muon=stage.muon, hidden_input=stage.hidden_input,
        beta=stage.beta,
    )  # fmt: skip

    def run(*layers: str) -> Trace:
        return _run(_Key(with_layers(student, list(layers))), stage, shape, text, vision)

    few = run(*(recurrent[:1] * FEW))
    more = run(*(recurrent[:1] * MORE))
    trace = more.plus(more.plus(few, -1), (len(recurrent) - MORE) / (MORE - FEW))
    if kept:
        # In front, for a step fed by the teacher ends with the last replaced layer; and two, as above.
        attention = run(*(["full_attention"] * ATTENTION), *(recurrent[:1] * FEW))
        trace = trace.plus(attention.plus(few, -1), kept / ATTENTION)
    return trace


class _Key:
    """A configuration that is equal to another one of the same values."""

    def __init__(self, config: Any):
        self.config, self.text = config, config.to_json_string()

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other) -> bool:
        return self.text == other.text


@cache
def _run(key: _Key, stage: Stage, shape: Shape, text_tokens: int, vision_tokens: int) -> Trace:
    config = key.config
    text: Any = config.text_config
    b, t = shape.batch, text_tokens + vision_tokens
    vision_layout = one_video(text_tokens, vision_tokens).expand(b, -1, -1)
    layout = TokenLayout.build(text, b, t, torch.device("cpu"), None, vision_layout, None, None)
    account = Account()
    student = build_student(config, stage, shape.dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), _pieces(shape.on_gpu):
        fill(student)
        if shape.checkpoints:
            checkpoint_activations(student)
        embeds = torch.empty(b, t, text.hidden_size, dtype=shape.dtype)
        prompt = Prompt(positions=torch.zeros(3, b, t, dtype=torch.long), vision_layout=vision_layout)
        teacher = _teacher(student, config, shape, embeds)
        model = _Step(student, teacher, stage, shape, prompt, embeds, layout).train()
        for module in (student, teacher):
            for tensor in (*module.parameters(), *module.buffers(), embeds, prompt.positions):
                account.hold(tensor, GIVEN)
        account.tag_gradients(student)
        account.tag_calls(teacher, "forward", "teacher")
        account.tag_calls(student.model.language_model, "forward", "student")
        for layer in student.model.language_model.layers if stage.hidden_input == "teacher" else ():
            account.tag_calls(layer, "mix", "block")
        account.tag_calls(model, "_output_losses", "logits")
        counts = torch.full((3,), shape.tokens)
        with _Positions(min(shape.answers, b * t)), account:
            labels = {"labels": torch.zeros(b, t, dtype=torch.long)}
            if stage.seq:
                labels["pseudo_labels"] = labels["labels"]
            for _ in range(1 + shape.accumulates):
                account.flops = account.attention = 0
                with torch.autocast("cpu", torch.bfloat16, enabled=shape.half):
                    loss, _ = model(labels, counts)
                with account.tagged("backward"):
                    loss.backward()
                del loss
            if stage.muon:
                _step_muon(student, account)
        peaks = {part: Counter({k: v for k, v in held.items() if k != GIVEN}) for part, held in account.peaks.items()}
        peaks.pop(GIVEN, None)
        return Trace(peaks, account.flops, account.attention)


@contextmanager
def _pieces(on_gpu: bool) -> Iterator[None]:
    """Lets the plain scan work through whole superchunks, as it does where no cache is to be filled."""
    before = plain.CACHE_BYTES
    plain.CACHE_BYTES = 2**60 if on_gpu else before
    try:
        yield
    finally:
        plain.CACHE_BYTES = before


def _step_muon(student: nn.Module, account: Account) -> None:
    """Takes the steps of all matrices, which need memory of their own; their states are counted elsewhere."""
    groups = parameter_groups(student, 1e-3, 0.0, 1.0, muon=True)
    optimizer = Muon(groups, lr=1e-3)
    for group in groups:
        for parameter in group["params"] if group["heads"] else ():
            optimizer.state[parameter] = {"step": torch.tensor(0.0), "exp_avg": torch.empty_like(parameter)}
    with account.tagged("optimizer"), torch.no_grad():
        for group in optimizer.param_groups:
            if group["heads"]:
                optimizer._step_matrices(group)


def _teacher(student, config: Any, shape: Shape, embeds: Tensor):
    types = config.text_config.layer_types
    full = fill(build_on_meta(with_layers(config, ["full_attention"] * len(types)), shape.dtype))
    if shape.shared:
        layers = full.model.language_model.layers
        return SharedTeacher(student, {index: layers[index].mixer for index in recurrent_layers(types)}, full.config)
    full.model.embed_prompt = lambda *_: embeds.clone()
    return SeparateTeacher(full, shares_vision=True)


class _Step(DistillationModel):
    """A step on a prompt that has been read."""

    def __init__(self, student, teacher, stage: Stage, shape: Shape, prompt: Prompt, embeds: Tensor, layout):
        super().__init__(student, teacher, stage, 1.0, shape.logits_chunk_size, shape.checkpoints)
        text = student.model.language_model
        own = text.prepare

        def prepare(embeds, mask, positions, vision_layout, *args, **kwargs):
            rope, _, attention = own(embeds, mask, positions, None, *args, layer_types=["full_attention"])
            return rope, layout, attention

        text.prepare = prepare
        self.given = prompt, embeds

    def _read(self, inputs):
        prompt, embeds = self.given
        embeds = embeds.clone()
        if self.checkpoints and self.training:
            embeds = embeds.requires_grad_()
        return Given(prompt, embeds.detach()), embeds


class _Positions(TorchDispatchMode):
    """Lets boolean masks choose the first `count` positions: what they hold is not known."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            return args[0].flatten(0, args[1][0].ndim - 1)[: self.count].clone()
        return func(*args, **kwargs or {})


def one_video(text: int, vision: int) -> Tensor:
    """Returns the vision layout [1, t, 4] of text before a video with frames of 4 x 4 tokens."""
    layout = torch.full((text + vision, 4), -1)
    if vision:
        axes = (torch.zeros(1, dtype=torch.long), torch.arange(vision // 16), torch.arange(4), torch.arange(4))
        layout[text:] = torch.cartesian_prod(*axes)
    return layout[None]
