"""What the processes of a training that torchrun started share: gradients, notes and one clock."""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn


Value = TypeVar("Value")


def start() -> tuple[int, int]:
    """Joins the processes that torchrun started, and returns (number of this one, how many there are)."""
    state = PartialState(cpu=True)
    return state.process_index, state.num_processes


def mean_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Averages gradients over all processes; a parameter without one counts as zero."""
    if not dist.is_initialized():
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad = part.view_as(parameter)


def of_all(value: Value) -> list[Value]:
    """Returns every process's `value`, in their order."""
    if not dist.is_initialized():
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def of_first(value: float) -> float:
    """Returns the first process's `value`, so that all agree on what the clock says."""
    if not dist.is_initialized():
        return value
    shared: Tensor = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(shared, 0)
    return shared.item()
