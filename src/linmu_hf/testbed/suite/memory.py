"""Conversations: facts told and shown at the beginning, other talk in between, and questions about the facts."""

import numpy as np

from .drawing import Canvas, Scene, pick
from .icons import SIDE, draw_icon
from .sources import COLOURS, DARK, Sources


TASKS = ("memory",)
LEVELS = 4
TALK = ("people could work", "see other time", "place with water", "long part of day", "good little thing")
FILLERS = {1: (0, 0), 2: (1, 1), 3: (1, 3)}
FULL, BEYOND = (2, 6), (20, 40)
KINDS = ("code", "word", "picture")


def layout(rng: np.random.Generator, level: int, beyond: bool = False) -> dict:
    """Draws a layout: no turn in between, one, up to three, two to six; beyond that twenty to forty."""
    least, most = BEYOND if beyond else FILLERS.get(level, FULL)
    return {"fillers": int(rng.integers(least, most + 1))}


def compose(rng: np.random.Generator, sources: Sources, fillers: int) -> Scene:
    """Draws an icon, a number and a word to remember, and turns that ask to repeat something."""
    canvas = Canvas.blank(rng, SIDE, SIDE, pick(rng, DARK), sources.split)
    name, colour = pick(rng, sources.icons), pick(rng, list(COLOURS))
    draw_icon(rng, canvas, sources, name, colour, (0, 0))
    code, word = pick(rng, sources.numbers), pick(rng, sources.words)
    talk = []
    for _ in range(fillers):
        said = str(rng.integers(10)) if rng.random() < 0.5 else pick(rng, list(COLOURS))
        talk.append((f"{pick(rng, TALK)}. say {said}.", said))
    facts = {"code": str(code), "word": word, "picture": name, "talk": talk}
    used = canvas.sources | {f"number:{code}", f"word:{word}"}
    opening = f"the code is {code}. the word is {word}."
    return Scene("memory", (canvas.pixels(),), None, facts, tuple(canvas.items), frozenset(used), opening)


def ask(rng: np.random.Generator, scene: Scene, task: str) -> tuple[str, str]:
    """Draws a question: one of the three facts."""
    kind = pick(rng, KINDS)
    return f"the {kind}?", scene.facts[kind]
