"""What both branches do with a token before it meets others: joint linear maps, rotary embedding."""

import torch
from torch import nn
from torch.nn.functional import linear


# Below this many tokens, laying the weights side by side costs more than one matrix product in place of several saves.
JOINT_FROM = 256


def joint_linear(tokens: torch.Tensor, *maps: nn.Module) -> torch.Tensor:
    """
    Linear maps of the same tokens side by side: one matrix product where each of them is just its weight and bias.

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
    return linear(tokens, torch.cat([one.weight for one in maps]), torch.cat([one.bias for one in maps]))


def _is_plain(module: nn.Module) -> bool:
    """Whether calling the module does no more than multiply by its weight and add its bias."""
    if type(module) is not nn.Linear or type(module.weight) not in (nn.Parameter, torch.Tensor) or module.bias is None:
        return False
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return not any(hooks) and "forward" not in module.__dict__


def rotate(tokens: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """
    The rotary embedding in Qwen2.5-VL's form, which pairs channel i with i + p / 2.

    Args:
        tokens (`torch.Tensor` of shape `[n, h, p]`): Heads of the tokens.
        rope (`tuple[torch.Tensor, torch.Tensor]`): cos and sin, each `[n, p]`.
    """
    cos, sin = rope
    half = cos.shape[-1] // 2
    sin = torch.cat([-sin[:, :half], sin[:, half:]], dim=-1)
    return torch.addcmul(tokens * cos[:, None], tokens.roll(half, -1), sin[:, None])
