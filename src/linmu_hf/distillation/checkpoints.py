"""Checkpoints inside a stage: trained parameters and optimizer by name, whole, for any number of processes."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .engines.processes import copy_whole, is_main, whole_tensor
from .engines.zero import gather_states, is_zero, spread_states


TRAINED_WEIGHTS = "trained.safetensors"
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_trained(model: nn.Module, folder: str | Path) -> None:
    """Writes the trainable parameters; every process has to call it, and the main one writes."""
    tensors = {}
    for name, parameter in trained_parameters(model).items():
        whole = whole_tensor(parameter).detach()
        if is_main():
            tensors[name] = whole.cpu().contiguous()
    if is_main():
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(tensors, Path(folder) / TRAINED_WEIGHTS, metadata={"format": "pt"})


def load_trained(model: nn.Module, folder: str | Path) -> None:
    """
    Reads what [`save_trained`] wrote.

    Raises:
        `ValueError`: Other parameters are trainable now.
    """
    saved, trained = load_file(Path(folder) / TRAINED_WEIGHTS), trained_parameters(model)
    if saved.keys() != trained.keys():
        names = sorted(saved.keys() ^ trained.keys())
        raise ValueError(f"{folder} was written by another stage or model: {names[:3]} differ")
    for name, parameter in trained.items():
        copy_whole(parameter, saved[name])


def save_optimizer(model: nn.Module, optimizer: Any, scheduler: Any, folder: str | Path) -> None:
    """Writes optimizer and scheduler, the optimizer's states by the names of their parameters."""
    names = {parameter: name for name, parameter in trained_parameters(model).items()}
    states: dict[str, dict[str, Any]] = {}
    for parameter, state in gather_states(optimizer) if is_zero(optimizer) else optimizer.state.items():
        whole = {key: whole_tensor(value) if isinstance(value, Tensor) else value for key, value in state.items()}
        if is_main():
            states[names[parameter]] = {
                key: value.cpu() if isinstance(value, Tensor) else value for key, value in whole.items()
            }
    if is_main():
        groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        torch.save({"states": states, "groups": groups}, Path(folder) / OPTIMIZER)
        torch.save(scheduler.state_dict(), Path(folder) / SCHEDULER)


def load_optimizer(model: nn.Module, optimizer: Any, scheduler: Any, folder: str | Path) -> None:
    """Reads what [`save_optimizer`] wrote, on this number of processes."""
    saved = torch.load(Path(folder) / OPTIMIZER, map_location="cpu", weights_only=True)
    trained = trained_parameters(model)
    states = {trained[name]: state for name, state in saved["states"].items()}
    if is_zero(optimizer):
        spread_states(optimizer, states)
        states = {}
    for parameter, state in states.items():
        own = {}
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                own[key] = torch.empty_like(parameter, dtype=value.dtype)
                copy_whole(own[key], value)
            else:
                own[key] = value
        optimizer.state[parameter] = own
    for group, values in zip(optimizer.param_groups, saved["groups"], strict=True):
        group.update(values)
    scheduler.load_state_dict(torch.load(Path(folder) / SCHEDULER, map_location="cpu", weights_only=True))
