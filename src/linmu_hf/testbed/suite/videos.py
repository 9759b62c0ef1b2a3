"""Videos of small frames in which icons come and go: order, needle, count, with or without subtitles."""

import numpy as np

from .drawing import Canvas, Scene, contrasting, pick
from .icons import SIDE, draw_icon
from .sources import COLOURS, DARK, ICON_NAMES, Sources


TASKS = ("order", "needle", "count", "subtitle")
LEVELS = 4
FRAMES_PER_MOMENT = 2  # the teacher's temporal_patch_size
MOMENTS = {1: 4, 2: 6, 3: 8}
FULL = (16, 32)  # 32 to 64 frames
BEYOND = (64, 128, 256)  # to 512 frames
EVENTS = 6
MOST = 4  # times that one icon is shown
SUBTITLES = 3


def layout(rng: np.random.Generator, level: int, beyond: bool = False) -> dict:
    """Draws a layout: 4, 6, 8 or 16 to 32 moments, from level 3 on half with subtitles; beyond that up to 256."""
    moments = pick(rng, BEYOND) if beyond else MOMENTS.get(level) or 4 * int(rng.integers(4, 9))
    return {"moments": moments, "subtitles": SUBTITLES if level > 2 and rng.random() < 0.5 else 0}


def layout_for(rng: np.random.Generator, task: str, beyond: bool) -> dict:
    chosen = layout(rng, LEVELS, beyond)
    return {**chosen, "subtitles": SUBTITLES} if task == "subtitle" else chosen


def compose(rng: np.random.Generator, sources: Sources, moments: int, subtitles: int = 0) -> Scene:
    """Draws a video of empty moments, two to six with an icon, one with a digit; icons may come again."""
    tone = pick(rng, DARK)
    empty = Canvas.blank(rng, SIDE, SIDE, tone, sources.split).pixels()
    frames = np.repeat(empty[None], moments, 0)
    events = min(EVENTS, moments - 1)
    at = rng.permutation(moments)[: events + 1]
    names = [sources.icons[i] for i in rng.permutation(len(sources.icons))[:events]]
    times = int(rng.integers(1, min(MOST, events - 1) + 1))
    counted, names = names[0], [names[0]] * times + names[1 : events - times + 1]
    items, used = [], set()
    for moment, name in zip(at[:-1], rng.permutation(names)):
        canvas = Canvas.blank(rng, SIDE, SIDE, tone, sources.split, int(moment))
        draw_icon(rng, canvas, sources, str(name), pick(rng, list(COLOURS)), (0, 0))
        frames[moment] = canvas.pixels()
        items += canvas.items
        used |= canvas.sources
    digit, canvas = int(rng.integers(10)), Canvas.blank(rng, SIDE, SIDE, tone, sources.split, int(at[-1]))
    corner = (int(rng.integers(3, 16)), int(rng.integers(3, 14)))
    canvas.text(str(digit), *corner, pick(rng, sources.fonts), 15, True, contrasting(rng, True))
    frames[at[-1]] = canvas.pixels()
    shown = {int(item.picture): item.label for item in items}
    said = {}
    if subtitles:
        for moment in sorted((rng.permutation(9)[:subtitles] + 1).tolist()):
            said[moment] = pick(rng, ICON_NAMES)
    facts = {"shown": [(m, shown[m]) for m in sorted(shown)], "counted": counted, "digit": digit, "said": said}
    opening = "".join(f"at {moment} {word}. " for moment, word in said.items())
    return Scene(
        "clip",
        (),
        frames.repeat(FRAMES_PER_MOMENT, 0),
        facts,
        (*items, *canvas.items),
        frozenset(used | canvas.sources),
        opening,
    )


def ask(rng: np.random.Generator, scene: Scene, task: str) -> tuple[str, str]:
    """Draws a question: which of two came first, which digit is shown, how often an icon is, what was said when."""
    shown = [name for _, name in scene.facts["shown"]]
    if task == "needle":
        return "which number?", str(scene.facts["digit"])
    if task == "subtitle":
        moment = pick(rng, list(scene.facts["said"]))
        return f"said at {moment}?", scene.facts["said"][moment]
    if task == "count":
        return f"how many {scene.facts['counted']}?", str(shown.count(scene.facts["counted"]))
    once = [name for name in shown if shown.count(name) == 1]
    one, other = (once[i] for i in rng.permutation(len(once))[:2])
    return f"{one} or {other} first?", min(one, other, key=shown.index)


def tasks_of(scene: Scene) -> list[str]:
    shown = [name for _, name in scene.facts["shown"]]
    once = sum(shown.count(name) == 1 for name in shown)
    found = ["needle", "count", *(["order"] if once > 1 else []), *(["subtitle"] if scene.facts["said"] else [])]
    return found
