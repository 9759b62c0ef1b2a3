"""A closed-form start: how branches are joined, their output projections and the output norm, fitted to the teacher's
attention on a few samples.

    code      meaning
    z         what the output projections of both branches see: [lambda flex, (1 - lambda) near], [n, 2 h p]
    target    the teacher's attention output, [n, d]
    W         [W_O,Flex, W_O,Swin], [d, 2 h p]; W_0 is the teacher's W_O twice (Eq. 4 and 5)

Every block is fed with the teacher's own input. With a `text_window`, lambda of every head is set first, one value for
text and one for vision tokens, where it minimises the error; heads whose scan says little start near 0. Then W
minimises |W z - target|^2 + alpha |W - W_0|^2 over real tokens. The pull toward W_0 is what keeps the solution
trainable: nearly free regression fits better and leaves weights many times the teacher's norm, which the first steps
of training blow up.

A fit on the teacher's inputs may still lead the student away on its own, where errors add up. So the student runs on
the held-out batch after each of the two fits, and keeps the weights whose last hidden states were nearest.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from ..modeling.mixers import recurrent_layers


# What is fitted, of a mixer's parameters.
FITTED = r"^(flex_ma\.o_proj\.weight|local_swin\.o_proj\.weight|(text_)?fusion_proj\.bias|output_norm\.\w+)$"

# Smallest and largest lambda that is set: beyond, its sigmoid would hardly learn.
SHARES = (0.02, 0.98)

# Tokens of which the output of every head is held apart.
SOME_TOKENS = 256


@dataclass(frozen=True)
class CalibrationReport:
    """
    Relative error |student - teacher|^2 / |teacher|^2 of every M-MATE layer, before and after, on the held-out batch,
    and the smallest sum of weights there that an output of Flex-MA is divided by.
    """

    layers: list[int]
    error_before: list[float]
    error_after: list[float]
    weight_growth: list[float]  # |W| / |W_0|
    smallest_normalizer: list[float]
    path: dict[str, float]  # relative error of the student's last hidden states: start, lambda, projections
    changed: list[str]

    def __str__(self) -> str:
        lines = ["  layer   error before   after   weight norm   smallest normalizer"]
        for layer, before, after, growth, normalizer in zip(
            self.layers, self.error_before, self.error_after, self.weight_growth, self.smallest_normalizer, strict=True
        ):
            lines.append(f"  {layer:5d}   {before:12.3f} {after:7.3f}   x {growth:.2f}   {normalizer:23.1e}")
        n = max(len(self.layers), 1)
        lines.append(f"  {'mean':>5}   {sum(self.error_before) / n:12.3f} {sum(self.error_after) / n:7.3f}")
        kept = min((step for step, error in self.path.items() if error == error), key=self.path.__getitem__)
        errors = ", ".join(f"{step} {error:.3f}" for step, error in self.path.items())
        lines.append(f"  last hidden states on the student's own path: {errors}; kept: {kept}")
        return "\n".join(lines)

    def to_dict(self) -> dict:
        return asdict(self)


@torch.no_grad()
def calibrate(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    *,
    strength: float = 0.1,
    max_growth: float = 1.5,
    layers_at_once: int | None = None,
) -> CalibrationReport:
    """
    Fits lambda, the output projections and the output norm of every M-MATE layer, in place.

    Args:
        student (`LinMUForConditionalGeneration`): The converted model.
        teacher (`LinMUForConditionalGeneration`): Its teacher, from [`load_teacher`].
        batches (`Sequence[Mapping[str, torch.Tensor]]`): Model inputs; if there are several, the last one is held out
            to measure the error.
        strength (`float`, *optional*, defaults to 0.1): alpha, as a fraction of the mean eigenvalue of sum z z^T.
        max_growth (`float`, *optional*, defaults to 1.5): Largest |W| / |W_0|; alpha is raised until it holds.
        layers_at_once (`int`, *optional*): Layers fitted in one pass over the teacher, by default all. Each takes
            16 h p (2 h p + d) bytes meanwhile.

    Returns:
        [`CalibrationReport`]
    """
    batches = list(batches)
    if not batches:
        raise ValueError("calibration needs at least one batch")
    if strength <= 0 or max_growth < 1:
        raise ValueError(f"strength={strength} must be positive and max_growth={max_growth} at least 1")
    fitted, held_out = (batches[:-1], batches[-1:]) if len(batches) > 1 else (batches, batches)
    text = student.model.language_model
    layers = recurrent_layers(text.config.layer_types)
    before, _ = _errors(student, teacher, held_out, layers)
    mixers = {layer: text.layers[layer].mixer for layer in layers}
    names = [
        f"model.language_model.layers.{layer}.mixer.{name}"
        for layer, mixer in mixers.items()
        for name, _ in mixer.named_parameters()
        if re.search(FITTED, name)
    ]
    path = {"start": _path_error(student, teacher, held_out)}
    best = _weights(student, names)
    growth = dict.fromkeys(layers, 1.0)

    def keep_if_better(step: str) -> bool:
        path[step] = _path_error(student, teacher, held_out)
        if not path[step] <= min(path.values()):  # NaN is not better
            return False
        best.update(_weights(student, names))
        return True

    _fit_shares(student, teacher, fitted, mixers)
    keep_if_better("lambda")
    _restore(student, best)
    grown = {}
    n = layers_at_once or max(len(layers), 1)
    for first in range(0, len(layers), n):
        group = layers[first : first + n]
        d, width = mixers[group[0]].flex_ma.o_proj.weight.shape
        moments = {layer: _Moments(2 * width, d, text.embed_tokens.weight.device) for layer in group}
        for states in tqdm(_states(student, teacher, fitted), total=len(fitted), desc="calibrating"):
            for layer in group:
                moments[layer].add(*_features(mixers[layer], *states[layer]))
        for layer in group:
            grown[layer] = _fit_projections(mixers[layer], moments[layer], strength, max_growth)
    _fit_norms(student, teacher, fitted, layers)
    if keep_if_better("projections"):
        growth = grown
    _restore(student, best)
    after, normalizer = _errors(student, teacher, held_out, layers)
    return CalibrationReport(
        layers=layers,
        error_before=[before[layer] for layer in layers],
        error_after=[after[layer] for layer in layers],
        weight_growth=[growth[layer] for layer in layers],
        smallest_normalizer=[normalizer[layer] for layer in layers],
        path=path,
        changed=names,
    )


def _weights(student, names: Sequence[str]) -> dict[str, torch.Tensor]:
    return {name: student.get_parameter(name).clone() for name in names}


def _restore(student, weights: Mapping[str, torch.Tensor]) -> None:
    for name, value in weights.items():
        student.get_parameter(name).copy_(value)


def _path_error(student, teacher, batches) -> float:
    """Relative error of the student's last hidden states on its own path, over real tokens."""
    wrong = size = 0.0
    for batch in batches:
        batch = {name: value.to(student.device) for name, value in batch.items() if name != "labels"}
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        ours, theirs = (
            model.model(**batch, use_cache=False).last_hidden_state[real].double() for model in (student, teacher)
        )
        wrong += float((ours - theirs.to(ours.device)).square().sum())
        size += float(theirs.square().sum())
    return wrong / size


def _fit_shares(student, teacher, batches, mixers) -> None:
    """Sets lambda of every head where the output is nearest to the target, as if it were one number for all tokens."""
    mixers = {layer: mixer for layer, mixer in mixers.items() if mixer.config.text_window}
    sums: dict[tuple[int, str], list[torch.Tensor]] = {}
    for states in _states(student, teacher, batches) if mixers else ():
        for layer, mixer in mixers.items():
            mixer_input, target, rope, layout = states[layer]
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
                    sums[layer, name] = [a + b for a, b in zip(sums.get((layer, name), (0.0, 0.0)), found)]
    for (layer, name), (gram, cross) in sums.items():
        ridge = (1e-3 * gram.diagonal().mean()).clamp_min(torch.finfo(gram.dtype).tiny)
        share = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), cross).clamp(*SHARES)
        getattr(mixers[layer], name).bias.copy_(torch.logit(share))


class _Moments:
    """Sums over tokens, in float64: all that a least-squares fit needs of its data."""

    def __init__(self, width: int, d: int, device: torch.device):
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)  # z z^T
        self.cross = torch.zeros(d, width, dtype=torch.float64, device=device)  # target z^T

    def add(self, z: torch.Tensor, target: torch.Tensor) -> None:
        z, target = z.double(), target.double()
        self.gram.addmm_(z.T, z)
        self.cross.addmm_(target.T, z)


def positions_of(student, batch):
    """Returns a batch on the student's device, without labels, with its mask, positions and vision layout."""
    device = student.model.language_model.embed_tokens.weight.device
    batch = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids")
    mask = batch.get("attention_mask")
    grids = {name: batch.get(name) for name in names}
    return batch, mask, *student.model.get_positions(batch["input_ids"], mask, **grids)


def _states(student, teacher, batches) -> Iterator[list[tuple]]:
    """For every batch, per layer: the mixer input and output of the teacher, rotary embeddings and token layout."""
    text = student.model.language_model
    device = text.embed_tokens.weight.device
    for batch in batches:
        batch, mask, positions, vision_layout = positions_of(student, batch)
        known = teacher.model(
            **batch,
            position_ids=positions,
            vision_layout=vision_layout,
            use_cache=False,
            output_mixer_states=True,
        )
        inputs = [state.to(device, text.embed_tokens.weight.dtype) for state in known.mixer_inputs]
        rope, layout, _ = text.prepare(inputs[0], mask, positions, vision_layout, None)
        yield [
            (mixer_input, target.to(device), rope, layout)
            for mixer_input, target in zip(inputs, known.mixer_outputs, strict=True)
        ]


def _features(mixer, mixer_input, target, rope, layout) -> tuple[torch.Tensor, torch.Tensor]:
    """z and target at the real tokens."""
    flex, near = mixer.branches(mixer_input, rope, layout)
    near = torch.zeros_like(flex) if near is None else near.to(flex.dtype)
    order = layout.orders[mixer.config.scan_order(mixer.layer_idx)]
    return torch.cat([flex, near], dim=-1)[order], target.flatten(0, 1)[order]


def _fit_projections(mixer, moments: _Moments, strength: float, max_growth: float) -> float:
    """Ridge regression around the weights that are there; returns how much their norm grew."""
    projections = (mixer.flex_ma.o_proj.weight, mixer.local_swin.o_proj.weight)
    start = torch.cat([weight.double() for weight in projections], dim=-1)
    eye = torch.eye(start.shape[1], dtype=start.dtype, device=start.device)
    alpha = strength * moments.gram.diagonal().mean().clamp_min(torch.finfo(start.dtype).tiny)
    while True:
        solution = torch.linalg.solve(moments.gram + alpha * eye, (moments.cross + alpha * start).T).T
        growth = float(solution.norm() / start.norm())
        if growth <= max_growth:
            break
        alpha = alpha * 2
    for weight, fitted in zip(projections, solution.chunk(2, dim=-1), strict=True):
        weight.copy_(fitted)
    return growth


def _fit_norms(student, teacher, batches, layers) -> None:
    """Gain and bias of every output norm by least squares per channel."""
    text = student.model.language_model
    norms = {layer: text.layers[layer].mixer.output_norm for layer in layers}
    norms = {layer: norm for layer, norm in norms.items() if isinstance(norm, nn.LayerNorm)}
    if not norms:
        return
    for norm in norms.values():
        norm.reset_parameters()
    sums = {layer: torch.zeros(5, norm.weight.numel(), dtype=torch.float64) for layer, norm in norms.items()}
    for states in _states(student, teacher, batches):
        for layer in norms:
            mixer_input, target, rope, layout = states[layer]
            real = next(iter(layout.orders.values()))
            y = text.layers[layer].mixer(mixer_input, rope, layout).flatten(0, 1)[real].double().cpu()
            target = target.flatten(0, 1)[real].double().cpu()
            sums[layer] += torch.stack([torch.ones_like(y), y, target, y * y, y * target]).sum(1)
    for layer, norm in norms.items():
        count, y, target, yy, y_target = sums[layer]
        gain = (y_target - y * target / count) / (yy - y * y / count).clamp_min(torch.finfo(yy.dtype).tiny)
        norm.weight.copy_(gain)
        norm.bias.copy_((target - gain * y) / count)


def _errors(student, teacher, batches, layers) -> tuple[dict[int, float], dict[int, float]]:
    """Relative error and smallest normaliser of every layer, fed with the teacher's input, over real tokens."""
    text = student.model.language_model
    wrong, size, normalizer = (dict.fromkeys(layers, start) for start in (0.0, 0.0, float("inf")))
    for states in _states(student, teacher, batches):
        for layer in layers:
            mixer_input, target, rope, layout = states[layer]
            real = next(iter(layout.orders.values()))
            mixer = text.layers[layer].mixer
            y = mixer(mixer_input, rope, layout).flatten(0, 1)[real].double()
            target = target.flatten(0, 1)[real].double()
            wrong[layer] += float((y - target).square().sum())
            size[layer] += float(target.square().sum())
            normalizer[layer] = min(normalizer[layer], mixer.smallest_normalizer(mixer_input, rope, layout))
    return {layer: wrong[layer] / size[layer] for layer in layers}, normalizer
