"""
DeepSpeed's ZeRO, stage 3: parameters, too, are spread over the processes, and gathered where a module is called.

All processes have to gather the same parameters in the same order, whatever their batches hold: one may have text
alone, or fewer answers than another. So a decoder layer is gathered as a whole, with the branches that a batch does
not use; and what a process calls as often as its batch asks for, the vision side and the heads, stays whole on each.
"""

import torch
from torch import nn
from transformers import TrainerCallback

from ..model import DistillationModel
from ..teacher import SeparateTeacher


def is_zero3(args) -> bool:
    """Returns whether these arguments ask for ZeRO-3."""
    return args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3


def prepare_zero3(model: DistillationModel, device: torch.device) -> None:
    """
    Tells DeepSpeed what is gathered as a whole, and hides from it what stays whole: hidden modules are where they
    were, but no longer among the modules and parameters of the one around them. To be called before DeepSpeed wraps
    the model.
    """
    from deepspeed.utils import set_z3_leaf_module

    models = [model.student] + ([model.teacher.model] if isinstance(model.teacher, SeparateTeacher) else [])
    for each in models:
        text = each.model.language_model
        if each.lm_head.weight is text.embed_tokens.weight:
            _hide(text, "embed_tokens", device)
        _hide(each.model, "visual", device)
        _hide(each, "lm_head", device)
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            set_z3_leaf_module(module, True)


def _hide(owner: nn.Module, name: str, device: torch.device) -> None:
    object.__setattr__(owner, name, owner._modules.pop(name).to(device))


class ReduceEachGradient(TrainerCallback):
    """
    A callback that lets DeepSpeed reduce every gradient as it comes. Those of a module that is gathered as a whole it
    would take when the module's backward pass ends, which it does not see where no input is differentiated: in the
    first layer that trains, and in every layer that the teacher feeds.
    """

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        zero = optimizer.optimizer
        for hook in (*zero._grad_acc_hooks, *zero._leaf_module_hooks):
            hook.remove()
        for parameters in zero.fp16_groups:
            for parameter in parameters:
                parameter.__dict__.pop("ds_z3_leaf_module", None)
        zero._grad_acc_hooks, zero._leaf_module_hooks = [], []
        zero.create_reduce_and_remove_grad_hooks()
