"""What [`beyond`] measures as Markdown tables and as one picture."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...evaluation.retention import wilson_interval
from ..data import CELL
from .questions import SIZES, TRAINED


AXES = {
    "frames": "frames of a clip",
    "pixels": f"pixels along each side of a picture ({CELL} for each cell)",
    "turns": "questions in a conversation",
}
# Title of a cost, what a number is divided by, and digits.
COSTS = {
    "ttft_s": ("TTFT, ms", 1e-3, 0),
    "cache_bytes": ("cache, kB", 1e3, 0),
    "flops": ("GFLOP", 1e9, 2),
}


def beyond_tables(report: Mapping[str, Any]) -> str:
    """Returns a Markdown table for frames, pixels and turns; the sizes of training are bold."""
    models = list(dict.fromkeys(point["model"] for point in report["points"]))
    parts = []
    for axis in SIZES:
        at = {(point["size"], point["model"]): point for point in report["points"] if point["axis"] == axis}
        if not at:
            continue
        costs = [f"{COSTS[cost][0]}, {name}" for cost in COSTS for name in models]
        head = [axis, "tokens", *(f"right, {name}" for name in models), *costs]
        lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for size in sorted({size for size, _ in at}):
            points = [at[size, name] for name in models]
            cells = [_size(axis, size), str(points[0]["tokens"])]
            cells += [_right(point, points[0], report["questions"]) for point in points]
            cells += [
                f"{point[cost] / unit:,.{digits}f}" for cost, (_, unit, digits) in COSTS.items() for point in points
            ]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _size(axis: str, size: int) -> str:
    name = f"{size}x{size} cells" if axis == "pixels" else str(size)
    low, high = TRAINED[axis]
    return f"**{name}**" if low <= size <= high else name


def _right(point: Mapping[str, Any], teacher: Mapping[str, Any], questions: int) -> str:
    """Percent with its 95% interval, and for a student the share of the teacher's."""
    low, high = (100 * bound for bound in wilson_interval(point["right"], questions))
    text = f"{100 * point['right'] / questions:.0f} [{low:.0f}, {high:.0f}]"
    if point is teacher or not teacher["right"]:
        return text
    return f"{text}, {100 * point['right'] / teacher['right']:.0f}%"


def plot_beyond(report: Mapping[str, Any], file: Path) -> None:
    """Draws accuracy and costs of every model against frames, pixels and turns; the range of training is grey."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    drawn: dict[str, Callable] = {"right, percent": _draw_accuracy}
    axes = [axis for axis in SIZES if any(point["axis"] == axis for point in report["points"])]
    figure = Figure(figsize=(4.4 * len(axes), 9), layout="constrained")
    panels = figure.subplots(1 + len(COSTS), len(axes), squeeze=False, sharex="col")
    for column, axis in enumerate(axes):
        points = [point for point in report["points"] if point["axis"] == axis]
        factor = CELL if axis == "pixels" else 1
        sizes = sorted({factor * point["size"] for point in points})
        for panel, name in zip(panels[:, column], [*drawn, *COSTS]):
            for model in dict.fromkeys(point["model"] for point in points):
                mine = [point for point in points if point["model"] == model]
                where = [factor * point["size"] for point in mine]
                if name in drawn:
                    drawn[name](panel, where, mine, report["questions"], model)
                else:
                    panel.plot(where, [point[name] / COSTS[name][1] for point in mine], marker="o", label=model)
            panel.axvspan(*(factor * side for side in TRAINED[axis]), color="0.9", zorder=0)
            panel.set_xscale("log")
            panel.set_xticks(sizes, map(str, sizes), rotation=60, fontsize=7)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
            if name in COSTS:
                panel.set_yscale("log")
            if column == 0:
                panel.set_ylabel(COSTS[name][0] if name in COSTS else name)
        panels[-1, column].set_xlabel(AXES[axis])
    panels[0, 0].legend(fontsize=8)
    figure.savefig(file, dpi=110)


def _draw_accuracy(panel, where, points, questions: int, label: str) -> None:
    shares = [point["right"] / questions for point in points]
    bounds = [wilson_interval(point["right"], questions) for point in points]
    low = [100 * max(share - bound[0], 0) for share, bound in zip(shares, bounds)]
    high = [100 * max(bound[1] - share, 0) for share, bound in zip(shares, bounds)]
    panel.errorbar(where, [100 * share for share in shares], [low, high], marker="o", capsize=3, label=label)
    panel.set_ylim(-3, 103)
