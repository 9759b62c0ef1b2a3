"""Our kernels are tried once on every device before `backend="auto"` relies on them there."""

import logging

import torch

from .ssd_torch import ssd_recurrence


logger = logging.getLogger(__name__)

_TRIALS: dict[torch.device, str | None] = {}


@torch.compiler.assume_constant_result
def failed_trial(device: torch.device) -> str | None:
    """
    What speaks against our kernels on a device, tried once on a small scan; `None` if they answer and differentiate
    like the recurrence. A driver, a GPU or a Triton that they were never tried on must not give wrong answers.
    """
    if device not in _TRIALS:
        _TRIALS[device] = _try_kernels(device)
        if _TRIALS[device]:
            logger.warning(f"selective scan: {_TRIALS[device]}. Plain PyTorch takes over")
    return _TRIALS[device]


def _try_kernels(device: torch.device) -> str | None:
    generator = torch.Generator().manual_seed(0)
    lengths, (g, h, p, k) = (1, 150), (2, 4, 16, 32)
    shapes = ((sum(lengths), g, p), (sum(lengths), h), (h,), (sum(lengths), g, k), (sum(lengths), h, k))
    inputs = [torch.rand(shape, generator=generator) for shape in shapes]
    inputs[2] = -inputs[2]
    results = []
    try:
        from .ssd import Segments
        from .ssd_triton import ssd_triton

        for form, where in ((ssd_recurrence, torch.device("cpu")), (ssd_triton, device)):
            leaves = [value.to(where).requires_grad_() for value in inputs]
            x, dt, A, B, C = leaves
            y, states = form(x, dt, A, B, C, Segments.build(lengths, where), None)
            grads = torch.autograd.grad(y.square().sum() + states.sum(), leaves)
            results.append([one.detach().cpu() for one in (y, states, *grads)])
    except Exception as error:
        return f"the Triton kernels fail on {device} ({type(error).__name__}: {error})"
    worst = max(float((one - right).abs().max() / right.abs().max()) for right, one in zip(*results))
    return None if worst < 1e-2 else f"the Triton kernels are wrong on {device} (relative error {worst:.2g})"
