"""Words on boards: one sign, or one at each place of a picture."""

import numpy as np

from .drawing import Canvas, Scene, contrasting, pick, text_size
from .sources import WORD_SIZES, Sources


TASKS = ("sign", "place")
LEVELS = 4
WIDTH, HEIGHT = 48, 32  # of one place
ROWS = {1: ("",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
COLUMNS = {1: ("",), 2: ("left", "right"), 3: ("left", "center", "right")}
BOARDS = ((20, 70, 140), (25, 110, 60), (150, 30, 30), (235, 235, 225), (240, 210, 90), (60, 60, 66))


def layout(rng: np.random.Generator, level: int, beyond: bool = False) -> dict:
    """Draws a layout: one sign at levels 1 and 2, two words of four at 3, then all four or one; beyond that nine."""
    if beyond:
        return {"grid": (3, 3), "filled": 9}
    if level <= 2:
        return {"grid": (1, 1), "filled": 1}
    if level == 3:
        return {"grid": (2, 2), "filled": 2}
    return {"grid": (1, 1), "filled": 1} if rng.random() < 0.4 else {"grid": (2, 2), "filled": 4}


def layout_for(rng: np.random.Generator, task: str, beyond: bool) -> dict:
    if task == "sign":
        return {"grid": (1, 1), "filled": 1, **({"size": (144, 96)} if beyond else {})}
    return layout(rng, LEVELS, beyond) if beyond else {"grid": (2, 2), "filled": 4}


def compose(rng: np.random.Generator, sources: Sources, grid, filled: int, size=(2 * WIDTH, 2 * HEIGHT)) -> Scene:
    """Draws `filled` different words on boards at the places of a grid."""
    rows, columns = grid
    width, height = (columns * WIDTH, rows * HEIGHT) if rows > 1 else size
    street = tuple(int(v) for v in rng.integers(70, 150, 3))
    canvas = Canvas.blank(rng, width, height, street, sources.split)
    places = [f"{row} {column}".strip() for row in ROWS[rows] for column in COLUMNS[columns]]
    words = rng.permutation(len(sources.words))[:filled]
    shown = {}
    for place, word in zip(sorted(rng.permutation(len(places))[:filled].tolist()), words):
        text = sources.words[int(word)]
        shown[places[place]] = text
        row, column = divmod(place, columns)
        box = (column * width // columns, row * height // rows, width // columns, height // rows)
        _board(rng, canvas, sources, text, box, single=rows == 1)
        canvas.sources.add(f"word:{text}")
    facts = {"words": shown}
    return Scene("words", (canvas.pixels(),), None, facts, tuple(canvas.items), frozenset(canvas.sources))


def _board(rng, canvas: Canvas, sources: Sources, text: str, box, single: bool) -> None:
    """Draws a board with a word somewhere in `box` = (left, top, width, height)."""
    left, top, width, height = box
    family, bold, size = pick(rng, sources.fonts), bool(rng.integers(2)), pick(rng, WORD_SIZES[sources.split])
    while text_size(text, family, size, bold)[0] > WIDTH - 4:
        size -= 1
    w, h = text_size(text, family, size, bold)
    spare = (width - w - 4, height - h - 6)
    x = left + 2 + rng.uniform(0, max(1.0, spare[0]))
    y = top + 3 + rng.uniform(0, max(1.0, spare[1]))
    tone = np.array(pick(rng, BOARDS))
    board = canvas.image.crop((0, 0, 1, 1)).resize((int(w) + 4, int(h) + 6))
    board.paste(tuple(int(v) for v in tone), (0, 0, *board.size))
    canvas.image.paste(board, (int(x) - 2, int(y) - 3))
    canvas.text(text, int(x), int(y), family, size, bold, contrasting(rng, tone.mean() < 120))


def ask(rng: np.random.Generator, scene: Scene, task: str) -> tuple[str, str]:
    """Draws a question: the one sign, or the word at one place."""
    place = pick(rng, list(scene.facts["words"]))
    return ("what does the sign say?" if task == "sign" else f"word {place}?"), scene.facts["words"][place]


def tasks_of(scene: Scene) -> list[str]:
    return ["sign" if list(scene.facts["words"]) == [""] else "place"]
