"""Held-out questions at sizes that training did not have: more frames, more pixels, more turns."""

import numpy as np

from ..data import CELL, FRAMES_PER_MOMENT, FULL_SIZES, Scene, ask, compose, to_row


SEED = 10**7
FRAMES = FULL_SIZES["clip"][0] * FRAMES_PER_MOMENT  # of the longest clip of training
QUESTIONS = FULL_SIZES["large"][1] * FULL_SIZES["large"][2]  # different ones about the largest mosaic
# What is measured by default, and the range that training had.
SIZES = {
    "frames": (8, 16, 32, 64, 128, 256),
    "pixels": (2, 3, 4, 6, 8, 9, 10, 12),
    "turns": (1, 2, 4, 8, 16, 32, 64),
}
TRAINED = {"frames": (8, 16), "pixels": (4, 8), "turns": (1, 8)}


def check_size(axis: str, size: int) -> None:
    """Raises a `ValueError` for a size that has no questions."""
    if (
        axis == "frames"
        and not (4 <= size <= FRAMES and size % FRAMES_PER_MOMENT == 0)
        and (size < 4 or size % FRAMES)
    ):
        raise ValueError(f"--frames {size} must be even and from 4 to {FRAMES}, or a multiple of {FRAMES}")
    if axis == "pixels" and size < 1:
        raise ValueError(f"--pixels {size} must be at least 1 cell of {CELL} pixels")
    if axis == "turns" and not 1 <= size <= QUESTIONS:
        raise ValueError(f"--turns {size} must be from 1 to {QUESTIONS}: there are no more different questions")


def make_rows(axis: str, size: int, n: int) -> list[dict]:
    """
    Returns `n` rows of held-out digits, whose last question is the one to answer.

    Args:
        axis (`str`), size (`int`):
            `"frames"`: "which came first?" about a clip of so many frames; beyond 16 each of 16 is shown as often as
            it takes. `"pixels"`: one cell of a mosaic of size x size cells. `"turns"`: one cell of a mosaic of 8x8
            after size - 1 other questions with their right answers.
    """
    check_size(axis, size)
    return [ROWS[axis](size, i) for i in range(n)]


def _frames_row(size: int, i: int) -> dict:
    times = size // FRAMES
    rng = np.random.default_rng((SEED + 1, times if times else size * FRAMES, i))
    moments = min(size, FRAMES) // FRAMES_PER_MOMENT
    scene = compose(rng, "clip", "test", (moments, *FULL_SIZES["clip"][1:]))
    row = to_row(scene, [ask(rng, scene, "first")], f"{size} frames")
    return row | {"videos": [[frame for frame in row["videos"][0] for _ in range(max(times, 1))]]}


def _pixels_row(size: int, i: int) -> dict:
    rng = np.random.default_rng((SEED, size, i))
    scene = compose(rng, "large", "test", (1, size, size))
    return to_row(scene, [ask(rng, scene, "large")], f"{size}x{size}")


def _turns_row(size: int, i: int) -> dict:
    rng = np.random.default_rng((SEED + 2, size, i))
    scene = compose(rng, "large", "test", FULL_SIZES["large"])
    return to_row(scene, _different_questions(rng, scene, size), f"{size} turns")


def _different_questions(rng: np.random.Generator, scene: Scene, n: int) -> list[tuple[str, str]]:
    """Returns questions that differ: an answer that was given before cannot be repeated."""
    drawn: dict[str, str] = {}
    while len(drawn) < n:
        question, answer = ask(rng, scene, "large")
        drawn.setdefault(question, answer)
    return list(drawn.items())


ROWS = {"frames": _frames_row, "pixels": _pixels_row, "turns": _turns_row}
