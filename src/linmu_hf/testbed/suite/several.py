"""Several images in one prompt: which of them shows a thing, and whether two show the same."""

import numpy as np

from .drawing import Canvas, Scene, pick
from .icons import SIDE, draw_icon
from .sources import COLOURS, DARK, Sources


TASKS = ("which", "same")
LEVELS = 3
FULL, BEYOND = 4, 8


def layout(rng: np.random.Generator, level: int, beyond: bool = False) -> dict:
    """Draws a layout: two images, then three, then four; beyond that eight."""
    return {"images": BEYOND if beyond else min(level + 1, FULL), "alike": bool(rng.integers(2))}


def layout_for(rng: np.random.Generator, task: str, beyond: bool) -> dict:
    return {**layout(rng, LEVELS, beyond), "alike": task == "same"}


def compose(rng: np.random.Generator, sources: Sources, images: int, alike: bool) -> Scene:
    """Draws images of one icon each, all different or, with `alike`, two of them the same icon in another drawing."""
    names = [sources.icons[i] for i in rng.permutation(len(sources.icons))[:images]]
    if alike:
        one, other = rng.permutation(images)[:2]
        names[other] = names[one]
    canvases = []
    for number, name in enumerate(names):
        canvas = Canvas.blank(rng, SIDE, SIDE, pick(rng, DARK), sources.split, number)
        draw_icon(rng, canvas, sources, name, pick(rng, list(COLOURS)), (0, 0))
        canvases.append(canvas)
    items = tuple(item for canvas in canvases for item in canvas.items)
    used = frozenset().union(*(canvas.sources for canvas in canvases))
    return Scene("several", tuple(c.pixels() for c in canvases), None, {"shown": names}, items, used)


def ask(rng: np.random.Generator, scene: Scene, task: str) -> tuple[str, str]:
    """Draws a question: the number of the image with an icon that is in one of them, or whether two are alike."""
    shown = scene.facts["shown"]
    if task == "which":
        name = pick(rng, [name for name in shown if shown.count(name) == 1])
        return f"which picture shows {name}?", str(shown.index(name) + 1)
    pairs = [(i, j) for i in range(len(shown)) for j in range(i + 1, len(shown))]
    alike = [(i, j) for i, j in pairs if shown[i] == shown[j]]
    unlike = [pair for pair in pairs if pair not in alike]
    one, other = pick(rng, alike if not unlike or (alike and rng.random() < 0.5) else unlike)
    return f"picture {one + 1} and {other + 1} same?", "yes" if shown[one] == shown[other] else "no"


def tasks_of(scene: Scene) -> list[str]:
    """
    Returns a scene's tasks, `same` only where both answers can come up: of two images, or of more if two are alike.
    """
    shown = scene.facts["shown"]
    different = len(set(shown)) == len(shown)
    return [*(["which"] if len(set(shown)) > 1 else []), *(["same"] if len(shown) == 2 or not different else [])]
