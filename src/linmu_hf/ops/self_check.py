"""Kernels are tried once on every device before `"auto"` relies on them there."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import torch


logger = logging.getLogger(__name__)

_TRIALS: dict[tuple[str, torch.device], str | None] = {}


@torch.compiler.assume_constant_result
def failed_trial(device: torch.device, kernels: str = "triton") -> str | None:
    """
    What speaks against kernels on a device, tried once on small inputs; `None` if they answer and differentiate like
    plain PyTorch. A driver, a GPU or a package that they were never tried with must not give wrong answers.

    Args:
        device (`torch.device`): Where they are to run.
        kernels (`str`): `"triton"` (ours), `"mamba_ssm"`, `"flash_attn"`, `"torch_varlen"` or `"causal_conv1d"`.
    """
    key = kernels, device
    if key not in _TRIALS:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "nothing can be tried while a CUDA graph is captured: run the model once before"
        # a new thread knows nothing of no_grad, inference_mode, autocast, default devices or tracing around the caller
        with ThreadPoolExecutor(1) as thread:
            _TRIALS[key] = thread.submit(_try, kernels, device).result()
        if _TRIALS[key]:
            logger.warning(f"{_TRIALS[key]}. Plain PyTorch takes over")
    return _TRIALS[key]


def _try(kernels: str, device: torch.device) -> str | None:
    name, results_of, bound = _KERNELS[kernels]
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            expected, actual = results_of(device)
    except Exception as error:
        return f"{name} fail on {device} ({type(error).__name__}: {error})"
    errors = [(one - right).abs().max() / right.abs().max() for right, one in zip(expected, actual)]
    worst = float(torch.stack(errors).max())  # NaN if one of them is, which Python's max would pass over
    return None if worst < bound else f"{name} are wrong on {device} (relative error {worst:.2g})"


def _leaves(device, dtype, *shapes) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def _results(loss, outputs, leaves) -> list[torch.Tensor]:
    return [one.detach().cpu().float() for one in (*outputs, *torch.autograd.grad(loss, leaves))]


def _scans(device, backend: str) -> Iterator[list[torch.Tensor]]:
    """Both directions of a block, by the recurrence and by the kernels of a backend."""
    from .segments import Scan, Segments
    from .ssd.scan import ssd_pair

    if backend == "triton":
        from .ssd.triton import ssd_triton_pair as tried
    else:
        tried = partial(ssd_pair, backend=backend)
    lengths, (g, h, p, k) = (1, 150), (2, 4, 16, 32)
    n = sum(lengths)
    for form, where in ((partial(ssd_pair, backend="recurrence"), torch.device("cpu")), (tried, device)):
        leaves = _leaves(where, torch.float32, (n, g, p), (n, h), (h,), (n, g, k), (n, h, k))
        x, dt, rate, B, C = leaves
        backwards = torch.arange(n, device=where).flip(0)
        first = Scan(x, dt, -rate, B, C, Segments.build(lengths, where))
        second = Scan(x, dt * 0.5, -rate, B, C, Segments.build(lengths, where), index=backwards)
        (y, states), (reverse, _) = form(first, second, normalized=True)
        yield _results(y.square().sum() + reverse.square().sum() + states.sum(), (y, states, reverse), leaves)


def _windows(device, backend: str) -> Iterator[list[torch.Tensor]]:
    """Attention inside windows of several sizes, by PyTorch in float32 and by a kernel in bfloat16."""
    from .attention.varlen import varlen_attention
    from .attention.window import by_size

    sizes, lengths, (h, g, d) = ((2, 3), (1, 70)), (3, 3, 70), (4, 2, 64)
    offsets = torch.tensor((0, *lengths), device=device).cumsum(0, dtype=torch.int32)
    exact = partial(by_size, sizes=sizes), torch.device("cpu"), torch.float32
    tried = partial(varlen_attention, offsets=offsets, longest=70, backend=backend), device, torch.bfloat16
    for form, where, dtype in (exact, tried):
        leaves = _leaves(where, dtype, *((sum(lengths), heads, d) for heads in (h, g, g)))
        y = form(*(4 * leaf - 2 for leaf in leaves))
        yield _results(y.float().square().sum(), [y], leaves)


def _taps(device) -> Iterator[list[torch.Tensor]]:
    """The short convolution, by its definition and by causal-conv1d."""
    from .conv.causal_conv import Taps, by_causal_conv1d

    for form, where in ((Taps.apply, torch.device("cpu")), (by_causal_conv1d, device)):
        leaves = _leaves(where, torch.float32, (70, 16), (4, 16))
        y = form(*leaves)
        yield _results(y.square().sum(), [y], leaves)


# what a message calls the kernels, expected and actual results, and the relative error that is too much
_KERNELS: dict[str, tuple[str, Callable, float]] = {
    "triton": ("the Triton kernels", partial(_scans, backend="triton"), 1e-2),
    "mamba_ssm": ("mamba-ssm's kernels", partial(_scans, backend="mamba_ssm"), 5e-2),
    "flash_attn": ("flash-attn's kernels", partial(_windows, backend="flash_attn"), 5e-2),
    "torch_varlen": ("PyTorch's varlen kernels", partial(_windows, backend="torch_varlen"), 5e-2),
    "causal_conv1d": ("causal-conv1d's kernels", _taps, 1e-2),
}
