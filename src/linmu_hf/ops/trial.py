"""Our kernels are tried once on every device before `backend="auto"` relies on them there."""

import logging
from functools import partial

import torch


logger = logging.getLogger(__name__)

_TRIALS: dict[torch.device, str | None] = {}


@torch.compiler.assume_constant_result
def failed_trial(device: torch.device) -> str | None:
    """
    What speaks against our kernels on a device, tried once on a small pair of scans; `None` if they answer and
    differentiate like the recurrence. A driver, a GPU or a Triton that they were never tried on must not give wrong
    answers.
    """
    if device not in _TRIALS:
        _TRIALS[device] = _try_kernels(device)
        if _TRIALS[device]:
            logger.warning(f"selective scan: {_TRIALS[device]}. Plain PyTorch takes over")
    return _TRIALS[device]


def _try_kernels(device: torch.device) -> str | None:
    generator = torch.Generator().manual_seed(0)
    lengths, (g, h, p, k) = (1, 150), (2, 4, 16, 32)
    n = sum(lengths)
    shapes = {"x": (n, g, p), "dt": (n, h), "A": (h,), "B": (n, g, k), "C": (n, h, k)}
    inputs = [torch.rand(shape, generator=generator) for shape in shapes.values()]
    inputs[2] = -inputs[2]
    results = []
    try:
        from .ssd import Scan, Segments, ssd_pair
        from .ssd_triton import ssd_triton_pair

        for form, where in ((partial(ssd_pair, backend="recurrence"), torch.device("cpu")), (ssd_triton_pair, device)):
            leaves = [value.to(where).requires_grad_() for value in inputs]
            x, dt, A, B, C = leaves
            backwards = torch.arange(n, device=where).flip(0)
            first = Scan(x, dt, A, B, C, Segments.build(lengths, where))
            second = Scan(x, dt * 0.5, A, B, C, Segments.build(lengths, where), index=backwards)
            (y, states), (reverse, _) = form(first, second, normalized=True)
            grads = torch.autograd.grad(y.square().sum() + reverse.square().sum() + states.sum(), leaves)
            results.append([one.detach().cpu() for one in (y, states, reverse, *grads)])
    except Exception as error:
        return f"the Triton kernels fail on {device} ({type(error).__name__}: {error})"
    worst = max(float((one - right).abs().max() / right.abs().max()) for right, one in zip(*results))
    return None if worst < 1e-2 else f"the Triton kernels are wrong on {device} (relative error {worst:.2g})"
