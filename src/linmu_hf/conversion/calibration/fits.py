"""Least-squares fits of one M-MATE layer to its targets, in place, over any number of batches.

code      meaning
z         what the output projections of both branches see: [lambda flex, (1 - lambda) near], [n, 2 h p]
target    the teacher's attention output, [n, d]
W         [W_O,Flex, W_O,Swin], [d, 2 h p]; W_0 is the teacher's W_O twice (Eq. 4 and 5)
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .walk import LayerStates


# Smallest and largest lambda that is set: beyond, its sigmoid would hardly learn.
SHARES = (0.02, 0.98)

# What `fit_scan` trains of a mixer's parameters.
SCAN = r"^(flex_ma\.\w+_scan\.(\w_features|dt_proj\.weight|dt_bias)|flex_ma\.gate_proj\.\w+|(text_)?fusion_proj\.\w+)$"

# Tokens of which the output of every head is held apart.
SOME_TOKENS = 256


def fit_shares(mixer: nn.Module, batches: Iterable[LayerStates]) -> None:
    """
    Sets lambda of every head, for text and for vision tokens, where the output is nearest to the target as if it were
    one number for all tokens. Without a `text_window` nothing is set.
    """
    if not mixer.config.text_window:
        return
    sums: dict[str, list[Tensor]] = {}
    for mixer_input, target, rope, layout in batches:
        flex, near, share = mixer.parts(mixer_input, rope, layout)
        of_kind = {"text_fusion_proj": layout.near.text[(share[layout.near.text] > 0).any(1)[:, 0]]}
        if layout.vision is not None:
            of_kind["fusion_proj"] = layout.vision
        for name, places in of_kind.items():
            for some in places.split(SOME_TOKENS):
                y, far = (
                    torch.einsum("nhp,dhp->nhd", part[some], proj.weight.unflatten(1, part.shape[1:])).double()
                    for part, proj in ((near, mixer.local_swin.o_proj), (flex, mixer.flex_ma.o_proj))
                )
                far, missing = far - y, target.flatten(0, 1)[some].double() - y.sum(1)
                found = [torch.einsum("nhd,nkd->hk", far, far), torch.einsum("nhd,nd->h", far, missing)]
                sums[name] = [a + b for a, b in zip(sums.get(name, (0.0, 0.0)), found)]
    for name, (gram, cross) in sums.items():
        ridge = (1e-3 * gram.diagonal().mean()).clamp_min(torch.finfo(gram.dtype).tiny)
        share = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), cross).clamp(*SHARES)
        getattr(mixer, name).bias.copy_(torch.logit(share))


def fit_projections(
    mixer: nn.Module, batches: Iterable[LayerStates], strength: float = 0.1, max_growth: float = 1.5
) -> float:
    """
    Sets W where it minimises |W z - target|^2 + alpha |W - W_0|^2, from the W_0 that is there. The pull toward W_0 is
    what keeps the solution trainable: nearly free regression fits better and leaves weights many times the teacher's
    norm, which the first steps of training blow up.

    Args:
        strength (`float`): alpha, as a fraction of the mean eigenvalue of sum z z^T.
        max_growth (`float`): Largest |W| / |W_0|; alpha is raised until it holds.

    Returns:
        `float`: |W| / |W_0|.
    """
    projections = (mixer.flex_ma.o_proj.weight, mixer.local_swin.o_proj.weight)
    start = torch.cat([weight.double() for weight in projections], dim=-1)
    d, width = start.shape
    gram, cross = start.new_zeros(width, width), start.new_zeros(d, width)  # sums of z z^T and of target z^T
    for states in batches:
        z, target = features(mixer, states)
        gram.addmm_(z.T, z)
        cross.addmm_(target.T, z)
    eye = torch.eye(width, dtype=start.dtype, device=start.device)
    alpha = strength * gram.diagonal().mean().clamp_min(torch.finfo(start.dtype).tiny)
    while True:
        solution = torch.linalg.solve(gram + alpha * eye, (cross + alpha * start).T).T
        growth = float(solution.norm() / start.norm())
        if growth <= max_growth:
            break
        alpha = alpha * 2
    for weight, fitted in zip(projections, solution.chunk(2, dim=-1), strict=True):
        weight.copy_(fitted)
    return growth


def fit_scan(
    mixer: nn.Module, batches: Callable[[], Iterable[LayerStates]], steps: int, learning_rate: float = 1e-2
) -> None:
    """
    Trains what the scan reads, how long it keeps it and how the branches are joined, `SCAN`, by steps of Adam on
    |y - target|^2 / |target|^2: what no teacher has and no formula gives.

    Args:
        batches (`Callable`): Gives the batches, one for a step; gone through again until there were enough steps.
        learning_rate (`float`): Its peak, after a tenth of the steps; then half a cosine to 0.
    """
    parameters = {name: one for name, one in mixer.named_parameters() if re.search(SCAN, name)}
    trained = {  # in float32 at least: steps become too small for bfloat16
        name: one.detach().to(torch.promote_types(one.dtype, torch.float32)).clone().requires_grad_()
        for name, one in parameters.items()
    }
    optimizer = torch.optim.Adam(trained.values(), betas=(0.9, 0.98))
    warmup = max(1, steps // 10)
    for i, states in enumerate(itertools.islice(itertools.chain.from_iterable(iter(batches, None)), steps)):
        rate = (i + 1) / warmup if i < warmup else 0.5 + 0.5 * math.cos(math.pi * (i - warmup) / (steps - warmup))
        optimizer.param_groups[0]["lr"] = learning_rate * rate
        with torch.enable_grad():
            cast = {name: one.to(parameters[name].dtype) for name, one in trained.items()}
            y, target = outputs(lambda *args, cast=cast: functional_call(mixer, cast, args), states)
            loss = (y - target).square().sum() / target.square().sum()
        optimizer.zero_grad()
        for one, gradient in zip(trained.values(), torch.autograd.grad(loss, trained.values(), allow_unused=True)):
            one.grad = gradient
        optimizer.step()
    for name, one in trained.items():
        parameters[name].copy_(one.detach())


def features(mixer: nn.Module, states: LayerStates) -> tuple[Tensor, Tensor]:
    """Returns z and target at the real tokens, in float64."""
    mixer_input, target, rope, layout = states
    flex, near = mixer.branches(mixer_input, rope, layout)
    near = torch.zeros_like(flex) if near is None else near.to(flex.dtype)
    order = layout.orders[mixer.config.scan_order(mixer.layer_idx)]
    return torch.cat([flex, near], dim=-1)[order].double(), target.flatten(0, 1)[order].double()


def fit_norm(mixer: nn.Module, batches: Iterable[LayerStates]) -> None:
    """Sets gain and bias of the output norm, if it has them, by least squares per channel."""
    norm = mixer.output_norm
    if not isinstance(norm, nn.LayerNorm):
        return
    norm.reset_parameters()
    sums = torch.zeros(5, norm.weight.numel(), dtype=torch.float64, device=norm.weight.device)
    for states in batches:
        y, target = outputs(mixer, states)
        sums += torch.stack([torch.ones_like(y), y, target, y * y, y * target]).sum(1)
    count, y, target, yy, y_target = sums
    gain = (y_target - y * target / count) / (yy - y * y / count).clamp_min(torch.finfo(yy.dtype).tiny)
    norm.weight.copy_(gain)
    norm.bias.copy_((target - gain * y) / count)


def outputs(mixer: Callable, states: LayerStates) -> tuple[Tensor, Tensor]:
    """Returns the mixer's output and the target at the real tokens, [n, d] in float64."""
    mixer_input, target, rope, layout = states
    real = next(iter(layout.orders.values()))
    y = mixer(mixer_input, rope, layout)
    return y.flatten(0, 1)[real].double(), target.flatten(0, 1)[real].double()


def measure(mixer: nn.Module, batches: Iterable[LayerStates]) -> tuple[float, float]:
    """Returns the relative error |y - target|^2 / |target|^2 and the smallest normaliser over real tokens."""
    wrong, size, normalizer = 0.0, 0.0, float("inf")
    for states in batches:
        y, target = outputs(mixer, states)
        wrong += float((y - target).square().sum())
        size += float(target.square().sum())
        mixer_input, _, rope, layout = states
        normalizer = min(normalizer, mixer.smallest_normalizer(mixer_input, rope, layout))
    return wrong / size, normalizer
