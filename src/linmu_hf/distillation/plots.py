"""The curves of a distillation as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


TERMS = {"loss_hid": "L_hid", "loss_tok": "L_tok", "loss_seq": "L_seq", "loss_sup": "L_sup"}
LAYER_PREFIX = "relative_error_layer_"


def plot_training_log(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """
    Draws every loss term and the relative error of every layer over the steps of all stages.

    Args:
        rows (`Sequence[dict]`): rows of `training_log.jsonl`, in order.
        path (`str` or `Path`): where the picture goes.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    rows = [row for row in rows if "loss" in row]
    starts = _stage_starts(rows)
    layers = {int(key.removeprefix(LAYER_PREFIX)) for row in rows for key in row if key.startswith(LAYER_PREFIX)}
    figure = Figure(figsize=(9, 7), layout="constrained")
    losses, errors = figure.subplots(2, 1, sharex=True)
    for key, label in TERMS.items():
        _draw(losses, rows, starts, key, label=label)
    for layer in sorted(layers):
        colour = colormaps["viridis"](layer / max(*layers, 1))
        style = {"label": f"layer {layer}", "color": colour, "alpha": 0.7, "linewidth": 1}
        _draw(errors, rows, starts, f"{LAYER_PREFIX}{layer}", **style)
    _draw(errors, rows, starts, "relative_error", label="mean", color="black")
    for axes, title in ((losses, "loss terms"), (errors, "squared error of the mixers, relative to the teacher")):
        axes.set_yscale("log")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        for stage, start in starts.items():
            axes.axvline(start, color="grey", linestyle=":", linewidth=1)
            place = {"xycoords": ("data", "axes fraction"), "xytext": (3, -10), "textcoords": "offset points"}
            axes.annotate(stage, (start, 1), fontsize=8, **place)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, ncols=2, loc="lower left")
    errors.set_xlabel("optimizer step")
    figure.savefig(path, dpi=120)


def _stage_starts(rows) -> dict[str, int]:
    """The first step of each stage when all stages are laid end to end."""
    lengths: dict[str, int] = {}
    for row in rows:
        lengths[row["stage"]] = max(lengths.get(row["stage"], 0), row["step"])
    starts, total = {}, 0
    for stage, length in lengths.items():
        starts[stage] = total
        total += length
    return starts


def _draw(axes, rows, starts, key, **style) -> None:
    # One line per stage: a stage that leaves a term out leaves a gap.
    style.setdefault("color", None)
    for stage, start in starts.items():
        points = [(start + row["step"], row[key]) for row in rows if row["stage"] == stage and row.get(key, 0) > 0]
        if points:
            (line,) = axes.plot(*zip(*points, strict=True), **style)
            style.update(color=line.get_color(), label=None)
