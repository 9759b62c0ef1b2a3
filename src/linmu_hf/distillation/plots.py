"""The curves of a distillation, and the errors of its layers, as pictures."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


TERMS = {"loss_hid": "L_hid", "loss_tok": "L_tok", "loss_seq": "L_seq", "loss_sup": "L_sup"}
LAYER_PREFIX = "relative_error_layer_"
HELD_OUT = "eval_"


def plot_training_log(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """
    Draws every loss term and the relative error of every layer over the steps of all stages, and dashed those of
    held-out rows.

    Args:
        rows (`Sequence[dict]`): rows of `training_log.jsonl`, in order.
        path (`str` or `Path`): where the picture goes.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    rows = [row for row in rows if "loss" in row or f"{HELD_OUT}loss" in row]
    starts, layers = _stage_starts(rows), _layers(rows)
    figure = Figure(figsize=(9, 7), layout="constrained")
    losses, errors = figure.subplots(2, 1, sharex=True)
    for key, label in TERMS.items():
        _draw(losses, rows, starts, key, label=label)
    for layer in layers:
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


def plot_error_map(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """
    Draws the relative error of every layer over the steps of all stages as a map of colours; blank where a stage
    compares no mixers.

    Args:
        rows (`Sequence[dict]`): rows of `training_log.jsonl`, in order.
        path (`str` or `Path`): where the picture goes.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    rows = [row for row in rows if "loss" in row]
    starts, layers = _stage_starts(rows), _layers(rows)
    figure = Figure(figsize=(9, max(2.0, min(1.2 + 0.25 * len(layers), 8.0))), layout="constrained")
    axes = figure.subplots()
    edges, columns = error_columns(rows, starts, layers)
    found = [error for column in columns for error in column if error > 0]
    if found:
        low, high = min(found), max(max(found), 1.001 * min(found))
        values = [[error if error > 0 else math.nan for error in line] for line in zip(*columns, strict=True)]
        between = [index - 0.5 for index in range(len(layers) + 1)]
        image = axes.pcolormesh(edges, between, values, norm=LogNorm(low, high))
        figure.colorbar(image, ax=axes, label="relative error")
    every = max(1, len(layers) // 24)
    axes.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axes.set_ylabel("layer")
    axes.set_xlabel("optimizer step")
    for stage, start in starts.items():
        axes.axvline(start, color="grey", linestyle=":", linewidth=1)
        axes.annotate(stage, (start, 1), xycoords=("data", "axes fraction"), fontsize=8, va="bottom")
    figure.savefig(path, dpi=120)


def error_columns(
    rows: Sequence[dict[str, Any]], starts: dict[str, int], layers: Sequence[int]
) -> tuple[list[int], list[list[float]]]:
    """Returns the steps between which logged rows are, [n + 1], and their errors by layer, NaN if unknown, [n, l]."""
    edges, columns = [0], []
    for row in rows:
        step = starts[row["stage"]] + row["step"]
        if step > edges[-1]:
            edges.append(step)
            columns.append([row.get(f"{LAYER_PREFIX}{layer}", math.nan) for layer in layers])
    return edges, columns


def _layers(rows) -> list[int]:
    keys = {key for row in rows for key in row if key.startswith(LAYER_PREFIX)}
    return sorted(int(key.removeprefix(LAYER_PREFIX)) for key in keys)


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
        for name, dashes in ((key, {}), (f"{HELD_OUT}{key}", {"linestyle": "--", "label": None})):
            own = [row for row in rows if row["stage"] == stage and row.get(name, 0) > 0]
            if own:
                (line,) = axes.plot([start + row["step"] for row in own], [row[name] for row in own], **style | dashes)
                style["color"] = line.get_color()
                style["label"] = style["label"] if dashes else None
