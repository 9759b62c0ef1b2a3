"""What both branches do with a token before it meets others: joint linear maps, rotary embedding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear


# Below this many tokens, laying the weights side by side costs more than one matrix product in place of several saves.
JOINT_FROM = 256

Rope = Sequence[torch.Tensor]  # cos and sin


def joint_linear(tokens: torch.Tensor, *maps: nn.Module) -> torch.Tensor:
    """
    Returns linear maps of the same tokens side by side: one matrix product where each is just its weight and bias.

    A map that is anything more (an adapter, quantised, with hooks that bring its weight from disk or look at what it
    computes) is called as the module that it is.

    Args:
        tokens (`torch.Tensor` of shape `[n, d]`): Input.
        maps (`nn.Module`): Each from d to a width of its own.

    Returns:
        `torch.Tensor` of shape `[n, sum of the widths]`.
    """
    if len(tokens) < JOINT_FROM or not all(map(_is_plain, maps)) or len({one.weight.dtype for one in maps}) > 1:
        return torch.cat([one(tokens) for one in maps], dim=-1)
    tensors = [tokens, *(one.weight for one in maps), *(one.bias for one in maps)]
    if torch.is_autocast_enabled(tokens.device.type) and tokens.dtype != torch.float64:
        tensors = [tensor.to(torch.get_autocast_dtype(tokens.device.type)) for tensor in tensors]
    return JointLinear.apply(*tensors)


class JointLinear(torch.autograd.Function):
    """The product; keeps the weights for the backward pass as they are and not the copy of them side by side."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        ctx.save_for_backward(tokens, *weights)
        return linear(tokens, torch.cat(weights), torch.cat(biases))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        tokens, *weights = ctx.saved_tensors
        widths, needed = [len(weight) for weight in weights], ctx.needs_input_grad
        grad_tokens = grad @ torch.cat(weights) if needed[0] else None
        nothing = (None,) * len(weights)
        grad_weights = (grad.t() @ tokens).split(widths) if any(needed[1 : 1 + len(weights)]) else nothing
        grad_biases = grad.sum(0).split(widths) if any(needed[1 + len(weights) :]) else nothing
        return grad_tokens, *grad_weights, *grad_biases


def _is_plain(module: nn.Module) -> bool:
    """Returns whether calling the module does no more than multiply by its weight and add its bias."""
    if type(module) is not nn.Linear or type(module.weight) not in (nn.Parameter, torch.Tensor) or module.bias is None:
        return False
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return not any(hooks) and "forward" not in module.__dict__


def rotate(tokens: torch.Tensor, rope: Rope) -> torch.Tensor:
    """
    Applies the rotary embedding in Qwen2.5-VL's form, which pairs channel i with i + p / 2.

    Args:
        tokens (`torch.Tensor` of shape `[n, h, p]`): Heads of the tokens.
        rope (`tuple[torch.Tensor, torch.Tensor]`): cos and sin, each `[n, p]`.
    """
    cos, sin = rope
    half = cos.shape[-1] // 2
    sin = torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)
    return torch.addcmul(tokens * cos[:, None], tokens.roll(half, -1), sin[:, None])
