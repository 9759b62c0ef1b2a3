"""
Compares kernels with plain PyTorch on small inputs: once on every device before `"auto"` relies on them there, and as
a command:

    python -m linmu_hf.ops.self_check [--device cuda:0]
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..attention.varlen import PACKAGES, varlen_attention, why_unfit
from ..backends import why_unavailable
from ..segments import Scan, Segments
from ..ssd.mamba_ssm import ssd_mamba_ssm
from ..ssd.plain import normalize, ssd_recurrence


logger = logging.getLogger(__name__)

_RESULTS: dict[tuple[str, torch.device], str | None] = {}


@torch.compiler.assume_constant_result
def failed_self_check(kernels: str, device: torch.device) -> str | None:
    """
    Returns why kernels cannot be relied on there, `None` if values and gradients are those of plain PyTorch;
    compared once on each device. An untried driver, GPU or package must not give wrong answers.

    Args:
        kernels (`str`): `"triton"` (ours), `"mamba_ssm"`, `"flash_attn"` or `"torch_varlen"`.
        device (`torch.device`): Where they are to run.
    """
    key = kernels, device
    if key not in _RESULTS:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "nothing can be compared while a CUDA graph is captured: run the model once before"
        # a new thread knows nothing of no_grad, inference_mode, autocast, default devices or tracing around the caller
        with ThreadPoolExecutor(1) as thread:
            _RESULTS[key] = thread.submit(_compare, kernels, device).result()
        if _RESULTS[key]:
            logger.warning(f"{_RESULTS[key]}. Plain PyTorch takes over")
    return _RESULTS[key]


def _compare(kernels: str, device: torch.device) -> str | None:
    name, results_of, bound = _COMPARISONS[kernels]
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            expected, actual = results_of(device)
    except Exception as error:
        return f"{name} fail on {device} ({type(error).__name__}: {error})"
    errors = [(one - right).abs().max() / right.abs().max() for right, one in zip(expected, actual)]
    worst = float(torch.stack(errors).max())  # NaN if one of them is, which Python's max would pass over
    return None if worst < bound else f"{name} are wrong on {device} (relative error {worst:.2g})"


def _leaves(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def _results(loss: torch.Tensor, outputs: Iterable[torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return [one.detach().cpu().float() for one in (*outputs, *torch.autograd.grad(loss, leaves))]


def _pair_by(form: Callable) -> Callable:
    """Two scans, normalised, by a form that takes one."""
    return lambda *scans: [normalize(form, normalized=True, **scan._asdict()) for scan in scans]


def _triton_pair(first: Scan, second: Scan) -> tuple:
    from ..ssd.triton import ssd_triton_pair

    return ssd_triton_pair(first, second, normalized=True)


def _scans(device: torch.device, pair: Callable) -> Iterator[list[torch.Tensor]]:
    """Both directions of a block, by the recurrence and by kernels."""
    lengths, (g, h, p, k) = (1, 150), (2, 4, 16, 32)
    n = sum(lengths)
    for form, where in ((_pair_by(ssd_recurrence), torch.device("cpu")), (pair, device)):
        leaves = _leaves(where, torch.float32, (n, g, p), (n, h), (h,), (n, g, k), (n, h, k))
        x, dt, rate, B, C = leaves
        segments = Segments.build(lengths, where)
        first = Scan(x, dt, -rate, B, C, segments)
        second = Scan(x.flip(0), (dt * 0.5).flip(0), -rate, B.flip(0), C.flip(0), segments)
        (y, states), (reverse, _) = form(first, second)
        yield _results(y.square().sum() + reverse.square().sum() + states.sum(), (y, states, reverse), leaves)


def _by_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    windows = zip(*(t.transpose(0, 1).split(lengths, dim=1) for t in (q, k, v)))
    y = [scaled_dot_product_attention(q[None], k[None], v[None], enable_gqa=True) for q, k, v in windows]
    return torch.cat(y, dim=2)[0].transpose(0, 1)


def _windows(device: torch.device, backend: str) -> Iterator[list[torch.Tensor]]:
    """Attention inside windows of several sizes, by PyTorch in float32 and by a kernel in bfloat16."""
    lengths, (h, g, d) = (3, 3, 70), (4, 2, 64)
    cu_seqlens = torch.tensor((0, *lengths), device=device).cumsum(0, dtype=torch.int32)
    exact = partial(_by_window, lengths=lengths), torch.device("cpu"), torch.float32
    tried = partial(varlen_attention, cu_seqlens=cu_seqlens, longest=70, backend=backend), device, torch.bfloat16
    for form, where, dtype in (exact, tried):
        leaves = _leaves(where, dtype, *((sum(lengths), heads, d) for heads in (h, g, g)))
        y: torch.Tensor = form(*(4 * leaf - 2 for leaf in leaves))
        yield _results(y.float().square().sum(), [y], leaves)


# what a message calls the kernels, expected and actual results, and the relative error that is too much
_COMPARISONS: dict[str, tuple[str, Callable, float]] = {
    "triton": ("the Triton kernels", partial(_scans, pair=_triton_pair), 1e-2),
    "mamba_ssm": ("mamba-ssm's kernels", partial(_scans, pair=_pair_by(ssd_mamba_ssm)), 5e-2),
    "flash_attn": ("flash-attn's kernels", partial(_windows, backend="flash_attn"), 5e-2),
    "torch_varlen": ("PyTorch's varlen kernels", partial(_windows, backend="torch_varlen"), 5e-2),
}


def main(argv: list[str] | None = None) -> None:
    """Prints for all kernels whether they are right on a device; exits with 1 if any that run are not."""
    parser = argparse.ArgumentParser(prog="python -m linmu_hf.ops.self_check", description="Are the kernels right?")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device, wrong = torch.device(parser.parse_args(argv).device), False
    logger.disabled = True
    for name in _COMPARISONS:
        x = torch.zeros(1, 1, 64, device=device, dtype=torch.bfloat16 if name in PACKAGES else torch.float32)
        reason = why_unfit(name, x) if name in PACKAGES else why_unavailable(name, x)
        found = None if reason else failed_self_check(name, device)
        wrong |= found is not None
        print(f"{name:12s} {reason or found or f'right on {device}'}")
    sys.exit(wrong)
