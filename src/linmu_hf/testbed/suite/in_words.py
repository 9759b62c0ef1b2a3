"""Scenes told in words, for models that read text alone: charts, tables, pages, videos and conversations."""

from collections.abc import Callable

from .data import Turns
from .drawing import Scene
from .tasks import KINDS
from .videos import FRAMES_PER_MOMENT


def _bars(scene: Scene) -> list[str]:
    return [f"{name} bar: {value}" for name, value in scene.facts["bars"].items()]


def _table(scene: Scene) -> list[str]:
    cells = scene.facts["cells"]
    return [f"cell row {r} column {c}: {value}" for r, row in enumerate(cells, 1) for c, value in enumerate(row, 1)]


def _page(scene: Scene) -> list[str]:
    return [f"{field}: {value}" for field, value in scene.facts["fields"].items()]


def _clip(scene: Scene) -> list[str]:
    assert scene.video is not None
    shown = {item.picture: item.label for item in scene.items if item.kind == "icon"}
    shown |= {item.picture: f"number {item.label}" for item in scene.items if item.kind == "word"}
    moments = len(scene.video) // FRAMES_PER_MOMENT
    return [f"moment {moment + 1}: {shown.get(moment, 'nothing')}" for moment in range(moments)]


def _memory(scene: Scene) -> list[str]:
    return [f"the picture is {scene.facts['picture']}."]


TELL: dict[str, Callable[[Scene], list[str]]] = {
    "bars": _bars,
    "table": _table,
    "page": _page,
    "clip": _clip,
    "memory": _memory,
}
TOLD_TASKS = tuple(task for kind in TELL for task in KINDS[kind].tasks)


def in_words(scene: Scene, turns: Turns) -> Turns:
    """
    Returns a conversation about a scene, with what its pictures show as text before it.

    Raises:
        `ValueError`: the scene is of a kind whose task is to see, such as a word on a sign.
    """
    if scene.kind not in TELL:
        raise ValueError(f"scene.kind={scene.kind!r} must be one of {', '.join(TELL)}")
    (first, answer), *rest = turns
    return [("\n".join([*TELL[scene.kind](scene), first]), answer), *rest]


def begun_answer(scene: Scene, turns: Turns) -> str:
    """Returns how an answer to the last question begins: small models know then what form it has."""
    question = turns[-1][0].removeprefix(scene.opening).removesuffix("?")
    return f"{question} is" if scene.kind == "memory" else f"{question}:"
