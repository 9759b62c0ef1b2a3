"""The results as a picture."""

from pathlib import Path
from typing import Any


def plot_results(results: dict[str, Any], path: str | Path) -> None:
    """
    Draws agreement by position and by distance, recall by distance, and the error of every layer.

    Args:
        results (`dict`): what `results.json` holds.
        path (`str` or `Path`): where the picture goes.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    parts = {name: figures for name, figures in results.items() if "perplexity" in figures}
    figure = Figure(figsize=(11, 8), layout="constrained")
    (position, distance), (recalled, layers) = figure.subplots(2, 2)
    for number, (name, figures) in enumerate(parts.items()):
        style = {"label": name, "color": "black" if name == "teacher" else f"C{number - 1}", "marker": "."}
        recalled.plot([str(each) for each in figures["recall"]], list(figures["recall"].values()), **style)
        if name == "teacher":
            continue
        for axes, key in ((position, "by_position"), (distance, "by_distance")):
            axes.plot(list(figures[key]), [each["agreement"] for each in figures[key].values()], **style)
        numbers = [int(layer) for layer in figures["layers"]]
        for kind, line in (("own_path", "-"), ("teacher_fed", ":")):
            errors = [layer[kind] for layer in figures["layers"].values()]
            layers.plot(numbers, errors, **(style | {"label": f"{name}, {kind.replace('_', ' ')}", "linestyle": line}))
    for axes, title in (
        (position, "agreement by position in the row"),
        (distance, "agreement by distance of the last same pair of tokens"),
        (recalled, "recall of a value by distance in tokens"),
        (layers, "relative squared error of the mixers by layer"),
    ):
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.tick_params(axis="x", labelsize=8)
        if axes is layers:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.02)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
