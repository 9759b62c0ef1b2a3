"""LoRA on the decoder's FFNs (Eq. 12), put in for one stage and merged at its end."""

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ..modeling.adapters import lora_targets


def add_lora(model: nn.Module, r: int, alpha: float) -> None:
    """
    Puts adapters of rank `r` on gate, up and down projection of every decoder layer, in place.

    Every other parameter is frozen by this; [`set_trainable`] says afterwards what trains. There is no `PeftModel`
    around the model: that would freeze M-MATE, and not save it once unfrozen.
    """
    inject_adapter_in_model(LoraConfig(r=r, lora_alpha=alpha, target_modules=lora_targets("mlp")), model)


def merge_lora(model: nn.Module) -> None:
    """Adds the adapters to the weights that they adapt and takes them out again, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
