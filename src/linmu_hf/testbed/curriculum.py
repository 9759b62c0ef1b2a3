"""Scenes start easy and become harder whenever the model answers their questions.

On a full mosaic a lookup is one cell among many and the model stays at chance for long; on two cells it does not.
"""

import numpy as np

from .data import FULL_SIZES, SCENES, scene_grid


class Curriculum:
    """Scenes that start tiny and grow by a row, column or moment."""

    # mean loss per answer token to grow at; half of these tokens are the certain <|im_end|>
    THRESHOLDS = {"mosaic": 0.5, "large": 0.3, "clip": 0.35}
    PATIENCE = 150

    def __init__(self, levels: tuple[int, int, int] = (1, 1, 1)):
        self.levels = dict(zip(SCENES, levels))
        self.losses = dict.fromkeys(SCENES, 1.0)
        self.steps = dict.fromkeys(SCENES, 0)

    def update(self, kind: str, loss: float) -> None:
        self.steps[kind] += 1
        self.losses[kind] += 0.2 * (loss - self.losses[kind])
        if self.losses[kind] < self.THRESHOLDS[kind] or self.steps[kind] == self.PATIENCE:
            self.levels[kind] += 1
            self.losses[kind] = 1.0
            self.steps[kind] = 0

    @staticmethod
    def draw(rng: np.random.Generator, kind: str, level: int) -> dict:
        """Draws the arguments of `compose` for scenes at a level."""
        full = scene_grid(rng, kind, "train")
        if kind == "clip":
            return {"grid": (min(full[0], level + 1), min(3, level), min(3, level))}
        if level >= (4 if kind == "mosaic" else 8):
            return {"grid": full}
        return {"grid": (1, int(rng.integers(level, level + 2)), int(rng.integers(level, level + 2)))}


class CanvasCurriculum(Curriculum):
    """Mosaics of full size from the start that fill with digits: at level n at most 2^n cells hold one.

    For a model that resizes every image to one canvas, the place of a cell depends on the size of the mosaic:
    small ones teach nothing about large ones.
    """

    THRESHOLDS = {"mosaic": 0.45, "large": 0.4, "clip": 0.35}

    @staticmethod
    def draw(rng: np.random.Generator, kind: str, level: int) -> dict:
        if kind == "clip":
            return {"grid": (min(scene_grid(rng, kind, "train")[0], level + 1), 3, 3)}
        grid = FULL_SIZES[kind]
        if 2**level >= grid[1] * grid[2]:
            return {"grid": grid}
        return {"grid": grid, "filled": int(rng.integers(2 ** (level - 1), 2**level, endpoint=True))}
