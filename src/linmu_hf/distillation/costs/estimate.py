"""`linmu-distill --estimate`: memory and time of every stage from configurations alone."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...modeling.mixers import recurrent_layers
from ..layerwise.layer_groups import freeze_others, layer_groups
from ..layerwise.offload import PLACES, always_there, passing, span
from ..stages import Stage, parameter_groups
from ..teacher import SharedTeacher
from .answers import count_answers
from .tracing import Shape, Trace, build_on_meta, build_student, trace_step, with_layers


GB = 10**9

# Memory in GB, dense bfloat16 TFLOPS and TB/s out of memory, as NVIDIA's data sheets have them.
GPUS = {
    "h200": (141, 989, 4.8),
    "h100": (80, 989, 3.35),
    "a100": (80, 312, 2.04),
    "a100-40": (40, 312, 1.56),
    "l40s": (48, 362, 0.86),
    "rtx4090": (24, 165, 1.01),
}
ENGINES = ("single", "ddp", "fsdp2", "zero2", "zero3")
SPREAD_WEIGHTS = ("fsdp2", "zero3")  # over all GPUs; `ddp` spreads nothing, `zero2` all else
WHOLE_WITH_ZERO3 = ("vision", "embeddings")  # which FSDP2 gathers for a step
ZERO_BUCKET = 5 * 10**8  # numbers that DeepSpeed reduces at once, by default
GROUPS = (32, 24, 16, 12, 8, 6, 4, 3, 2, 1)  # layers at a time that are tried

# Assumed, not measured: the share of the data sheet's rate that a step reaches, of its bandwidth that a decode step
# does, of a card's memory that CUDA, the allocator's gaps and communication leave, and the bytes per second that come
# out of CPU memory.
UTILISATION = 0.35
READING = 0.5
USABLE = 0.92
LINK = 25 * GB

NAMES = {
    "teacher": "teacher's pass and kept mixer outputs",
    "student": "activations of the student's pass",
    "block": "activations of one block",
    "logits": "logits",
    "backward": "backward pass",
    "optimizer": "Muon's steps",
    "other": "inputs and losses",
    "gradients": "gradients",
}


@dataclass(frozen=True)
class Machine:
    """
    The GPUs of an estimate, and the engine that uses them.

    Args:
        gpu (`str`): A key of `GPUS`.
        count (`int`, *optional*, defaults to 1): How many.
        engine (`str`, *optional*): One of `ENGINES`, by default `"single"` on one GPU and `"fsdp2"` on more.
    """

    gpu: str
    count: int = 1
    engine: str | None = None

    def __post_init__(self):
        if self.gpu not in GPUS:
            raise ValueError(f"gpu={self.gpu!r} is unknown: choose one of {', '.join(GPUS)}")
        if self.count < 1:
            raise ValueError(f"gpus={self.count} must be at least 1")
        if self.engine is None:
            object.__setattr__(self, "engine", "single" if self.count == 1 else "fsdp2")
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r} is unknown: choose one of {', '.join(ENGINES)}")
        if (self.engine == "single") != (self.count == 1):
            raise ValueError(f"engine={self.engine!r} does not go with gpus={self.count}: leave engine out")

    @property
    def budget(self) -> float:
        return GPUS[self.gpu][0] * GB * USABLE

    @property
    def rate(self) -> float:
        """Returns the multiplications and additions per second that are expected of each GPU."""
        return GPUS[self.gpu][1] * 1e12 * UTILISATION

    @property
    def bandwidth(self) -> float:
        """Returns the bytes per second that are expected to come out of a GPU's memory."""
        return GPUS[self.gpu][2] * 1e12 * READING


@dataclass(frozen=True)
class StageEstimate:
    """
    The estimated memory and time of a stage.

    Args:
        stage (`Stage`): The stage.
        trained (`int`): Parameters that train.
        memory (`dict[str, float]`): Bytes on each GPU by item, at the peak of a step.
        flops (`float`): Multiplications and additions of a micro-batch on each GPU.
        seconds (`float`): Of all its steps.
        host (`float`, *optional*, defaults to 0.0): Bytes in CPU memory, of a stage that keeps its model there.
    """

    stage: Stage
    trained: int
    memory: dict[str, float]
    flops: float
    seconds: float
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.memory.values())


def check_fits_teacher(student: Any, teacher: Any) -> None:
    """Raises a `ValueError` unless the student's decoder and vision side have the sizes of the teacher's."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    for name in names:
        ours, theirs = getattr(student.text_config, name), getattr(teacher.text_config, name)
        if ours != theirs:
            raise ValueError(
                f"--estimate takes a teacher of the student's size, but {name} is {ours} in the student and {theirs} "
                "in the teacher: leave --model out to estimate the student that linmu-convert would make"
            )


def count_parameters(student: Any, stage: Stage, shape: Shape) -> dict[str, Counter]:
    """
    Counts the parameters of student and teacher by part (`vision`, `embeddings`, `decoder`, `teacher`): those
    `"frozen"`, those that are `"trained"`, and of these the ones that [`Muon`] takes (`"matrices"`).
    """
    model = build_student(student, stage, shape.dtype)
    counts: dict[str, Counter] = {"frozen": Counter(), "trained": Counter(), "matrices": Counter()}

    def part(name: str) -> str:
        return "vision" if ".visual." in name else "decoder" if ".layers." in name else "embeddings"

    for name, parameter in model.named_parameters():
        counts["trained" if parameter.requires_grad else "frozen"][part(name)] += parameter.numel()
    if stage.muon:
        counts["matrices"]["decoder"] = _count_matrices(model)
    types = student.text_config.layer_types
    teacher = build_on_meta(teacher_config(student), shape.dtype)
    replaced = recurrent_layers(types)
    for index, layer in enumerate(teacher.model.language_model.layers):
        if shape.shared and index in replaced:
            counts["frozen"]["teacher"] += sum(p.numel() for p in layer.mixer.parameters())
    if not shape.shared:
        own = {name: p.numel() for name, p in teacher.named_parameters() if ".visual." not in name}
        counts["frozen"]["teacher"] += sum(own.values())
    return counts


def teacher_config(student: Any) -> Any:
    """Returns the configuration of a student's teacher."""
    depth = getattr(student.vision_config, "depth", None)
    config = with_layers(student, ["full_attention"] * len(student.text_config.layer_types))
    if depth is not None:
        config.vision_config.depth = depth
    return config


def estimate_stage(
    student: Any, stage: Stage, shape: Shape, machine: Machine, micro_batches: int = 1
) -> StageEstimate:
    """
    Estimates memory and time of a stage on each GPU.

    A step is run on tensors without data, see [`trace_step`]: what it holds is counted, not a formula's. The scan is
    that of plain PyTorch in pieces as on a GPU, whose own kernels hold less.

    Args:
        student (`LinMUConfig`): Configuration of the student.
        stage (`Stage`): The stage.
        shape (`Shape`): One GPU's micro-batch.
        machine (`Machine`): GPUs and engine.
        micro_batches (`int`, *optional*, defaults to 1): Of a step, one after the other on each GPU.
    """
    if stage.lmbda and machine.engine in SPREAD_WEIGHTS:
        raise ValueError(
            f"{stage.name}: lmbda={stage.lmbda} lets the student generate, which {machine.engine}, having taken it "
            "apart, cannot: give --engine ddp, or set lmbda=0"
        )
    if stage.muon and machine.engine in ("zero2", "zero3"):
        raise ValueError(f"{stage.name}: muon needs whole matrices, which ZeRO cuts up: give --engine fsdp2")
    if shape.layers and stage.hidden_input == "teacher":
        return _estimate_groups(student, stage, shape, machine, micro_batches)
    counts = count_parameters(student, stage, shape)
    trained, matrices = (counts[key].total() for key in ("trained", "matrices"))
    size = shape.dtype.itemsize
    trace = trace_step(student, stage, replace(shape, accumulates=micro_batches > 1))
    n, engine = machine.count, machine.engine
    weights = n if engine in SPREAD_WEIGHTS else 1
    states = 1 if engine in ("single", "ddp") else n
    memory: dict[str, float] = {
        f"frozen weights: {name}": count * size / (1 if engine == "zero3" and name in WHOLE_WITH_ZERO3 else weights)
        for name, count in counts["frozen"].items()
        if count
    }
    memory["trained weights"] = 4 * trained / weights
    if engine in ("zero2", "zero3"):
        memory["the optimizer's copy of weights"] = 4 * trained / states
    memory["optimizer states"] = (8 * trained - 4 * matrices) / states
    # A step fed by the teacher takes all gradients, whole, before an engine spreads them.
    memory |= _held(trace, states if stage.hidden_input == "student" else 1)
    if engine != "fsdp2" and n > 1:
        memory["buckets of gradients"] = 4 * (trained if engine == "ddp" else ZERO_BUCKET)
    if weights > 1:
        root = 0 if engine == "zero3" else sum(counts["frozen"][name] for name in WHOLE_WITH_ZERO3)
        layers = student.text_config.num_hidden_layers
        layer = (size * counts["frozen"]["decoder"] + 4 * counts["trained"]["decoder"]) / layers
        memory["gathered weights"] = root * size + 2 * layer
    vision = vision_flops(counts["frozen"]["vision"], shape)
    flops = trace.flops + trace.attention + vision + _unseen_logits(student, stage, shape)
    seconds = flops / machine.rate
    if stage.lmbda:
        text: Any = student.text_config
        read = size * (counts["frozen"]["decoder"] + text.vocab_size * text.hidden_size)
        read += 4 * counts["trained"]["decoder"]
        own = count_answers(text, stage, shape, vision, read, machine.rate, machine.bandwidth)
        flops, seconds = flops + own[0], seconds + own[1]
    return StageEstimate(stage, trained, memory, flops, stage.max_steps * micro_batches * seconds)


def _estimate_groups(student: Any, stage: Stage, shape: Shape, machine: Machine, micro_batches: int) -> StageEstimate:
    """Estimates a stage of a few layers at a time, as [`LayerOffload`] moves them; memory at its largest group."""
    assert shape.layers is not None
    model = build_student(student, stage, shape.dtype)
    full, types = build_on_meta(teacher_config(student), shape.dtype), student.text_config.layer_types
    attention = {index: full.model.language_model.layers[index].mixer for index in recurrent_layers(types)}
    teacher = SharedTeacher(model, attention, full.config)
    layers, (vision, *around) = model.model.language_model.layers, always_there(model)
    moving = [passing(layer, teacher) for layer in layers]
    places = PLACES * max(sum(map(span, tensors)) for tensors in moving)
    host = shape.dtype.itemsize * sum(p.numel() for p in (*model.parameters(), *teacher.parameters()))
    # pinned memory comes in powers of two
    host += sum((1 << (tensor.nbytes - 1).bit_length()) - tensor.nbytes for tensors in moving for tensor in tensors)

    groups, everything = layer_groups(model, shape.layers), _count_trained(model)
    traces = [_trace_group(student, stage, shape, group, micro_batches) for group in groups]
    flops = sum(trace.flops + trace.attention for trace in traces)
    flops += len(groups) * vision_flops(sum(p.numel() for p in vision.parameters()), shape)
    copied = sum(tensor.nbytes for group in groups for tensors in moving[: group[-1] + 1] for tensor in tensors)

    largest = max(range(len(groups)), key=lambda number: traces[number].at_peak().total())
    freeze_others(model, groups[largest])
    trained = _count_trained(model)
    mixers = [p for index in groups[largest] for p in layers[index].mixer.parameters()]
    memory = {
        "frozen weights: vision": sum(p.nbytes for p in vision.parameters()),
        "frozen weights: embeddings": sum(p.nbytes for module in around for p in module.parameters()),
        "frozen weights: mixers": sum(p.nbytes for p in mixers if not p.requires_grad),
        "two layers on their way": places,
        "trained weights": 4 * trained,
        "optimizer states": 8 * trained - 4 * (_count_matrices(model) if stage.muon else 0),
        **_held(traces[largest]),
    }
    seconds = stage.max_steps * micro_batches * max(flops / machine.rate, copied / LINK)
    host += memory["optimizer states"]  # a checkpoint that is being written
    return StageEstimate(stage, everything, memory, flops, seconds, host)


def _trace_group(student: Any, stage: Stage, shape: Shape, group: Sequence[int], micro_batches: int) -> Trace:
    """A step of a group of layers: all others before its last one are those of the teacher, and later ones not run."""
    types = student.text_config.layer_types
    own = [types[index] if index in group else "full_attention" for index in range(group[-1] + 1)]
    shape = replace(shape, layers=None, accumulates=micro_batches > 1)
    return trace_step(with_layers(student, own), stage, shape)


def _held(trace: Trace, gradient_shares: int = 1) -> dict[str, float]:
    """What a step holds at its peak, by item, the gradients being spread over so many GPUs."""
    return {
        NAMES.get(tag, tag): max(count, 0) / (gradient_shares if tag == "gradients" else 1)
        for tag, count in trace.at_peak().items()
        if count > 0.001 * GB or tag == "gradients"
    }


def _count_trained(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _count_matrices(model: Any) -> int:
    """Parameters that [`Muon`] takes as matrices."""
    groups = parameter_groups(model, 1.0, 0.0, 1.0, muon=True)
    return sum(p.numel() for group in groups if group["heads"] for p in group["params"])


def vision_flops(parameters: int, shape: Shape) -> float:
    """Returns the products of a vision tower that reads four patches for every vision token."""
    return 2.0 * parameters * 4 * shape.vision * shape.batch


def _unseen_logits(student: Any, stage: Stage, shape: Shape) -> float:
    """Products of the heads at the positions that a trace of few tokens leaves out."""
    text: Any = student.text_config
    seen = min(shape.answers, shape.batch * 1152)
    passes = 4 * bool(stage.tok or stage.seq or stage.sup) + bool(stage.tok)
    return 2.0 * (shape.answers - seen) * text.vocab_size * text.hidden_size * passes


def advise(
    student: Any, found: Sequence[StageEstimate], shape: Shape, machine: Machine, micro_batches: int
) -> list[str]:
    """Says for each stage that does not fit what to change, with what that would need."""
    lines = []
    for one in found:
        if one.total <= machine.budget:
            continue
        stage, options = one.stage, list[tuple[bool, str]]()

        def tried(text: str, stage: Stage = stage, shape: Shape = shape, machine: Machine = machine, options=options):
            total = estimate_stage(student, stage, shape, machine, micro_batches).total
            options.append((total <= machine.budget, f"{'and ' if options else ''}{text}: {total / GB:.0f} GB"))
            return total <= machine.budget

        better = shape
        if stage.hidden_input == "student" and not shape.checkpoints:
            better = replace(shape, checkpoints=True)
            tried("--gradient_checkpointing True", shape=better)
        if shape.batch > 1:
            better = replace(better, batch=1)
            tried("--per_device_train_batch_size 1", shape=better)
        if not shape.half:
            better = replace(better, half=True)
            tried("--bf16 True", shape=better)
        if stage.hidden_input == "teacher" and shape.shared and machine.count == 1:
            size = _largest_group(student, stage, better, machine, micro_batches)
            if size is not None:
                tried(f"--layers_at_a_time {size}", shape=replace(better, layers=size))
        for count in (2, 4, 8, 16, 32):
            if any(fits for fits, _ in options) or count <= machine.count or stage.lmbda:
                continue
            other = Machine(machine.gpu, count, "fsdp2")
            tried(f"FSDP2 over {count} GPUs", shape=replace(better, layers=None), machine=other)
        if stage.hid and not stage.lora_r and stage.hidden_input == "student":
            options.append((False, "or a first stage of `hid` alone with hidden_input: teacher"))
        lines.append(f"{stage.name} does not fit: " + "; ".join(text for _, text in options))
    return lines


def _largest_group(student: Any, stage: Stage, shape: Shape, machine: Machine, micro_batches: int) -> int | None:
    """The most layers at a time, of those that are tried, with which a stage fits; `None` if it does with none."""
    for size in GROUPS:
        if size < (shape.layers or student.text_config.num_hidden_layers):
            found = estimate_stage(student, stage, replace(shape, layers=size), machine, micro_batches)
            if found.total <= machine.budget:
                return size
    return None


def format_estimates(found: Sequence[StageEstimate], machine: Machine) -> str:
    """Returns a table in Markdown: items by stage in GB for each GPU, whether they fit, and hours."""
    items: list[str] = []
    for one in found:
        items += [name for name in one.memory if name not in items]
    rows = [["GB on each GPU", *(one.stage.name for one in found)]]
    for name in items:
        rows.append([name, *(f"{one.memory[name] / GB:.1f}" if name in one.memory else "-" for one in found)])
    rows.append(["**peak**", *(f"**{one.total / GB:.1f}**" for one in found)])
    fits = f"fits into {machine.budget / GB:.0f} of {GPUS[machine.gpu][0]} GB"
    rows.append([fits, *("yes" if one.total <= machine.budget else "no" for one in found)])
    if any(one.host for one in found):
        rows.append(["GB of CPU memory", *(f"{one.host / GB:.1f}" if one.host else "-" for one in found)])
    rows.append(["trained parameters", *(f"{one.trained / 1e9:.2f} B" for one in found)])
    rows.append(["TFLOP of a micro-batch", *(f"{one.flops / 1e12:.0f}" for one in found)])
    rows.append(["steps", *(f"{one.stage.max_steps:,}" for one in found)])
    rows.append(["hours", *(f"{one.seconds / 3600:.0f}" for one in found)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|" + "---:|" * len(found), *lines[1:]])


def describe(shape: Shape, machine: Machine, stages: Sequence[Stage] = ()) -> str:
    """Says what an estimate is of, and what it assumes."""
    extra = ", gradient checkpointing" if shape.checkpoints else ""
    extra += f", teacher-fed stages {shape.layers} layers at a time" if shape.layers else ""
    own = ""
    if any(stage.lmbda for stage in stages):
        read = f"{READING:.0%} of {GPUS[machine.gpu][2]} TB/s"
        own = f", {read} while {shape.completion} tokens of an answer are decoded"
    link = f", {LINK / GB:.0f} GB/s out of CPU memory while layers run" if shape.layers else ""
    return (
        f"{machine.count} {machine.gpu}, {machine.engine}; micro-batches of {shape.batch} x {shape.sequence_length:,} "
        f"tokens, {shape.vision_share:.0%} of them vision and {shape.answer_share:.1%} answers, in "
        f"{'bfloat16' if shape.half else 'float32'}{extra}; GB are 10^9 bytes.\n"
        f"Assumed: {UTILISATION:.0%} of {GPUS[machine.gpu][1]} TFLOPS{link}{own}, nothing for communication and for "
        f"the teacher's answers; {1 - USABLE:.0%} of memory for CUDA and gaps."
    )
