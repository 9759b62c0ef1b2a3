"""A closed-form start: how branches are joined, their output projections and the output norm, fitted to the teacher's
attention on a few samples, layer by layer.

Lambda of every head is set first, one value for text and one for vision tokens; heads whose scan says little start
near 0. Then the output projections follow, by ridge regression. A layer is fitted on what the student itself has
reached with the layers before, so that it makes up for what they have missed.

What fits some rows may lead others away. So after each fit the student runs on held-out rows from this layer to its
end, and keeps the weights whose last hidden states are nearest to the teacher's.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..modeling.mixers import recurrent_layers
from .calibration import fits
from .calibration.walk import Walk


# What is fitted, of a mixer's parameters.
FITTED = r"^(flex_ma\.o_proj\.weight|local_swin\.o_proj\.weight|(text_)?fusion_proj\.bias|output_norm\.\w+)$"


@dataclass(frozen=True)
class LayerReport:
    """
    What became of one layer: its relative error |output - target|^2 / |target|^2 on held-out rows, before and after,
    where the target leads from what the student has reached to the teacher's hidden states after this mixer; how much
    the norm of its output projections grew; the smallest sum of weights that an output of Flex-MA is divided by there;
    and the fits that were kept.
    """

    layer: int
    error_before: float
    error_after: float
    weight_growth: float
    smallest_normalizer: float
    kept: list[str]

    def __str__(self) -> str:
        figures = f"  {self.layer:5d}   {self.error_before:12.4f} {self.error_after:8.4f}   x {self.weight_growth:.2f}"
        return f"{figures}   {self.smallest_normalizer:23.1e}   {', '.join(self.kept) or 'nothing'}"


@dataclass(frozen=True)
class CalibrationReport:
    """
    What a calibration did to every M-MATE layer, the relative error of the student's last hidden states on its own
    path over held-out rows, before and after, and the names of the parameters that may have changed.
    """

    layers: list[LayerReport]
    path_before: float
    path_after: float
    changed: list[str]

    def __str__(self) -> str:
        head = "  layer   error before    after   weight norm   smallest normalizer   kept"
        n = len(self.layers)
        before, after = (
            sum(getattr(one, name) for one in self.layers) / n for name in ("error_before", "error_after")
        )
        mean = f"  {'mean':>5}   {before:12.4f} {after:8.4f}"
        path = (
            f"  last hidden states on the student's own path: error {self.path_before:.4f}, now {self.path_after:.4f}"
        )
        return "\n".join([head, *map(str, self.layers), mean, path])

    def to_dict(self) -> dict:
        return asdict(self)


@torch.no_grad()
def calibrate(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    strength: float = 0.1,
    max_growth: float = 1.5,
) -> CalibrationReport:
    """
    Fits lambda, the output projections and the output norm of every M-MATE layer, in place.

    Memory beside the models: on their device 16 h p (2 h p + d) bytes of sums and what one layer needs for one batch;
    on the CPU three hidden states of every batch, however many layers there are.

    Args:
        student (`LinMUForConditionalGeneration`): The converted model.
        teacher (`LinMUForConditionalGeneration`): Its teacher, from [`load_teacher`].
        batches (`Iterable[Mapping[str, torch.Tensor]]`): Model inputs; if there are several, the last one is held out
            to measure the error.
        strength (`float`, *optional*, defaults to 0.1): How strongly projections are pulled to what they were, as a
            fraction of the mean eigenvalue of what they read.
        max_growth (`float`, *optional*, defaults to 1.5): Largest growth of their norm.

    Returns:
        [`CalibrationReport`]

    Raises:
        `ValueError`: There is no batch, a number is out of range, or no layer has anything to fit.
    """
    if strength <= 0 or max_growth < 1:
        raise ValueError(f"strength={strength} must be positive and max_growth={max_growth} at least 1")
    text = student.model.language_model
    layers = recurrent_layers(text.config.layer_types)
    if not layers:
        raise ValueError("every layer of the student keeps the teacher's attention: there is nothing to calibrate")
    walk = Walk(student, teacher, batches)
    reports = []
    start = path = walk.path_error(0)
    bar = tqdm(range(len(text.layers)), desc="calibrating", unit="layer")
    for layer in bar:
        walk.enter(layer)
        if layer in layers:
            report, path = _fit_layer(walk, layer, path, strength, max_growth)
            reports.append(report)
        walk.leave(layer)
        bar.set_postfix({"error of the last states": f"{path:.4g}"})
    changed = [
        f"model.language_model.layers.{layer}.mixer.{name}"
        for layer in layers
        for name in _fitted(text.layers[layer].mixer)
    ]
    return CalibrationReport(reports, start, path, changed)


def _fit_layer(walk: Walk, layer: int, path: float, strength: float, max_growth: float) -> tuple[LayerReport, float]:
    """Takes one fit of a layer after the other, and keeps those that lessen `path`; returns what that is then."""
    mixer = walk.ours.layers[layer].mixer
    fitted, held_out = (partial(walk.states, layer, rows) for rows in (walk.fitted, walk.held_out))
    before, _ = fits.measure(mixer, held_out())
    growth, kept = 1.0, []

    def project() -> float:
        growth = fits.fit_projections(mixer, fitted(), strength, max_growth)
        fits.fit_norm(mixer, fitted())
        return growth

    for name, fit in {"lambda": lambda: fits.fit_shares(mixer, fitted()), "projections": project}.items():
        weights = {name: parameter.clone() for name, parameter in _fitted(mixer).items()}
        grown, error = fit(), walk.path_error(layer)
        if error < path:  # NaN is not
            path, growth = error, grown or growth
            kept.append(name)
        else:
            for name, parameter in _fitted(mixer).items():
                parameter.copy_(weights[name])
    after, normalizer = fits.measure(mixer, held_out())
    return LayerReport(layer, before, after, growth, normalizer, kept), path


def _fitted(mixer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in mixer.named_parameters() if re.search(FITTED, name)}
