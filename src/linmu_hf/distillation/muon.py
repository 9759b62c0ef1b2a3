"""Muon (Jordan et al., 2024) for the matrices of the mixers, AdamW for all else.

The momentum of a matrix is replaced by the nearest matrix with orthonormal rows or columns: every direction in which
the loss still falls gets a step of the same length, not only the few that dominate the gradient. A projection to heads
is as many matrices as heads.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from .engines.processes import spread_like, whole_tensor


# Newton-Schulz coefficients of Muon: singular values go to 0.7 to 1.2 in five steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5

# Root mean square of an update at learning rate 1, so that matrices and AdamW's parameters share one rate.
UPDATE_RMS = 0.5


def orthogonalise(matrices: Tensor) -> Tensor:
    """
    Returns about U V^T of every matrix U S V^T.

    Args:
        matrices (`Tensor` of shape `[..., r, c]`): The larger of r and c may be either.
    """
    a, b, c = COEFFICIENTS
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)  # whose squares do not underflow
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


class Muon(AdamW):
    """
    AdamW whose groups may set `heads`: their parameters are that many matrices, stacked by the first axis, and take
    Muon's steps. 0 or no entry leaves a group to AdamW.

    Args:
        params (`list[dict]`): Parameter groups.
        momentum (`float`, *optional*, defaults to 0.95): Of the matrices, in Nesterov's form.
        kwargs: Of [`~torch.optim.AdamW`].
    """

    param_groups: list[dict[str, Any]]

    def __init__(self, params, momentum: float = 0.95, **kwargs):
        super().__init__(params, **kwargs)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        for group in groups:
            if group.get("heads"):
                self._step_matrices(group)
        self.param_groups = [group for group in groups if not group.get("heads")]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _step_matrices(self, group) -> None:
        alike: dict[tuple, list[tuple[Tensor, Tensor]]] = {}  # one product for all of one shape
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"], state["exp_avg"] = torch.tensor(0.0), torch.zeros_like(parameter)  # named as AdamW's
            state["step"] += 1
            average = state["exp_avg"].lerp_(parameter.grad, 1 - self.momentum)
            gradient = parameter.grad.lerp(average, self.momentum)
            gradient = whole_tensor(gradient)  # FSDP2 holds a part of every matrix
            if gradient.ndim == 2:
                gradient = gradient.unflatten(0, (group["heads"], -1))
            alike.setdefault(gradient.shape, []).append((parameter, gradient))
        for shape, pairs in alike.items():
            update = orthogonalise(torch.stack([gradient for _, gradient in pairs]))
            update = update * (UPDATE_RMS * max(shape[-2:]) ** 0.5)
            for (parameter, _), own in zip(pairs, update):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(spread_like(own.reshape(parameter.shape), parameter), alpha=-group["lr"])
