"""Icons by name: what is at a place, and what colour a thing has."""

import numpy as np

from .drawing import Canvas, Scene, pick
from .sources import COLOURS, DARK, ICON_SIZES, Sources


TASKS = ("icon", "color")
LEVELS = 4
SIDE = 32  # of one place


def layout(rng: np.random.Generator, level: int, beyond: bool = False) -> dict:
    """Returns a layout: one icon, then 1x2, 2x2 and 3x3; beyond that 5x5."""
    if beyond:
        return {"grid": (5, 5)}
    return {"grid": {1: (1, 1), 2: (1, 2), 3: (2, 2)}.get(level, (3, 3))}


def draw_icon(rng: np.random.Generator, canvas: Canvas, sources: Sources, name: str, colour: str, corner) -> None:
    """Draws an icon somewhere in the square of 32 pixels whose left top is `corner`."""
    size = pick(rng, ICON_SIZES[sources.split])
    left, top = (int(at + rng.integers(1, SIDE - size)) for at in corner)
    ink = np.clip(np.array(COLOURS[colour]) + rng.integers(-12, 13, 3), 0, 255).tolist()
    canvas.icon(name, colour, left, top, pick(rng, sources.drawings), size, ink)


def compose(rng: np.random.Generator, sources: Sources, grid) -> Scene:
    """Draws a different icon at every place of a grid."""
    rows, columns = grid
    canvas = Canvas.blank(rng, columns * SIDE, rows * SIDE, pick(rng, DARK), sources.split)
    n = rows * columns
    names = [sources.icons[i] for i in rng.permutation(len(sources.icons))[:n]]
    names += [pick(rng, sources.icons) for _ in range(n - len(names))]
    colours = [pick(rng, list(COLOURS)) for _ in range(n)]
    for i in range(n):
        row, column = divmod(i, columns)
        draw_icon(rng, canvas, sources, names[i], colours[i], (column * SIDE, row * SIDE))
    facts = {
        "names": [names[row * columns : (row + 1) * columns] for row in range(rows)],
        "colors": {name: colour for name, colour in zip(names, colours) if names.count(name) == 1},
    }
    return Scene("icons", (canvas.pixels(),), None, facts, tuple(canvas.items), frozenset(canvas.sources))


def ask(rng: np.random.Generator, scene: Scene, task: str) -> tuple[str, str]:
    """Draws a question: the icon at a place, or the colour of an icon that is there once."""
    if task == "color":
        name = pick(rng, list(scene.facts["colors"]))
        return f"{name} color?", scene.facts["colors"][name]
    names = scene.facts["names"]
    row, column = int(rng.integers(len(names))), int(rng.integers(len(names[0])))
    return f"icon row {row + 1} column {column + 1}?", names[row][column]
