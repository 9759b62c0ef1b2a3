"""All tasks of the suite: the benchmarks each is modelled on, how it is drawn, and its chance level."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from . import charts, documents, icons, memory, several, videos, words
from .drawing import Scene
from .sources import COLOURS, ICON_NAMES, Sources, sources


@dataclass(frozen=True)
class Kind:
    """A kind of scene: its levels of difficulty, the last of which is that of the test."""

    levels: int
    layout: Callable[..., dict]  # of (rng, level, beyond)
    compose: Callable[..., Scene]  # of (rng, sources, **layout)
    ask: Callable[..., tuple[str, str]]  # of (rng, scene, task)
    tasks: tuple[str, ...]
    module: ModuleType

    def layout_for(self, rng: np.random.Generator, task: str, beyond: bool) -> dict:
        """Draws the layout of a test scene."""
        special = getattr(self.module, "layout_for", None)
        return special(rng, task, beyond) if special else self.layout(rng, self.levels, beyond)

    def tasks_of(self, scene: Scene) -> list[str]:
        """Returns the tasks that a scene has a question for."""
        special = getattr(self.module, "tasks_of", None)
        return special(scene) if special else list(self.tasks)


def _kind(module: Any, layout=None, compose=None, tasks=None) -> Kind:
    layout, compose = layout or module.layout, compose or module.compose
    return Kind(module.LEVELS, layout, compose, module.ask, tasks or module.TASKS, module)


KINDS = {
    "words": _kind(words),
    "bars": _kind(charts, charts.bars_layout, charts.compose_bars, charts.BAR_TASKS),
    "table": _kind(charts, charts.table_layout, charts.compose_table, charts.TABLE_TASKS),
    "icons": _kind(icons),
    "page": _kind(documents),
    "several": _kind(several),
    "clip": _kind(videos),
    "memory": _kind(memory),
}
KIND_OF_TASK = {task: name for name, kind in KINDS.items() for task in kind.tasks}


Chance = Callable[[Sources, int], float]  # of the sources, and 1 beyond the sizes of training


def _choices(n: int, beyond: int | None = None) -> Chance:
    return lambda chosen, larger: 1 / (beyond if larger and beyond else n)


# The accuracy of the best answer without looking. The comments say which benchmarks the tasks are modelled on.
TASKS: dict[str, Chance] = {
    # text in scenes (TextVQA, OCRBench): the word on a sign, or at one of four places
    "sign": lambda s, _: 1 / len(s.words),
    "place": lambda s, _: 1 / len(s.words),
    # charts (ChartQA) and tables: the value of a bar, the larger of two, the number in a cell
    "value": _choices(9),
    "larger": _choices(2),
    "cell": lambda s, _: 1 / sum(n < charts.TABLE_NUMBERS for n in s.numbers),
    # objects and attributes (MMBench, GQA): the icon at a place, its colour
    "icon": _choices(len(ICON_NAMES)),
    "color": _choices(len(COLOURS)),
    # documents (DocVQA): the value of a field; a page holds words and numbers alike, and words are fewer
    "field": lambda s, _: 0.5 / sum(len(w) < 5 for w in s.words),
    # several images (MuirBench): which shows a thing, whether two show the same
    "which": _choices(several.FULL, several.BEYOND),
    "same": _choices(2),
    # videos (Video-MME): which of two came first, a digit shown for one moment, how often a thing is shown
    "order": _choices(2),
    "needle": _choices(10),
    "count": _choices(videos.MOST),
    # the same with subtitles in the prompt: what was said when
    "subtitle": _choices(len(ICON_NAMES)),
    # conversations (MMDU): a fact told or shown early, asked after other turns
    "memory": lambda s, _: (1 / len(s.numbers) + 1 / len(s.words) + 1 / len(ICON_NAMES)) / 3,
}


def chance(task: str, split: str = "test", beyond: bool = False) -> float:
    """Returns the accuracy of the best guess that knows the question's wording and the sources, not the picture."""
    if task not in TASKS:
        raise ValueError(f"task={task!r} must be one of {', '.join(TASKS)}")
    return TASKS[task](sources(split), int(beyond))


assert list(TASKS) == list(KIND_OF_TASK)
