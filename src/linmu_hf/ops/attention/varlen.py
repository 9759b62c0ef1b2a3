"""Softmax attention of sequences of any lengths in one call: by flash-attn, or by PyTorch's kernel of that name."""

import inspect
import math
import os
from functools import partial

import torch

from ..backends import first_that_runs, missing
from ..self_check import failed_trial


ENVIRONMENT = "LINMU_WINDOW_BACKEND"  # what attends inside windows, where it is set
PACKAGES = {"flash_attn": "flash_attn", "torch_varlen": "torch.nn.attention.varlen"}
CHOICES = ("auto", *PACKAGES, "sdpa")

# what both kernels take
DTYPES = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256


def varlen_attention(
    q, k, v, offsets, longest: int, backend: str, causal: bool = False, scale: float | None = None
):  # fmt: skip
    """
    Attention of every token to the tokens of its own sequence.

    Args:
        q (`torch.Tensor` of shape `[n, h, d]`): Queries, sequence by sequence.
        k, v (`torch.Tensor` of shape `[n, g, d]`): Keys and values; h is a multiple of g.
        offsets (`torch.IntTensor` of shape `[m + 1]`): Where each sequence begins, and the end.
        longest (`int`): Tokens of the longest sequence.
        backend (`str`): `"flash_attn"` or `"torch_varlen"`.
        causal (`bool`, *optional*, defaults to `False`): To no later tokens.
        scale (`float`, *optional*): Factor of the scores, by default `d ** -0.5`.

    Returns:
        `torch.Tensor` of shape `[n, h, d]`.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func(
            q, k, v, offsets, offsets, longest, longest,
            softmax_scale=scale, causal=causal, deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
    from torch.nn.attention.varlen import varlen_attn

    options = {"scale": scale, "window_size": (-1, 0 if causal else -1)}
    if q.shape[1] != k.shape[1]:
        if _knows("enable_gqa"):
            options["enable_gqa"] = True
        else:  # of torch 2.11 and older
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)


def choose_window_backend(q: torch.Tensor) -> str:
    """
    What attends inside windows for queries such as q: on a GPU in half precision the first of `PACKAGES` that can run,
    otherwise `"sdpa"`; or what the environment variable `LINMU_WINDOW_BACKEND` names.

    Raises:
        `ValueError`: The named backend is unknown, or cannot run here; the message says what it takes.
    """
    wanted = os.environ.get(ENVIRONMENT, "auto")
    if wanted not in CHOICES:
        raise ValueError(f"{ENVIRONMENT}={wanted} is unknown; choose one of {list(CHOICES)}")
    if wanted in PACKAGES:
        reason = unfit(wanted, q)
        if reason:
            raise ValueError(f"{ENVIRONMENT}={wanted} cannot run: {reason}")
        return wanted
    if wanted == "auto" and q.is_cuda:
        reasons = {name: partial(_unfit_or_wrong, name, q) for name in PACKAGES}
        return first_that_runs("windows", reasons, "sdpa") or "sdpa"
    return "sdpa"


def unfit(backend: str, q: torch.Tensor) -> str | None:
    """Why a backend cannot take such queries; `None` if it can."""
    reason = missing(PACKAGES[backend], q, DTYPES, "sdpa")
    if reason is None and backend == "torch_varlen" and not _knows("window_size"):
        reason = "this PyTorch's varlen_attn knows no window_size: upgrade torch"
    if reason is None and (q.shape[-1] > LARGEST_HEAD or q.shape[-1] % 8):
        reason = f"heads of {q.shape[-1]} channels: it takes multiples of 8 up to {LARGEST_HEAD}, use 'sdpa'"
    return reason


def _unfit_or_wrong(backend: str, q: torch.Tensor) -> str | None:
    return unfit(backend, q) or failed_trial(q.device, backend)


@torch.compiler.assume_constant_result
def _knows(parameter: str) -> bool:
    """Whether this PyTorch's varlen_attn has such a parameter."""
    from torch.nn.attention.varlen import varlen_attn

    return parameter in inspect.signature(varlen_attn).parameters
