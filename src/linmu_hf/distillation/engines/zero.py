"""
DeepSpeed's ZeRO: gradients and optimizer states are spread over the processes, and in stage 3 parameters (`zero3.py`).

ZeRO lays the trained parameters of a group end to end and gives each process a part of that. AdamW, which treats every
number alike, does not notice; an optimizer that looks at matrices would.
"""

import copy
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..stages import Stage


OLDEST = "0.19"
INSTEAD = "take FSDP2, fsdp=True and fsdp_config={'version': 2}"

VISION = "model.visual."
WHOLE = ("lm_head.", "model.language_model.embed_tokens.")  # the second where it is tied to the first

# What a configuration of DeepSpeed may say. Of the first, values are those of the arguments, so that one is right.
FROM_ARGUMENTS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "bf16", "fp16",
)  # fmt: skip
KNOWN = (
    "zero_optimization", *FROM_ARGUMENTS, "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)  # fmt: skip


def check_zero_asked(config) -> None:
    """
    Raises an `ImportError` where `deepspeed` or `accelerate launch` asks for DeepSpeed, and it is missing or too old.
    To be called before `TrainingArguments` imports it.
    """
    if not (config.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"):
        return
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        found = None
    if found is None or Version(found) < Version(OLDEST):
        had = "is not installed" if found is None else f"is version {found}"
        raise ImportError(f'DeepSpeed is asked for and {had}: pip install "deepspeed>={OLDEST}", or {INSTEAD}')
    if config.use_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def check_zero(config) -> None:
    """
    Raises the `ValueError` of a configuration of DeepSpeed that says what a distillation does not follow. To be
    called after `TrainingArguments` has read it.
    """
    plugin = config.deepspeed_plugin
    if plugin is None:
        return
    unset_hf_deepspeed_config()  # by which `from_pretrained` would spread every model that is loaded
    given = plugin.deepspeed_config
    if config.world_size == 1:
        raise ValueError("DeepSpeed has no effect on one process: start several, or leave it out")
    stage = given["zero_optimization"].get("stage")
    if stage not in (2, 3):
        raise ValueError(f"ZeRO stage {stage} is not supported: take 2, or to spread parameters, too, 3")
    for part in ("offload_optimizer", "offload_param"):
        device = (given["zero_optimization"].get(part) or {}).get("device", "none")
        if device != "none":
            raise ValueError(f"DeepSpeed's {part} to {device!r} is not supported: leave it out")
    unknown = sorted(given.keys() - set(KNOWN))
    if unknown:
        raise ValueError(f"DeepSpeed's {unknown[0]}={given[unknown[0]]!r} is not supported: leave it out")
    mismatches = getattr(getattr(config, "hf_deepspeed_config", None), "mismatches", None)
    if mismatches:
        raise ValueError(f"deepspeed says otherwise than the arguments ({mismatches[0].strip('- ')}): write 'auto'")
    optim = str(getattr(config.optim, "value", config.optim))
    if not optim.startswith("adamw_torch"):
        raise ValueError(f"optim={optim!r} is not supported with ZeRO, which cuts matrices up: leave it out")


def check_zero_stages(config, student, stages: Sequence[Stage]) -> None:
    """Raises a `ValueError` for stages that cannot be trained with ZeRO, if `config` asks for it."""
    if config.deepspeed_plugin is None:
        return
    names = [name for name, _ in student.named_parameters()]
    for stage in stages:
        if stage.muon:
            raise ValueError(f"{stage.name}: muon needs whole matrices, which ZeRO cuts up: {INSTEAD}")
        trained = [name for name in names if any(re.search(pattern, name) for pattern in stage.trains)]
        whole = next((name for name in trained if name.startswith(WHOLE)), None)
        if whole and config.deepspeed_plugin.zero_stage == 3:
            raise ValueError(f"{stage.name} trains {whole}, which ZeRO-3 leaves whole on each process: {INSTEAD}")
        vision = next((name for name in trained if name.startswith(VISION)), None)
        if vision:
            raise ValueError(
                f"{stage.name} trains {vision}, whose gradients a process with text alone does not have and ZeRO "
                f"would wait for: {INSTEAD}"
            )


def settle_zero(args) -> None:
    """
    Writes the configuration for one stage of a distillation into accelerate's plugin.

    Parameters stay what they are, frozen ones in half precision and trained ones in float32, and autocast does the
    rest: DeepSpeed's own `bf16` would cast decays, too, and reduce gradients in half precision.
    """
    plugin = args.deepspeed_plugin
    asked = plugin.deepspeed_config["zero_optimization"]
    unused: tuple[str, ...] = ("offload_", "stage3_gather_16bit")
    if asked["stage"] != 3:
        unused += ("stage3_",)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_clipping": args.max_grad_norm,
        "zero_optimization": {k: v for k, v in asked.items() if v != "auto" and not k.startswith(unused)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "steps_per_print": float("inf"),
    }
    if args.bf16:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    plugin.hf_ds_config.config = plugin.deepspeed_config = config


def join_gradients(mixer: nn.Module) -> None:
    """
    Lets the gradients of all trained parameters of a mixer come at once, zeros for those that a batch does not use.

    ZeRO-2 reduces gradients in the order in which they come, and takes for granted that all processes have the same. A
    batch of text alone has nothing for some of them.
    """
    mixer.register_forward_pre_hook(_enter)
    mixer.register_forward_hook(_leave, always_call=True)


def _enter(mixer: nn.Module, args: Any) -> None:
    places = [
        (module._parameters, name, parameter)
        for module in mixer.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    ]
    mixer._joined = places if torch.is_grad_enabled() else []
    if mixer._joined:
        for (parameters, name, _), joined in zip(places, _Join.apply(*(parameter for *_, parameter in places))):
            parameters[name] = joined


def _leave(mixer: nn.Module, args: Any, output: Any) -> None:
    for parameters, name, parameter in mixer.__dict__.pop("_joined"):
        parameters[name] = parameter


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *parameters: Tensor):
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return gradients


def lend_shapes(parameters: Iterable[Tensor]) -> None:
    """
    Gives parameters that are not gathered now their shapes, without memory: autograd lays a gradient out like its
    parameter. The next gather takes what is here away.
    """
    for parameter in parameters:
        shape: Any = getattr(parameter, "ds_shape", None)
        if shape is not None and parameter.shape != shape:
            parameter.data = parameter.data.new_zeros(1).expand(shape)


def is_zero(optimizer: Any) -> bool:
    """Returns whether this is an optimizer that accelerate has given to DeepSpeed."""
    zero = getattr(optimizer, "optimizer", None)
    return hasattr(zero, "single_partition_of_fp32_groups") or hasattr(zero, "fp32_partitioned_groups_flat")


def gather_states(optimizer: Any) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
    """Yields every trained parameter with its whole state; all processes have to go through all of them."""
    from deepspeed.utils import safe_get_full_optimizer_state

    zero = optimizer.optimizer
    _link_states(zero)
    for parameters, flat in _groups(zero):
        for parameter in parameters:
            yield (
                parameter,
                {
                    # The number of steps is the group's: a copy for each, as an ordinary optimizer counts them.
                    key: safe_get_full_optimizer_state(parameter, key) if _is_spread(value) else copy.deepcopy(value)
                    for key, value in zero.state[flat].items()
                },
            )


def spread_states(optimizer: Any, states: dict[nn.Parameter, dict[str, Any]]) -> None:
    """Gives every process its part of the states that [`gather_states`], or an ordinary optimizer, had."""
    zero = optimizer.optimizer
    for parameters, flat in _groups(zero):
        for key, value in states[parameters[0]].items():
            zero.state[flat][key] = torch.zeros_like(flat) if _is_spread(value) else value
    _link_states(zero)
    for parameters, flat in _groups(zero):
        for parameter in parameters:
            for key, value in states[parameter].items():
                if _is_spread(value):
                    _set_part(zero, parameter, zero.state[flat], key, value.to(flat.device))


def _set_part(zero: Any, parameter: Any, state: dict[str, Tensor], key: str, value: Tensor) -> None:
    """Sets this process's part of a parameter's state, which is whole."""
    if not hasattr(parameter, "ds_id"):
        parameter.set_full_hp_param(value, key)
        return
    # DeepSpeed's own takes no parameter that the processes cannot share evenly.
    _, start, size = zero.grad_position[zero.get_param_id(parameter)]
    padded = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    state[key][start : start + size] = padded[size * dist.get_rank() :][:size]


def _groups(zero: Any) -> Iterator[tuple[list[nn.Parameter], Tensor]]:
    """The trained parameters of each group, with this process's part of them."""
    if hasattr(zero, "fp16_groups"):  # stage 3
        return zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
    return zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)


def _link_states(zero: Any) -> None:
    """
    Tells every parameter where its states are within the flat ones. DeepSpeed does so in stage 2 after the first step
    of the first group alone, when the other groups have none.
    """
    if hasattr(zero, "_hp_optimizer_states_linked"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _is_spread(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
