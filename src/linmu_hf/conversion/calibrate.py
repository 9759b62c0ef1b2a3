"""A closed-form start: how branches are joined, their output projections and the output norm, fitted to the teacher's
attention on a few samples, layer by layer.

Lambda of every head is set first, one value for text and one for vision tokens; heads whose scan says little start
near 0. Then, if steps are asked for, Adam trains what the scan reads, how long it keeps it and how the branches are
joined. The output projections follow, by ridge regression. Every layer is fed with the teacher's hidden states, as in
the alignment that trains it next.

What fits some rows, or single layers, may lead the whole astray. So the student then runs on held-out rows, and each
of these fits is kept, in all layers, only if the last hidden states come nearer to the teacher's.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..modeling.mixers import recurrent_layers
from .calibration import fits
from .calibration.walk import Walk


# What is fitted, of a mixer's parameters.
FITTED = rf"^(flex_ma\.o_proj\.weight|local_swin\.o_proj\.weight|output_norm\.\w+)$|{fits.SCAN}"


@dataclass(frozen=True)
class LayerReport:
    """
    The result for one layer: its relative error |output - target|^2 / |target|^2 on held-out rows, fed with the
    teacher's hidden states, before and after; how much the norm of its output projections grew; and the smallest sum
    of weights that an output of Flex-MA is divided by there.
    """

    layer: int
    error_before: float
    error_after: float
    weight_growth: float
    smallest_normalizer: float

    def __str__(self) -> str:
        figures = f"  {self.layer:5d}   {self.error_before:12.4f} {self.error_after:8.4f}   x {self.weight_growth:.2f}"
        return f"{figures}   {self.smallest_normalizer:23.1e}"


@dataclass(frozen=True)
class CalibrationReport:
    """
    The result of a calibration: what it did to every M-MATE layer, the fits that were kept, the relative error of the
    student's last hidden states on its own path over held-out rows, before and after, and the names of the parameters
    that may have changed.
    """

    layers: list[LayerReport]
    kept: list[str]
    path_before: float
    path_after: float
    changed: list[str]

    def __str__(self) -> str:
        head = "  layer   error before    after   weight norm   smallest normalizer"
        n = len(self.layers)
        before, after = (
            sum(getattr(one, name) for one in self.layers) / n for name in ("error_before", "error_after")
        )
        mean = f"  {'mean':>5}   {before:12.4f} {after:8.4f}"
        kept = f"  kept: {', '.join(self.kept) or 'nothing'}"
        path = (
            f"  last hidden states on the student's own path: error {self.path_before:.4f}, now {self.path_after:.4f}"
        )
        return "\n".join([head, *map(str, self.layers), mean, kept, path])

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
    scan_steps: int = 0,
) -> CalibrationReport:
    """
    Fits lambda, the output projections and the output norm of every M-MATE layer, in place, and with `scan_steps` what
    its scan reads.

    Memory beside the models: on their device 16 h p (2 h p + d) bytes of sums and what one layer needs for one batch,
    however many layers there are; on the CPU three hidden states of every batch and a copy of what may change.

    Args:
        student (`LinMUForConditionalGeneration`): The converted model.
        teacher (`LinMUForConditionalGeneration`): Its teacher, from [`load_teacher`].
        batches (`Iterable[Mapping[str, torch.Tensor]]`): Model inputs; if there are several, the last one is held out
            to measure the error.
        strength (`float`, *optional*, defaults to 0.1): How strongly projections are pulled to what they were, as a
            fraction of the mean eigenvalue of what they read.
        max_growth (`float`, *optional*, defaults to 1.5): Largest growth of their norm.
        scan_steps (`int`, *optional*, defaults to 0): Steps of Adam for features, step sizes and joins of the scan,
            on one batch each, see [`fit_scan`]; 0 leaves them as they are.

    Returns:
        [`CalibrationReport`]

    Raises:
        `ValueError`: There is no batch, a number is out of range, or no layer has anything to fit.
    """
    if strength <= 0 or max_growth < 1:
        raise ValueError(f"strength={strength} must be positive and max_growth={max_growth} at least 1")
    if scan_steps < 0:
        raise ValueError(f"scan_steps={scan_steps} must be 0, for no training, or more")
    text = student.model.language_model
    layers = recurrent_layers(text.config.layer_types)
    if not layers:
        raise ValueError("every layer of the student keeps the teacher's attention: there is nothing to calibrate")
    walk = Walk(student, teacher, batches)
    start = path = walk.path_error()
    kept: list[str] = []
    reports: dict[int, LayerReport] = {}
    ways: dict[str, Callable] = {"lambda": _share}
    if scan_steps:
        ways["scan"] = partial(_train_scan, steps=scan_steps)
    ways["projections"] = partial(_project, strength=strength, max_growth=max_growth)
    for name, fit in ways.items():
        weights = {layer: _copies(text.layers[layer].mixer) for layer in layers}
        found = _fit_all(walk, layers, fit, name)
        error = walk.path_error()
        if error < path:  # NaN is not
            path = error
            kept.append(name)
        else:
            for layer in layers:
                for weight, parameter in _fitted(text.layers[layer].mixer).items():
                    parameter.copy_(weights[layer][weight])
            found = {
                layer: replace(one, error_after=one.error_before, weight_growth=1.0) for layer, one in found.items()
            }
        reports = {
            layer: replace(one, error_before=reports.get(layer, one).error_before) for layer, one in found.items()
        }
    changed = [
        f"model.language_model.layers.{layer}.mixer.{name}"
        for layer in layers
        for name in _fitted(text.layers[layer].mixer)
    ]
    return CalibrationReport(list(reports.values()), kept, start, path, changed)


def _fit_all(walk: Walk, layers: Sequence[int], fit: Callable, name: str) -> dict[int, LayerReport]:
    """Takes one kind of fit in all layers."""
    reports = {}
    bar = tqdm(walk.layers(), total=len(walk.ours.layers), desc=f"calibrating, {name}", unit="layer")
    for layer in bar:
        if layer not in layers:
            continue
        mixer = walk.ours.layers[layer].mixer
        fitted, held_out = (partial(walk.states, layer, rows) for rows in (walk.fitted, [walk.held_out]))
        before, _ = fits.measure(mixer, held_out())
        growth = fit(mixer, fitted)
        after, normalizer = fits.measure(mixer, held_out())
        reports[layer] = LayerReport(layer, before, after, growth, normalizer)
        bar.set_postfix({"error": f"{before:.3f} -> {after:.3f}"})
    return reports


def _share(mixer: nn.Module, states: Callable) -> float:
    fits.fit_shares(mixer, states())
    return 1.0


def _train_scan(mixer: nn.Module, states: Callable, steps: int) -> float:
    fits.fit_scan(mixer, states, steps)
    return 1.0


def _project(mixer: nn.Module, states: Callable, strength: float, max_growth: float) -> float:
    growth = fits.fit_projections(mixer, states(), strength, max_growth)
    fits.fit_norm(mixer, states())
    return growth


def _fitted(mixer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in mixer.named_parameters() if re.search(FITTED, name)}


def _copies(mixer: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in _fitted(mixer).items()}
