"""A page of short lines, a field and its value in each."""

import numpy as np

from .drawing import Canvas, Item, Scene, contrasting, pick
from .sources import Sources


TASKS = ("field",)
LEVELS = 4
LINE = 16  # height of a line in pixels
WIDTH = 96
FIELDS = ("name", "date", "total", "room", "price", "city", "phone", "code", "seat", "gate", "order", "tax")
LINES = {1: 1, 2: 2, 3: 3}
FULL, BEYOND = 5, 10


def layout(rng: np.random.Generator, level: int, beyond: bool = False) -> dict:
    """Returns a layout: one line, two, three, five; beyond that ten."""
    return {"lines": BEYOND if beyond else LINES.get(level, FULL)}


def compose(rng: np.random.Generator, sources: Sources, lines: int) -> Scene:
    """Writes a page in one font."""
    paper = tuple(int(v) for v in rng.integers(225, 256, 3))
    canvas = Canvas.blank(rng, WIDTH, lines * LINE, paper, sources.split)
    family, bold, size = pick(rng, sources.fonts), bool(rng.integers(2)), int(rng.integers(11, 13))
    ink = contrasting(rng, on_dark=False)
    left, right = int(rng.integers(2, 6)), int(rng.integers(52, 58))
    values = {}
    for line, field in enumerate(rng.permutation(len(FIELDS))[:lines]):
        is_word = bool(rng.integers(2))
        value = pick(rng, [w for w in sources.words if len(w) < 5] if is_word else sources.numbers)
        values[FIELDS[field]] = str(value)
        canvas.sources.add(f"{'word' if is_word else 'number'}:{value}")
        top = line * LINE + 3 + int(rng.integers(0, 2))
        canvas.text(f"{FIELDS[field].capitalize()}:", left, top, family, size, bold, ink)
        canvas.text(str(value), right, top, family, size, False, ink)
        canvas.items.append(Item("field", FIELDS[field], canvas.items[-1].box))
    facts = {"fields": values}
    return Scene("page", (canvas.pixels(),), None, facts, tuple(canvas.items), frozenset(canvas.sources))


def ask(rng: np.random.Generator, scene: Scene, task: str) -> tuple[str, str]:
    """Draws a question: the value of a field."""
    field = pick(rng, list(scene.facts["fields"]))
    return f"{field}?", scene.facts["fields"][field]
