"""Every kind of scene starts easy and grows when its questions are answered; what is solved is asked less often."""

import numpy as np

from .sources import Sources, sources
from .tasks import KINDS, TASKS


GROW_AT = 0.85  # accuracy, a running mean
SMOOTHING = 0.1
LEAST_SHARE = 0.05
SOURCE_SHARES = {1: 0.25, 2: 0.5}  # of the training sources at the first levels


class Curriculum:
    """Levels and running accuracies of all kinds of scenes, and accuracies of all tasks."""

    def __init__(self):
        self.levels = dict.fromkeys(KINDS, 1)
        self.accuracy = dict.fromkeys(KINDS, 0.0)
        self.steps = dict.fromkeys(KINDS, 0)
        self.tasks = dict.fromkeys(TASKS, 0.0)

    def state_dict(self) -> dict:
        return {name: dict(getattr(self, name)) for name in ("levels", "accuracy", "steps", "tasks")}

    def load_state_dict(self, state: dict) -> None:
        for name, values in state.items():
            getattr(self, name).update(values)

    def update(self, kind: str, accuracy: float) -> None:
        """Notes a batch's share of right answers; the level grows with the running mean."""
        self.steps[kind] += 1
        self.accuracy[kind] += SMOOTHING * (accuracy - self.accuracy[kind])
        if self.accuracy[kind] > GROW_AT and self.levels[kind] < KINDS[kind].levels:
            self.levels[kind] += 1
            self.accuracy[kind] = 0.5
            self.steps[kind] = 0

    def update_task(self, task: str, accuracy: float) -> None:
        """Notes the share of right answers to a task's questions in a batch."""
        self.tasks[task] += SMOOTHING * (accuracy - self.tasks[task])

    @property
    def shares(self) -> dict[str, float]:
        """Returns how often to ask each task's questions beside others about the same scene."""
        return {task: LEAST_SHARE + 1 - accuracy for task, accuracy in self.tasks.items()}

    def choose(self, rng: np.random.Generator, n: int) -> list[str]:
        """Draws `n` different kinds, those with the task that is answered worst most often."""
        worst = [min(self.tasks[task] for task in KINDS[kind].tasks) for kind in KINDS]
        weights = LEAST_SHARE + 1 - np.array(worst)
        return [str(kind) for kind in rng.choice(list(KINDS), n, replace=False, p=weights / weights.sum())]

    def draw(self, rng: np.random.Generator, kind: str) -> tuple[int, Sources]:
        """Draws a level, sometimes an earlier one, and its sources."""
        level = self.levels[kind]
        if level > 1 and rng.random() < 0.15:
            level = int(rng.integers(1, level))
        return level, sources("train").few(SOURCE_SHARES.get(level, 1.0))
