"""Several processes: what only the main one does, and parameters that are spread over them."""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor


Result = TypeVar("Result")


def is_main() -> bool:
    """Returns whether this is the only process, or the first of several."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_main(work: Callable[[], Result]) -> Result:
    """
    Runs `work` on the main process while the others wait, and returns its result, or raises its error, on all.

    Args:
        work (`Callable`): Its result has to be one that can be pickled.
    """
    PartialState()  # starts the process group where torchrun has started several processes
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except Exception as error:
            box[1] = _portable(error)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def whole_tensor(tensor: Tensor) -> Tensor:
    """
    Returns a tensor that FSDP2 or ZeRO-3 spreads over the processes as a whole one; all processes have to ask for it.
    """
    if hasattr(tensor, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def spread_like(source: Tensor, target: Tensor) -> Tensor:
    """Spreads a whole tensor, which every process holds, over the processes as another one is."""
    if not hasattr(target, "device_mesh"):
        return source
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(source.to(target.device, target.dtype), target.device_mesh, target.placements)


@torch.no_grad()
def copy_whole(target: Tensor, source: Tensor) -> None:
    """Copies a whole tensor, which every process holds, into one that may be spread over them."""
    if hasattr(target, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([target], modifier_rank=0):
            target.copy_(source)
        return
    target.copy_(spread_like(source, target))
