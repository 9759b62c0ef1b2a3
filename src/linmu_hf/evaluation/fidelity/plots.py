"""The report of [`measure`] as pictures and as a table."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


PANELS = {"teacher_fed": "fed with the teacher's input", "own_path": "on the student's own path"}


def format_report(report: Mapping[str, Any]) -> str:
    """Returns a line for every layer, and the logits by their distance from what they are about."""
    lines = [
        f"{'layer':>5}  {'mixer':14}  {'error':>7}  {'own path':>8}  {'cosine':>6}  {'exact':>6}  {'far':>5}"
        f"  {'lambda text':>11}  {'vision':>6}"
    ]
    for layer in report["layers"]:
        branches = layer.get("branches", {})
        shares = [_mean(branches.get("lambda", {}).get(kind)) for kind in ("text", "vision")]
        fed, own = layer["teacher_fed"]["all"], layer["own_path"]["all"]
        lines.append(
            f"{layer['layer']:>5}  {layer['mixer']:14}  {_number(fed['error'], 7)}  {_number(own['error'], 8)}  "
            f"{_number(own['cosine'], 6)}  {_number(layer['attention']['all']['exact'], 6)}  "
            f"{_number(branches.get('far', {}).get('all'), 5, 2)}  {_number(shares[0], 11, 2)}  "
            f"{_number(shares[1], 6, 2)}"
        )
    lines += ["", f"{'logits of':24}  {'tokens':>7}  {'KL':>7}  {'same':>6}"]
    logits = report["logits"]
    rows = {"all tokens": logits["all"]}
    rows |= {f"{kind} tokens": found for kind, found in logits["kind"].items()}
    rows |= {f"{name} after an image": found for name, found in logits["from_vision"].items()}
    rows |= {f"position {name}": found for name, found in logits["position"].items()}
    for name, found in rows.items():
        kl, same = _number(found["kl"], 7, 4), _number(100 * found["agreement"], 5, 1)
        lines.append(f"{name:24}  {found['tokens']:>7}  {kl}  {same}%")
    return "\n".join(lines)


def _number(value: float | None, width: int, digits: int = 3) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def _mean(values: Sequence[float] | None) -> float | None:
    return sum(values) / len(values) if values else None


def plot_report(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draws `errors.png`, `attention.png`, `branches.png` (with M-MATE layers) and `logits.png`; returns the files."""
    drawn = {"errors": _draw_errors, "attention": _draw_attention, "logits": _draw_logits}
    if any("branches" in layer for layer in report["layers"]):
        drawn["branches"] = _draw_branches
    files = []
    for name, draw in drawn.items():
        figure = draw(report)
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=110)
    return files


def _figure(columns: int, layers: int = 12):
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(4.6 * columns, min(max(2.6, 1.6 + 0.22 * layers), 10)), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _heat(figure, axis, values: list[list[float | None]], columns: Sequence[str], title: str, **kwargs) -> None:
    cells = [[math.nan if value is None else value for value in row] for row in values]
    image = axis.imshow(cells, aspect="auto", interpolation="nearest", **kwargs)
    axis.set_title(title, fontsize=9)
    axis.set_xticks(range(len(columns)), columns, rotation=60, fontsize=7)
    axis.set_ylabel("layer")
    figure.colorbar(image, ax=axis)


def _draw_errors(report):
    """Squared error of every layer by the position of the token, relative to the teacher's output."""
    from matplotlib.colors import LogNorm

    layers = report["layers"]
    names = list(layers[0]["own_path"]["position"])
    values = {
        part: [[layer[part]["position"].get(name, {}).get("error") for name in names] for layer in layers]
        for part in PANELS
    }
    positive = [value for rows in values.values() for row in rows for value in row if value]
    norm = LogNorm(min(positive), max(positive)) if len(set(positive)) > 1 else None
    figure, axes = _figure(2, len(layers))
    for axis, (part, title) in zip(axes, PANELS.items()):
        _heat(figure, axis, values[part], names, f"relative error {title}", norm=norm)
        axis.set_xlabel("tokens before the token")
    return figure


def _draw_attention(report):
    """How much of the teacher's attention the student can take exactly: by head, and by the distance of the key."""
    layers = report["layers"]
    figure, axes = _figure(3, len(layers))
    heads = [layer["attention"]["heads"] for layer in layers]
    _heat(figure, axes[0], heads, [str(i) for i in range(len(heads[0]))], "exact share by head", vmin=0, vmax=1)
    names = list(layers[0]["attention"]["distance"])
    at = [layer["attention"]["distance"] for layer in layers]
    mass = [[each.get(name, {}).get("mass") for name in names] for each in at]
    exact = [[_share(each.get(name)) for name in names] for each in at]
    _heat(figure, axes[1], mass, names, "share of the teacher's attention", vmin=0)
    _heat(figure, axes[2], exact, names, "exact share of that", vmin=0, vmax=1)
    for axis in axes[1:]:
        axis.set_xlabel("tokens between query and key")
    return figure


def _share(found: Mapping[str, float] | None) -> float | None:
    return found["exact"] / found["mass"] if found and found["mass"] else None


def _draw_branches(report):
    """lambda of every head, on text and on vision tokens."""
    found = [layer for layer in report["layers"] if "branches" in layer]
    kinds = sorted({kind for layer in found for kind in layer["branches"]["lambda"]})
    figure, axes = _figure(len(kinds), len(found))
    for axis, kind in zip(axes, kinds):
        values = [layer["branches"]["lambda"].get(kind, []) for layer in found]
        width = max(map(len, values))
        values = [row * (width if len(row) == 1 else 1) or [None] * width for row in values]
        _heat(figure, axis, values, [str(i) for i in range(width)], f"lambda of {kind} tokens", vmin=0, vmax=1)
        axis.set_yticks(range(len(found)), [layer["layer"] for layer in found], fontsize=7)
        axis.set_xlabel("head")
    return figure


def _draw_logits(report):
    """KL and agreement by position, and by distance from the last vision token."""
    logits = report["logits"]
    figure, axes = _figure(2)
    for axis, key, title in ((axes[0], "kl", "KL, nats"), (axes[1], "agreement", "same first choice")):
        names = list(dict.fromkeys([*logits["from_vision"], *logits["position"]]))
        names.sort(key=lambda name: int(name.partition("-")[0]))
        for division, label in (("position", "tokens before it"), ("from_vision", "text tokens since an image")):
            points = [(names.index(name), found[key]) for name, found in logits[division].items()]
            if points:
                axis.plot(*zip(*points), marker="o", markersize=3, label=label)
        axis.set_xticks(range(len(names)), names, rotation=60, fontsize=7)
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return figure
