"""What accelerate's engines need to be told before they wrap a distillation: DDP and FSDP2."""

import os
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn


def is_sharded(args) -> bool:
    """Returns whether an engine takes a model apart for good, as these arguments or `accelerate launch` say."""
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return bool(args.fsdp) or launched or args.deepspeed_plugin is not None


def prepare_fsdp(accelerator: Accelerator, plugin_args: dict[str, Any] | None) -> bool:
    """
    Sets FSDP2 up as a distillation needs it; returns whether it is asked for.

    Parameters stay what they are, frozen ones in half precision and trained ones in float32, and autocast does the
    rest as on one device: decays that were cast to half precision would lose their small steps. Processes without a
    GPU, for which accelerate silently takes DDP, get FSDP2 too.

    Args:
        accelerator (`Accelerator`): Not prepared yet.
        plugin_args (`dict`, *optional*): What `--fsdp` and `--fsdp_config` say; `accelerate launch` says it by
            environment variables.

    Raises:
        `ValueError`: FSDP1.
    """
    state = accelerator.state
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None and state.distributed_type == DistributedType.MULTI_CPU:
        if plugin_args is not None:
            plugin = FullyShardedDataParallelPlugin(**plugin_args)
        elif os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            plugin = FullyShardedDataParallelPlugin()
        if plugin is not None:
            state.fsdp_plugin = plugin
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if plugin is None:
        return False
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version={plugin.fsdp_version} is not supported: FSDP1 cannot hold frozen parameters in half "
            "precision beside trained ones; set it to 2 in fsdp_config or in accelerate's configuration"
        )
    plugin.mixed_precision_policy = None
    return True


def reshard(model: nn.Module) -> None:
    """
    Spreads parameters again that a forward pass without a backward pass has left whole: FSDP2 keeps the root's, ZeRO-3
    those that a backward pass would read.
    """
    if hasattr(model, "empty_partition_cache"):
        model.empty_partition_cache()
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def touch_parameters(mixer: nn.Module) -> None:
    """
    Lets every trained parameter of a mixer take part in each backward pass, with zeros where a batch does not use it:
    engines wait for the gradients of all processes, and one of them may have text alone.
    """
    if _touch not in mixer._forward_hooks.values():
        mixer.register_forward_hook(_touch)


def _touch(mixer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    parameters = [parameter for parameter in mixer.parameters() if parameter.requires_grad]
    return _Touch.apply(output, *parameters) if parameters and torch.is_grad_enabled() else None


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)
