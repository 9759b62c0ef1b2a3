"""The three stages of Algorithm 2 as values: what trains, on which losses, at which rate, for how long."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..modeling.mixers import STEERING, decays


# theta_Flex and theta_Swin of the paper. Attention layers that a hybrid keeps (`mixer.q_proj`, ...) stay frozen.
FLEX = r"\.mixer\.(?!local_swin\.|[qkvo]_proj\.)"
SWIN = r"\.mixer\.local_swin\."
LORA = r"\.lora_[AB]\."

# Projections whose rows are heads.
TO_HEADS = r"\.mixer\..*\b[qkvbcx]_proj\.weight$"


@dataclass(frozen=True)
class Stage:
    """
    One stage of a distillation.

    Args:
        name (`str`): the name of the folder that the stage leaves.
        trains (`tuple[str, ...]`): regular expressions; a parameter trains if one of them is found in its name.
        max_steps (`int`): optimizer steps.
        learning_rate (`float`): peak learning rate.
        hid, tok, seq, sup (`float`, *optional*, defaults to 0.0): the weights lambda of Eq. 6 to 9.
        lora_r (`int`, *optional*, defaults to 0): rank of the LoRA adapters on the decoder's FFNs; 0 for none.
        hidden_input (`"student"` or `"teacher"`, *optional*, defaults to `"student"`):
            What every M-MATE block is fed with. `"student"`: the student's own states, through its whole forward pass.
            `"teacher"`: the teacher's input of the same layer, which costs one forward pass of the teacher and one
            pass through the mixers alone. The student then has no output: L_hid is the only loss.
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
    hidden_input: Literal["student", "teacher"] = "student"

    def __post_init__(self):
        if not is_stage_name(self.name):
            raise ValueError(f"stage name {self.name!r} names a folder: use letters, digits, `-` and `_`")
        if self.max_steps < 1:
            raise ValueError(f"{self.name}: max_steps={self.max_steps} must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"{self.name}: learning_rate={self.learning_rate} must be positive")
        weights = {"hid": self.hid, "tok": self.tok, "seq": self.seq, "sup": self.sup}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise ValueError(f"{self.name}: loss weights {weights} must not be negative, and one must be positive")
        if self.lora_r < 0:
            raise ValueError(f"{self.name}: lora_r={self.lora_r} must not be negative")
        if self.hidden_input not in ("student", "teacher"):
            raise ValueError(f"{self.name}: hidden_input={self.hidden_input!r} must be 'student' or 'teacher'")
        if self.hidden_input == "teacher" and (self.hid == 0 or self.tok or self.seq or self.sup or self.lora_r):
            raise ValueError(
                f"{self.name}: hidden_input='teacher' runs the mixers alone, so it trains neither LoRA nor any loss "
                "but `hid`: set tok=seq=sup=0, lora_r=0 and hid > 0, or use hidden_input='student'"
            )

    def objective(self) -> str:
        """Describes what it minimises, such as `0.5 hid + 0.5 tok, LoRA rank 8`."""
        losses = " + ".join(
            f"{getattr(self, key):g} {key}" for key in ("hid", "tok", "seq", "sup") if getattr(self, key)
        )
        extra = f", LoRA rank {self.lora_r}" if self.lora_r else ""
        extra += ", fed by the teacher" if self.hidden_input == "teacher" else ""
        return losses + extra


def is_stage_name(name: str) -> bool:
    """Returns whether a stage may have this name, which is that of its folder."""
    return re.fullmatch(r"[\w-]+", name) is not None


PAPER_STAGES = (
    Stage("stage-1", trains=(FLEX,), max_steps=10_000, learning_rate=5e-4, hid=0.5, tok=0.5),
    Stage("stage-2", trains=(FLEX, SWIN), max_steps=15_000, learning_rate=5e-4, hid=0.5, tok=0.5),
    Stage(
        "stage-3", trains=(FLEX, SWIN, LORA), max_steps=25_000, learning_rate=2e-5, tok=0.5, seq=0.5, sup=0.5, lora_r=8
    ),
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
    model: nn.Module, learning_rate: float, weight_decay: float, slow_lr_multiplier: float, muon: bool = False
) -> list[dict]:
    """
    Returns the trainable parameters in optimizer groups: decays, step sizes and gates have a lower rate, and with
    norms, biases and convolutions no weight decay. For [`Muon`] a group of matrices says how many `heads` each holds.
    """
    groups: dict[tuple[bool, bool, int], list[nn.Parameter]] = {}
    for name, parameter in _trainable(model):
        slow = re.search(STEERING, name) is not None
        heads = _heads(model, name, parameter) if muon and not slow else 0
        groups.setdefault((slow, not decays(name), heads), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * (slow_lr_multiplier if slow else 1.0),
            "weight_decay": 0.0 if no_decay else weight_decay,
            **({"heads": heads} if muon else {}),
        }
        for (slow, no_decay, heads), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _heads(model: nn.Module, name: str, parameter: nn.Parameter) -> int:
    """How many matrices a parameter is, 0 if it is none."""
    if re.search(TO_HEADS, name):
        return len(parameter) // model.config.get_text_config().head_dim
    return int(name.endswith("_features") or (parameter.ndim == 2 and decays(name)))


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
