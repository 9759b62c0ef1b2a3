"""Bar charts and tables, drawn by matplotlib in its style sheets."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.transforms import Bbox

from .drawing import Item, Scene, pick
from .sources import COLOURS, FOLDERS, FONTS, Sources, _folder


TASKS = ("value", "larger", "cell")
BAR_TASKS, TABLE_TASKS = ("value", "larger"), ("cell",)
LEVELS = 3
BAR_COLOURS = ("red", "green", "blue", "yellow", "pink")
DPI = 100
TABLE_NUMBERS = 100  # below


def bars_layout(rng: np.random.Generator, level: int, beyond: bool = False) -> dict:
    """Draws a layout: two bars, then three, then three or four; beyond that five on a larger picture."""
    if beyond:
        return {"bars": 5, "size": (144, 96)}
    return {"bars": level + 1 if level < 3 else int(rng.integers(3, 5)), "size": (96, 64)}


def table_layout(rng: np.random.Generator, level: int, beyond: bool = False) -> dict:
    """Returns a layout: one row of two numbers, then 2x2, then 3x3; beyond that 4x4 on a larger picture."""
    if beyond:
        return {"grid": (4, 4), "size": (128, 80)}
    return {"grid": {1: (1, 2), 2: (2, 2)}.get(level, (3, 3)), "size": (96, 64)}


@cache
def _style(name: str) -> dict:
    from matplotlib import style

    chosen = {} if name == "default" else dict(style.library[name])
    skip = [
        key for key in chosen if key.startswith(("savefig", "backend", "interactive", "toolbar", "figure.figsize"))
    ]
    return {key: value for key, value in chosen.items() if key not in skip and not key.startswith("figure.dpi")}


@cache
def _font(family: str) -> str | None:
    """The path of a font, `None` if its package has no files."""
    package, regular, _, _ = FONTS[family]
    return None if package == "pymupdf_fonts" else str(_folder(package) / FOLDERS.get(package, "files") / regular)


@dataclass
class _Page:
    """A figure under way in a style sheet of matplotlib, and the font that everything on it is written in."""

    figure: Figure
    canvas: FigureCanvasAgg
    font: FontProperties
    used: set[str]

    def pixels(self) -> np.ndarray:
        """Returns the drawn figure as `[height, width, 3]` uint8."""
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()


@contextmanager
def _page(rng: np.random.Generator, sources: Sources, size: tuple[int, int]) -> Iterator[_Page]:
    style = pick(rng, sources.chart_styles)
    family = pick(rng, [name for name in sources.fonts if _font(name)] or ["DejaVu Sans"])
    with matplotlib.rc_context(_style(style)):
        figure = Figure(figsize=(size[0] / DPI, size[1] / DPI), dpi=DPI)
        font = FontProperties(fname=_font(family), size=5)
        yield _Page(figure, FigureCanvasAgg(figure), font, {f"style:{style}", f"font:{family}"})


def compose_bars(rng: np.random.Generator, sources: Sources, bars: int, size: tuple[int, int]) -> Scene:
    """Draws bars of different colours and of 1 to 9."""
    names = [BAR_COLOURS[i] for i in rng.permutation(len(BAR_COLOURS))[:bars]]
    values = [int(v) for v in rng.permutation(9)[:bars] + 1]
    width, height = size
    left, bottom, across, up = 0.11, 0.06, 0.86, 0.9  # the axes, in shares of the picture
    thick = float(rng.uniform(0.5, 0.85))
    with _page(rng, sources, size) as page:
        axes = page.figure.add_axes((left, bottom, across, up))
        inks = [tuple(v / 255 for v in COLOURS[name]) for name in names]
        axes.bar(range(bars), values, thick, color=inks, edgecolor="black" if rng.random() < 0.5 else "none")
        axes.set(xlim=(-0.6, bars - 0.4), ylim=(0, 10))
        axes.set_yticks([0, 5, 10], ["0", "5", "10"], fontproperties=page.font)
        axes.set_xticks([])
        axes.tick_params(length=1, pad=1)
        pixels = page.pixels()
    items = []
    for i, (name, value) in enumerate(zip(names, values)):
        x0, x1 = (((i + 0.6 + side * thick / 2) / (bars + 0.2) * across + left) * width for side in (-1, 1))
        base = (1 - bottom) * height
        items.append(Item("bar", str(value), (x0, base - up * height * value / 10, x1, base), colour=name))
    facts = {"bars": dict(zip(names, values))}
    return Scene("bars", (pixels,), None, facts, tuple(items), frozenset(page.used))


def compose_table(rng: np.random.Generator, sources: Sources, grid: tuple[int, int], size: tuple[int, int]) -> Scene:
    """Draws a table of numbers of two digits."""
    rows, columns = grid
    numbers = [n for n in sources.numbers if n < TABLE_NUMBERS]
    cells = [[numbers[i] for i in rng.integers(0, len(numbers), columns)] for _ in range(rows)]
    with _page(rng, sources, size) as page:
        page.font.set_size(int(rng.integers(8, 10)))
        axes = page.figure.add_axes((0.02, 0.03, 0.96, 0.94))
        axes.set_axis_off()
        table = axes.table([[str(n) for n in row] for row in cells], bbox=Bbox.unit(), cellLoc="center")
        table.auto_set_font_size(False)
        for cell in table.get_celld().values():
            cell.set(facecolor=matplotlib.rcParams["axes.facecolor"], edgecolor=matplotlib.rcParams["axes.edgecolor"])
            cell.set_linewidth(0.6)
            cell.get_text().set(fontproperties=page.font, color=matplotlib.rcParams["text.color"])
        pixels = page.pixels()
        renderer = page.canvas.get_renderer()
        boxes = {at: cell.get_text().get_window_extent(renderer) for at, cell in table.get_celld().items()}
    items = []
    for (row, column), box in boxes.items():
        text = str(cells[row][column])
        step = (box.x1 - box.x0) / len(text)
        for i, digit in enumerate(text):
            place = (box.x0 + i * step, size[1] - box.y1, box.x0 + (i + 1) * step, size[1] - box.y0)
            items.append(Item("letter", digit, place))
        items.append(Item("word", text, (box.x0, size[1] - box.y1, box.x1, size[1] - box.y0)))
        page.used.add(f"number:{text}")
    return Scene("table", (pixels,), None, {"cells": cells}, tuple(items), frozenset(page.used))


def ask(rng: np.random.Generator, scene: Scene, task: str) -> tuple[str, str]:
    """Draws a question: the value of a bar, the larger of two, the number of a cell."""
    if task == "cell":
        cells = scene.facts["cells"]
        row, column = int(rng.integers(len(cells))), int(rng.integers(len(cells[0])))
        return f"cell row {row + 1} column {column + 1}?", str(cells[row][column])
    bars = scene.facts["bars"]
    one, other = (list(bars)[i] for i in rng.permutation(len(bars))[:2])
    if task == "value":
        return f"{one} bar?", str(bars[one])
    return f"larger {one} or {other}?", max(one, other, key=bars.__getitem__)
