"""The recipe and its measurements as values: which steps, for how long, and how much is measured."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from linmu_hf.distillation.stages import FLEX, SWIN


@dataclass(frozen=True)
class Calibrate:
    """
    Lambda, the scan (`scan_steps` of Adam in each layer) and the output maps, see `linmu_hf.conversion.calibrate`.

    Args:
        name (`str`): of the step, and of the folder that it leaves.
        batches, batch_size, length (`int`): rows to fit to; the last batch is held out.
        strength, max_growth (`float`), scan_steps (`int`): as in `calibrate`.
    """

    name: str
    batches: int = 5
    batch_size: int = 2
    length: int = 512
    strength: float = 0.1
    max_growth: float = 1.5
    scan_steps: int = 0


@dataclass(frozen=True)
class Train:
    """
    Optimizer steps, see `train.py`.

    Args:
        name (`str`): of the step, and of the folder that it leaves.
        steps, batch_size, length (`int`): optimizer steps, rows of one step, and tokens of a row.
        learning_rate, warmup (`float`): peak of the cosine, and the share of the steps that lead up to it.
        fed (`"student"` or `"teacher"`): what every block is fed with. With `"teacher"` only `hidden` counts.
        kl (`float`): weight of KL(teacher || student) of the logits, per token.
        hidden (`float`): weight of the relative squared error of the mixer outputs, mean over layers, without the
            first token of a row, whose states are a hundred times as large as all others.
        trains (`tuple[str, ...]`): regular expressions; a parameter trains if one is found in its name.
        weight_decay, max_grad_norm, slow_lr_multiplier (`float`): as in `DistillConfig`.
        muon (`bool`): Muon for the matrices, as in `Stage`.
        checkpoint_steps (`int`): a run that is killed loses so many steps at most.
    """

    name: str
    steps: int
    batch_size: int = 2
    length: int = 512
    learning_rate: float = 1e-4  # at 5e-4 the first steps destroy what the teacher's maps know
    warmup: float = 0.1
    fed: Literal["student", "teacher"] = "student"
    kl: float = 1.0
    hidden: float = 0.0
    trains: tuple[str, ...] = (FLEX, SWIN)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    slow_lr_multiplier: float = 0.2
    muon: bool = False
    checkpoint_steps: int = 20

    def __post_init__(self):
        if self.fed not in ("student", "teacher"):
            raise ValueError(f"{self.name}: fed={self.fed!r} must be 'student' or 'teacher'")
        if self.fed == "teacher" and not self.hidden:
            raise ValueError(f"{self.name}: fed='teacher' needs a weight of `hidden`, the only loss that it has")
        if min(self.steps, self.batch_size, self.checkpoint_steps) < 1 or self.length < 2:
            raise ValueError(
                f"{self.name}: steps, batch_size and checkpoint_steps must be positive, length at least 2"
            )


Step = Calibrate | Train


@dataclass(frozen=True)
class Settings:
    """
    What a run does and measures.

    Args:
        steps (`tuple[Step, ...]`): after the conversion; the last one is called `final`.
        rows, length (`int`): held-out rows to compare teacher and student on, and their tokens.
        questions (`int`): of the recall, for each distance.
        preset, keep_attention, mixer_options: as in `linmu_hf.conversion.convert`.
    """

    steps: tuple[Step, ...]
    rows: int
    length: int
    questions: int
    preset: str = "default"
    keep_attention: tuple[int, ...] | str = ()
    mixer_options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        names = [step.name for step in self.steps]
        if len(set(names)) < len(names) or not names or names[-1] != "final":
            raise ValueError(f"the steps {names} must have names of their own, and the last must be called 'final'")
        taken = {"teacher", "conversion", "text", "downloads", "figures"} & set(names)
        if taken:
            raise ValueError(f"{sorted(taken)} are folders of the run: give these steps other names")

    def to_dict(self) -> dict[str, Any]:
        kinds = {Calibrate: "calibrate", Train: "train"}
        steps = [{"kind": kinds[type(step)], **asdict(step)} for step in self.steps]
        return {**asdict(self), "steps": steps, "mixer_options": dict(self.mixer_options)}


# What the scan reads and how it is joined: the little that a converted model has to learn first.
STEERED = (r"_features$", r"fusion_proj", r"A_log|dt_bias")
CALIBRATION = Calibrate("calibration", batches=7, batch_size=1, length=1024)
# With so strong a pull the output projections stay the teacher's: what is in the window is exact as it is.
SCAN_CALIBRATION = replace(CALIBRATION, batches=17, scan_steps=60, strength=1e9)
FINAL = Train(
    "final",
    steps=60,
    batch_size=1,
    length=1024,
    learning_rate=2e-3,
    hidden=0.1,
    trains=STEERED,
    slow_lr_multiplier=1.0,
)

DEFAULT = Settings(steps=(SCAN_CALIBRATION, FINAL), rows=12, length=1024, questions=64)
QUICK = Settings(steps=(CALIBRATION, replace(FINAL, steps=4)), rows=3, length=1024, questions=16)


def select_steps(settings: Settings, names: Sequence[str]) -> Settings:
    """Returns the settings with the named steps alone."""
    known = {step.name: step for step in settings.steps}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"there are no steps {unknown}; choose out of {list(known)}")
    return replace(settings, steps=tuple(known[name] for name in names))


def change_step(settings: Settings, change: str) -> Settings:
    """Returns the settings with one field of a step changed, as in `final.steps=100`; the value is JSON or a word."""
    target, equals, text = change.partition("=")
    name, _, field = target.partition(".")
    steps = {step.name: step for step in settings.steps}
    if not equals or name not in steps:
        raise ValueError(f"{change!r} must be STEP.FIELD=VALUE with a step out of {list(steps)}")
    kinds = {each.name: type(getattr(steps[name], each.name)) for each in fields(steps[name])}
    if field not in kinds or field == "name":
        raise ValueError(f"{change!r}: the fields of {name} are {[each for each in kinds if each != 'name']}")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    value = tuple(value) if isinstance(value, list) else kinds[field](value) if kinds[field] is float else value
    if not isinstance(value, kinds[field]):
        raise ValueError(f"{change!r}: the value must be of type {kinds[field].__name__}")
    steps[name] = replace(steps[name], **{field: value})
    return replace(settings, steps=tuple(steps.values()))
