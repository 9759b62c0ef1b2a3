"""The stages of Algorithm 2 as values: what trains, on which losses, at which rate, for how long."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from ..modeling.adapters import lora_targets
from ..modeling.mixers import STEERING, decays


# theta_Flex and theta_Swin of the paper. Attention layers that a hybrid keeps (`mixer.q_proj`, ...) stay frozen.
FLEX = r"\.mixer\.(?!local_swin\.|[qkvo]_proj\.)"
SWIN = r"\.mixer\.local_swin\."
LORA = r"\.lora_[AB]\."
TRAINS = {"flex": FLEX, "swin": SWIN, "lora": LORA}

ALL = "all"  # an override of this name is one of every stage
RESERVED = (ALL, "pseudo_targets")
LOSSES = ("hid", "tok", "seq", "sup")

# Projections whose rows are heads.
TO_HEADS = r"\.mixer\..*\b[qkvbcx]_proj\.weight$"


@dataclass(frozen=True)
class Stage:
    """
    One stage of a distillation.

    Args:
        name (`str`): the name of the folder that the stage leaves.
        trains (`tuple[str, ...]`):
            `"flex"`, `"swin"` and `"lora"`, or regular expressions; a parameter trains if one of them is found in its
            name. Names become the expressions that they stand for.
        max_steps (`int`): optimizer steps.
        learning_rate (`float`): peak learning rate.
        hid, tok, seq, sup (`float`, *optional*, defaults to 0.0): the weights lambda of Eq. 6 to 9.
        lora_r (`int`, *optional*, defaults to 0): rank of the LoRA adapters on the decoder's FFNs; 0 for none.
        lora_alpha (`float`, *optional*, defaults to `lora_r`): their scale is `lora_alpha / lora_r`; Eq. 12 has 1.
        learning_rates (`Mapping[str, float]`, *optional*):
            Multipliers of the learning rate by name or regular expression, as in `trains`; a parameter takes the first
            that is found in its name. `slow_lr_multiplier` of [`DistillConfig`] comes on top.
        muon (`bool`, *optional*, defaults to `False`):
            Whether matrices take Muon's steps in place of AdamW's, with rates of their own size; see `muon.py`.
        hidden_input (`"student"` or `"teacher"`, *optional*, defaults to `"student"`):
            What every M-MATE block is fed with. `"student"`: the student's own states, through its whole forward pass.
            `"teacher"`: the teacher's input of the same layer, which costs one forward pass of the teacher and one
            pass through the mixers alone. The student then has no output: L_hid is the only loss.
        beta (`float`, *optional*, defaults to 0.0):
            Which divergence L_tok is: 0 for KL(teacher || student) of Eq. 7, 1 for the reverse, KL(student ||
            teacher), and a generalised Jensen-Shannon divergence between them; see [`token_kd_loss`].
        lmbda (`float`, *optional*, defaults to 0.0):
            Share of the rows whose last answer is drawn from the student itself, for the teacher to judge by L_tok;
            see `on_policy.py`.
        sampling_temperature (`float`, *optional*, defaults to 1.0):
            Of these draws; 0 for the likeliest tokens.
    """

    name: str
    trains: tuple[str, ...]
    max_steps: int
    learning_rate: float
    hid: float = 0.0
    tok: float = 0.0
    seq: float = 0.0
    sup: float = 0.0
    lora_r: int = 0
    lora_alpha: float | None = None
    learning_rates: Mapping[str, float] = field(default_factory=dict, hash=False)
    muon: bool = False
    hidden_input: Literal["student", "teacher"] = "student"
    beta: float = 0.0
    lmbda: float = 0.0
    sampling_temperature: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "trains", tuple(TRAINS.get(name, name) for name in self.trains))
        rates = {TRAINS.get(name, name): rate for name, rate in self.learning_rates.items()}
        object.__setattr__(self, "learning_rates", rates)
        if not is_stage_name(self.name):
            raise ValueError(
                f"stage name {self.name!r} names a folder: use letters, digits, `-` and `_`, and none of {RESERVED}"
            )
        if not self.trains:
            raise ValueError(f"{self.name}: trains is empty: name some of {list(TRAINS)}, or regular expressions")
        for pattern in (*self.trains, *rates):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{self.name}: {pattern!r} is no regular expression: {error}") from error
        if self.max_steps < 1:
            raise ValueError(f"{self.name}: max_steps={self.max_steps} must be at least 1")
        for name, rate in {"learning_rate": self.learning_rate, **self._multipliers()}.items():
            if not 0 < rate < math.inf:
                raise ValueError(f"{self.name}: {name}={rate} must be positive")
        weights = {key: getattr(self, key) for key in LOSSES}
        if not all(0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
            raise ValueError(f"{self.name}: loss weights {weights} must not be negative, and one must be positive")
        if self.lora_r < 0:
            raise ValueError(f"{self.name}: lora_r={self.lora_r} must not be negative")
        if self.lora_r == 0 and (LORA in self.trains or self.lora_alpha is not None):
            said = "trains lora" if LORA in self.trains else f"lora_alpha={self.lora_alpha} has no effect"
            raise ValueError(f"{self.name}: {said}, but lora_r is 0: set the rank of the adapters, or leave lora out")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"{self.name}: lora_alpha={self.lora_alpha} must be positive")
        if self.hidden_input not in ("student", "teacher"):
            raise ValueError(f"{self.name}: hidden_input={self.hidden_input!r} must be 'student' or 'teacher'")
        if self.hidden_input == "teacher" and (self.hid == 0 or self.tok or self.seq or self.sup or self.lora_r):
            raise ValueError(
                f"{self.name}: hidden_input='teacher' runs the mixers alone, so it trains neither LoRA nor any loss "
                "but `hid`: set tok=seq=sup=0, lora_r=0 and hid > 0, or use hidden_input='student'"
            )
        self._check_on_policy()

    def _check_on_policy(self) -> None:
        for name in ("beta", "lmbda"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{self.name}: {name}={value} must be from 0 to 1")
            if value and not self.tok:
                raise ValueError(f"{self.name}: {name}={value} has no effect without L_tok: set tok, or {name}=0")
        if self.lmbda and (self.seq or self.sup):
            raise ValueError(
                f"{self.name}: lmbda={self.lmbda} puts the student's own answers in the place of those that seq and "
                "sup learn from: set seq=sup=0 and give them a stage of their own, or lmbda=0"
            )
        if not 0 <= self.sampling_temperature < math.inf:
            raise ValueError(f"{self.name}: sampling_temperature={self.sampling_temperature} must not be negative")
        if self.sampling_temperature != 1 and not self.lmbda:
            raise ValueError(
                f"{self.name}: sampling_temperature={self.sampling_temperature} has no effect where the student gives "
                "no answers: set lmbda above 0, or leave it out"
            )

    def _multipliers(self) -> dict[str, float]:
        return {f"learning_rates[{name!r}]": rate for name, rate in self.learning_rates.items()}

    def alpha(self) -> float:
        """Returns `lora_alpha`, which is `lora_r` where it is not given."""
        return self.lora_r if self.lora_alpha is None else self.lora_alpha

    def objective(self) -> str:
        """Describes what it minimises, such as `0.5 hid + 0.5 tok, LoRA rank 8`."""
        losses = " + ".join(f"{getattr(self, key):g} {key}" for key in LOSSES if getattr(self, key))
        extra = f", LoRA rank {self.lora_r}" if self.lora_r else ""
        extra += ", by Muon" if self.muon else ""
        extra += ", fed by the teacher" if self.hidden_input == "teacher" else ""
        extra += f", beta {self.beta:g}" if self.beta else ""
        extra += f", {self.lmbda:.0%} of answers its own" if self.lmbda else ""
        return losses + extra


def is_stage_name(name: str) -> bool:
    """Returns whether a stage may have this name, which is that of its folder."""
    return re.fullmatch(r"[\w-]+", name) is not None and name not in RESERVED


def check_stages(model: nn.Module, stages: Sequence[Stage]) -> None:
    """
    Raises a `ValueError` for the first pattern of a stage that finds no parameter, and for adapters that do not train.

    Args:
        model (`nn.Module`): the student, without adapters.
    """
    own = [name for name, _ in model.named_parameters()]
    targets = re.compile(lora_targets("mlp"))
    modules = [name for name, module in model.named_modules() if targets.fullmatch(name)]
    adapters = [f"{name}.lora_{side}.default.weight" for name in modules for side in "AB"]
    for stage in stages:
        names = own + adapters if stage.lora_r else own
        for pattern in stage.trains:
            if not any(re.search(pattern, name) for name in names):
                raise ValueError(f"{stage.name}: trains={pattern!r} finds no parameter of the student: leave it out")
        trained = [name for name in names if any(re.search(pattern, name) for pattern in stage.trains)]
        if stage.lora_r and not any(re.search(LORA, name) for name in trained):
            raise ValueError(f"{stage.name}: lora_r={stage.lora_r} adapters would not train: add lora to `trains`")
        for pattern in stage.learning_rates:
            if not any(re.search(pattern, name) for name in trained):
                raise ValueError(
                    f"{stage.name}: learning_rates[{pattern!r}] finds nothing that trains in this stage: leave it out"
                )


def set_trainable(model: nn.Module, stage: Stage) -> list[str]:
    """Lets exactly the parameters of `stage` train and returns their names."""
    names = []
    for name, parameter in model.named_parameters():
        trains = any(re.search(pattern, name) for pattern in stage.trains)
        parameter.requires_grad_(trains)
        if trains:
            names.append(name)
    if not names:
        raise ValueError(
            f"{stage.name} finds nothing to train: no parameter of {type(model).__name__} matches {stage.trains}. "
            "Is the student a converted model with M-MATE layers?"
        )
    return names


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    slow_lr_multiplier: float,
    multipliers: Mapping[str, float] | None = None,
    muon: bool = False,
) -> list[dict]:
    """
    Returns the trainable parameters in optimizer groups: decays, step sizes and gates have a lower rate, and with
    norms, biases and convolutions no weight decay; `multipliers` are those of `Stage.learning_rates`. For [`Muon`] a
    group of matrices says how many `heads` each holds.
    """
    groups: dict[tuple[bool, bool, int, float], list[nn.Parameter]] = {}
    for name, parameter in _trainable(model):
        slow = re.search(STEERING, name) is not None
        heads = _heads(model, name, parameter) if muon and not slow else 0
        factor = next((rate for pattern, rate in (multipliers or {}).items() if re.search(pattern, name)), 1.0)
        groups.setdefault((slow, not decays(name), heads, factor), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * factor * (slow_lr_multiplier if slow else 1.0),
            "weight_decay": 0.0 if no_decay else weight_decay,
            **({"heads": heads} if muon else {}),
        }
        for (slow, no_decay, heads, factor), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _heads(model: nn.Module, name: str, parameter: nn.Parameter) -> int:
    """How many matrices a parameter is, 0 if it is none."""
    if re.search(TO_HEADS, name):
        return len(parameter) // model.config.get_text_config().head_dim
    return int(name.endswith("_features") or (parameter.ndim == 2 and decays(name)))


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
