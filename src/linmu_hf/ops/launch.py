"""Launches kernels, those of the scan with tiles, warps and stages that are the fastest of a few that suit Hopper.

A kernel is timed with every configuration the first time it runs on a long scan, for each device, data type and head
size. For short scans and while a CUDA graph is captured nothing is timed: there the configuration that was found
before is used, or the default. The default alone is used where results have to repeat to the bit
(`torch.use_deterministic_algorithms`). `triton.autotune` can do neither: it times at the first launch of a key, in a
capture too, and would keep for long scans what a short one chose.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton


# Chunks of a launch below which its time says little.
ENOUGH_CHUNKS = 32


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    kernel[grid](*args, **options)


def on_device_of(x: torch.Tensor) -> torch.cuda.device:
    """Returns a context in which kernels run on x's GPU, if it is on one."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


class Config(NamedTuple):
    """Largest tiles of the head dim and of the state size, and how a program runs."""

    BP: int
    BK: int
    num_warps: int
    num_stages: int


# By the name of the kernel, the default first. None spills or exceeds the shared memory at the sizes of a 7B model.
CONFIGS = {
    "chunk_states_kernel": (Config(128, 64, 4, 1), Config(128, 64, 8, 1), Config(128, 128, 8, 1)),
    "output_kernel": (Config(128, 64, 8, 2), Config(128, 64, 8, 3), Config(64, 64, 4, 3), Config(128, 128, 8, 2)),
    "chunk_state_grads_kernel": (Config(128, 64, 4, 2), Config(128, 64, 8, 2), Config(128, 128, 8, 2)),
    "c_grad_kernel": (Config(64, 128, 8, 2), Config(64, 128, 8, 3), Config(128, 64, 8, 2), Config(128, 128, 8, 1)),
    "b_grad_kernel": (Config(64, 128, 8, 2), Config(64, 64, 8, 2), Config(32, 128, 8, 3)),
    "x_grad_kernel": (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 128, 8, 2)),
    "dt_grad_kernel": (Config(64, 64, 8, 2), Config(64, 64, 8, 1), Config(64, 32, 8, 2)),
}

_found: dict[tuple, Config] = {}


def configurations(kernel: Any, p: int, k: int, dtype: torch.dtype) -> list[Config]:
    """Returns those of a kernel for heads of p channels and states of k, without tiles that are larger than either."""
    configs = CONFIGS[kernel.fn.__name__]
    if dtype == torch.float32:  # products are not on tensor cores, and operands take twice the room
        configs = tuple(Config(c.BP // 2, c.BK // 2, 8, c.num_stages) for c in configs[:1])
    return list(dict.fromkeys(c._replace(BP=tile(p, c.BP), BK=tile(k, c.BK)) for c in configs))


def tile(size: int, limit: int) -> int:
    """Returns the size of a tile: a power of two that covers `size`, from 16 to `limit`."""
    return max(16, min(limit, triton.next_power_of_2(size)))


def choose(
    configs: list[Config], key: tuple, chunks: int, device: torch.device, run: Callable[[Config], None]
) -> Config:
    """
    Returns the fastest of `configs` where that is known or may be found now, else the first.

    Args:
        configs (`list[Config]`): The default first.
        key (`tuple`): What the choice depends on.
        chunks (`int`): Of the launch.
        device (`torch.device`): Where it runs.
        run (`Callable`): Launches the kernel with a configuration; must be idempotent.
    """
    key = (*key, device)
    if len(configs) == 1 or device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return configs[0]
    if key in _found:
        return _found[key]
    if chunks < ENOUGH_CHUNKS or torch.cuda.is_current_stream_capturing():
        return configs[0]
    times = {config: triton.testing.do_bench(lambda c=config: run(c), warmup=5, rep=20) for config in configs}
    _found[key] = min(times, key=times.__getitem__)
    return _found[key]
