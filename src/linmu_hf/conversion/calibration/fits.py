"""Least-squares fits of one M-MATE layer to its targets, in place, over any number of batches.

code      meaning
z         what the output projections of both branches see: [lambda flex, (1 - lambda) near], [n, 2 h p]
target    what the layer should give, [n, d], see [`LayerStates`]
W         [W_O,Flex, W_O,Swin], [d, 2 h p]; W_0 is the teacher's W_O twice (Eq. 4 and 5)
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .walk import LayerStates


# Smallest and largest lambda that is set: beyond, its sigmoid would hardly learn.
SHARES = (0.02, 0.98)

# What features of C may be multiplied by: from a scale on, a head's weights are nearly one key's, and hardly learn.
SCALES = (1.0, 2.0, 4.0)

# What may be added to the direction gate's g before its sigmoid.
GATES = (0.0, -2.0, 2.0)

# Tokens of which the output of every head is held apart.
SOME_TOKENS = 256

# How often every head chooses its setting, given those of the others.
ROUNDS = 10

# Values of parameters whose first dimension is the heads; the first setting of several is the one that is there.
Setting = dict[nn.Parameter, Tensor]


def fit_shares(mixer: nn.Module, batches: Iterable[LayerStates]) -> None:
    """
    Sets lambda of every head, for text and for vision tokens, where the output is nearest to the target as if it were
    one number for all tokens. Needs a `text_window`.
    """
    for name, (gram, cross) in _share_sums(mixer, batches, [{}]).items():
        gram, cross = gram[:, 0, :, 0], cross[:, 0]
        ridge = (1e-3 * gram.diagonal().mean()).clamp_min(torch.finfo(gram.dtype).tiny)
        share = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), cross).clamp(*SHARES)
        getattr(mixer, name).bias.copy_(torch.logit(share))


def fit_sharpness(mixer: nn.Module, batches: Iterable[LayerStates]) -> None:
    """Multiplies each head's features of C, if there are any, by one of `SCALES`: sharper ones weigh fewer keys."""
    directions = (mixer.flex_ma.forward_scan, mixer.flex_ma.reverse_scan)
    maps = [direction.c_features for direction in directions if direction.normalized]
    if maps:
        _choose_settings(mixer, batches, [{weight: scale * weight for weight in maps} for scale in SCALES])


def fit_gates(mixer: nn.Module, batches: Iterable[LayerStates]) -> None:
    """Adds one of `GATES` to the direction gate (Eq. 3) of every head, unless every channel has its own."""
    if mixer.config.gate == "head":
        bias = mixer.flex_ma.gate_proj.bias
        _choose_settings(mixer, batches, [{bias: bias + gate} for gate in GATES])


def _choose_settings(mixer, batches: Iterable[LayerStates], settings: Sequence[Setting]) -> None:
    """
    Gives every head the setting with which the output is nearest to the target, whatever lambda is then. Heads choose
    in turn.
    """
    sums = _share_sums(mixer, batches, settings)
    shares = {name: torch.zeros_like(cross) for name, (_, cross) in sums.items()}  # [h, s], one of them per head
    chosen = [0] * mixer.config.num_attention_heads
    for head in list(range(len(chosen))) * ROUNDS:
        best, gain = {}, torch.zeros(len(settings), dtype=torch.float64)
        for name, (gram, cross) in sums.items():
            shares[name][head] = 0
            left = cross[head] - torch.einsum("shk,hk->s", gram[head], shares[name])
            size = gram[head, :, head].diagonal().clamp_min(torch.finfo(gram.dtype).tiny)
            best[name] = (left / size).clamp(*SHARES)
            gain += (best[name] * (2 * left - best[name] * size)).cpu()
        chosen[head] = int(gain.argmax())
        for name, share in best.items():
            shares[name][head, chosen[head]] = share[chosen[head]]
    for parameter in settings[0]:
        parameter.copy_(torch.stack([settings[choice][parameter][head] for head, choice in enumerate(chosen)]))


def _share_sums(
    mixer, batches: Iterable[LayerStates], settings: Sequence[Setting]
) -> dict[str, tuple[Tensor, Tensor]]:
    """
    The least squares in lambda, for vision and for text tokens: what Flex-MA of a head gives over Local-Swin in each
    of s settings, multiplied with itself [h, s, h, s] and with what Local-Swin misses of the target [h, s].
    """
    starts = [parameter.clone() for parameter in settings[0]]
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for mixer_input, target, rope, layout in batches:
        parts = []
        for setting in settings:
            for parameter, value in setting.items():
                parameter.copy_(value)
            parts.append(mixer.parts(mixer_input, rope, layout))
        (_, near, share), target = parts[0], target.flatten(0, 1)
        of_kind = {"text_fusion_proj": layout.near.text[(share[layout.near.text] > 0).any(1)[:, 0]]}
        if layout.vision is not None:
            of_kind["fusion_proj"] = layout.vision
        for name, places in of_kind.items():
            for some in places.split(max(1, SOME_TOKENS // len(settings))):
                y = _by_head(near[some], mixer.local_swin.o_proj)
                far = [_by_head(flex[some], mixer.flex_ma.o_proj) - y for flex, _, _ in parts]
                over, missing = torch.stack(far, dim=2), target[some] - y.sum(1)  # [n, h, s, d] and [n, d]
                gram, cross = torch.einsum("nhsd,nkrd->hskr", over, over), torch.einsum("nhsd,nd->hs", over, missing)
                before = sums.get(name, (0.0, 0.0))
                sums[name] = before[0] + gram, before[1] + cross
    for parameter, start in zip(settings[0], starts, strict=True):
        parameter.copy_(start)
    return sums


def _by_head(part: Tensor, proj: nn.Linear) -> Tensor:
    """What each head adds to the output, [n, h, d] in float64, of a branch [n, h, p]."""
    return torch.einsum("nhp,dhp->nhd", part, proj.weight.unflatten(1, part.shape[1:])).double()


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


def outputs(mixer: nn.Module, states: LayerStates) -> tuple[Tensor, Tensor]:
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
