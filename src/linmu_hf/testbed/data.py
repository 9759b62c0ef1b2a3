"""Questions about real images: handwritten digits composed into mosaics and short clips.

The source images are scikit-learn's 8x8 digits, split once into train and test; training never sees a test digit. A
digit fills a cell of 16x16 pixels, which is one vision token of the testbed's teacher.

    task   image                                     question                 answer
    cell   4x4 mosaic                                row 2 column 3?          7
    below  4x4 mosaic                                below row 2 column 3?    the digit of the cell beneath
    large  mosaic up to 8x8                          row 7 column 4?          7
    when   clip: 3x3 cells, one digit per moment     when is 7?               moment 1 to 8
    first  clip                                      7 or 3 first?            7
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

import numpy as np
from PIL import Image


TASKS = ("cell", "below", "large", "when", "first")
COLOURS = {"red": (255, 70, 70), "green": (60, 225, 90), "blue": (80, 130, 255), "yellow": (245, 225, 60)}
CELL = 16
FRAMES_PER_MOMENT = 2  # the teacher's temporal_patch_size: one moment is one temporal position
QUESTIONS_PER_ROW = 8
SCENES = ("mosaic", "large", "clip")
WHOLE_SCENE = ("when", "first")  # tasks that name no place: the answer may be in any cell of any frame
SCENE_OF_TASK = dict(zip(TASKS, ("mosaic", "mosaic", "large", "clip", "clip")))
FULL_SIZES = {"mosaic": (1, 4, 4), "large": (1, 8, 8), "clip": (8, 3, 3)}  # moments, rows, columns
SCENE_SHARES = (0.25, 0.5, 0.25)  # most of what a scan finds hardest: one cell among many
# Sizes of training rows: as the teacher learned them, those of the test alone, or smaller and larger ones too.
Sizes = Literal["teacher", "test", "wide"]
WIDE_SHARE = 0.3
WIDE_SIDES = (2, 10)
WIDE_QUESTIONS = 16
TEST_DIGITS = 400
AUGMENTED_VERSIONS = 24


@dataclass(frozen=True)
class Scene:
    """A composed image (one frame) or clip (several), with the labels that the answers come from."""

    kind: str
    frames: np.ndarray  # [frames, height, width, 3] uint8
    digits: np.ndarray  # [moments, rows, columns], -1 where a cell is empty
    colours: np.ndarray  # [moments, rows, columns] index into COLOURS
    sources: np.ndarray  # [moments, rows, columns] index into load_digits, -1 where a cell is empty

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.digits.shape


@cache
def split_indices(split: str) -> np.ndarray:
    """Returns the indices into `load_digits` of one split (`"train"` or `"test"`): fixed, stratified, disjoint."""
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} must be 'train' or 'test'")
    from sklearn.datasets import load_digits

    labels = load_digits().target
    rng = np.random.default_rng(0)
    per_digit = TEST_DIGITS // 10
    shuffled = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    parts = [s[:per_digit] if split == "test" else s[per_digit:] for s in shuffled]
    return np.sort(np.concatenate(parts))


@cache
def glyph_pool(split: str) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """
    Returns cell-sized digits: glyphs `[versions, n, 16, 16]` in 0..1, the source index `[n]` of each, and the
    positions of each digit in n.

    Version 0 is the plain digit. The training split adds shifted, turned, scaled and paler or bolder versions of it.
    """
    from sklearn.datasets import load_digits

    source = split_indices(split)
    data = load_digits()
    images = data.images[source].astype(np.float32) / 16
    versions = AUGMENTED_VERSIONS if split == "train" else 1
    n = len(source)
    rng = np.random.default_rng(1)
    spread = np.ones((versions, n), np.float32)
    spread[0] = 0
    angle = spread * rng.uniform(-0.26, 0.26, (versions, n)).astype(np.float32)
    scale_y, scale_x = 1 + spread * rng.uniform(-0.15, 0.15, (2, versions, n)).astype(np.float32)
    shear = spread * rng.uniform(-0.15, 0.15, (versions, n)).astype(np.float32)
    shift_y, shift_x = spread * rng.uniform(-0.9, 0.9, (2, versions, n)).astype(np.float32)
    power = 1 + spread * rng.uniform(-0.35, 0.35, (versions, n)).astype(np.float32)

    # sample the 8x8 source bilinearly at the 16x16 pixel centres of the turned, scaled and shifted cell
    centre = ((np.arange(CELL) + 0.5) / 2 - 4).astype(np.float32)
    y, x = np.meshgrid(centre, centre, indexing="ij")
    cos, sin = (f(angle)[..., None, None] for f in (np.cos, np.sin))
    ys = (cos * y - sin * x) * scale_y[..., None, None] + shift_y[..., None, None] + 3.5
    xs = (sin * y + cos * x) * scale_x[..., None, None] + shear[..., None, None] * y + shift_x[..., None, None] + 3.5
    padded = np.pad(images, ((0, 0), (1, 2), (1, 2)))
    ys, xs = np.clip(ys + 1, 0, 8.999), np.clip(xs + 1, 0, 8.999)
    y0, x0 = ys.astype(np.int64), xs.astype(np.int64)
    fy, fx = ys - y0, xs - x0
    rows = np.arange(n)[None, :, None, None]
    top = padded[rows, y0, x0] * (1 - fx) + padded[rows, y0, x0 + 1] * fx
    bottom = padded[rows, y0 + 1, x0] * (1 - fx) + padded[rows, y0 + 1, x0 + 1] * fx
    glyphs = (top * (1 - fy) + bottom * fy) ** power[..., None, None]
    labels = data.target[source]
    return glyphs.astype(np.float32), source, [np.flatnonzero(labels == digit) for digit in range(10)]


def _paint(
    rng: np.random.Generator, split: str, digits: np.ndarray, colours: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cells to pixels: `digits [moments, rows, columns]` to `(pixels [moments, height, width, 3], sources)`."""
    glyphs, source, members = glyph_pool(split)
    shape = digits.shape
    draws = rng.random(digits.size)
    chosen = np.array([members[d][int(u * len(members[d]))] if d >= 0 else 0 for d, u in zip(digits.flat, draws)])
    version = rng.integers(0, len(glyphs), digits.size)
    contrast = (digits.ravel() >= 0) * rng.uniform(0.7, 1.0, digits.size)
    ink = glyphs[version, chosen] * contrast[:, None, None].astype(np.float32)  # [cells, 16, 16]
    palette = np.array(list(COLOURS.values()), np.float32)[colours.ravel()]
    cells = 12 + ink[..., None] * (palette - 12)[:, None, None, :]
    cells += rng.normal(0, 5, cells.shape[:3]).astype(np.float32)[..., None]
    m, r, c = shape
    pixels = cells.reshape(m, r, c, CELL, CELL, 3).transpose(0, 1, 3, 2, 4, 5).reshape(m, r * CELL, c * CELL, 3)
    sources = np.where(digits >= 0, source[chosen].reshape(shape), -1)
    return np.clip(pixels, 0, 255).astype(np.uint8), sources


def compose(
    rng: np.random.Generator,
    kind: str,
    split: str,
    grid: tuple[int, int, int] | None = None,
    filled: int | None = None,
) -> Scene:
    """Composes one scene: `"mosaic"` (4x4), `"large"` (5x5 to 8x8) or `"clip"` (4 to 8 moments of 3x3 cells).

    `grid` = (moments, rows, columns) fixes the size; the test split always has the largest. `filled` is how many
    cells of a mosaic hold a digit, by default all of them.
    """
    if kind not in SCENES:
        raise ValueError(f"kind={kind!r} must be one of {SCENES}")
    grid = grid or scene_grid(rng, kind, split)
    if kind == "clip":
        moments, rows, columns = grid
        digits = np.full(grid, -1)
        cells = rng.integers(0, rows * columns, moments)
        digits.reshape(moments, -1)[np.arange(moments), cells] = rng.permutation(10)[:moments]
        colours = rng.integers(0, len(COLOURS), grid)
    else:
        digits = rng.integers(0, 10, grid)
        colours = rng.integers(0, len(COLOURS), grid)
        if filled is not None:
            digits.reshape(-1)[rng.permutation(digits.size)[filled:]] = -1
    pixels, sources = _paint(rng, split, digits, colours)
    frames = pixels.repeat(FRAMES_PER_MOMENT, axis=0) if kind == "clip" else pixels
    return Scene(kind, frames, digits, colours, sources)


def scene_grid(rng: np.random.Generator, kind: str, split: str) -> tuple[int, int, int]:
    """Draws the (moments, rows, columns) of a scene."""
    if kind == "mosaic" or split == "test" or rng.random() < 0.4:
        return FULL_SIZES[kind]
    if kind == "large":
        return 1, int(rng.integers(5, 9)), int(rng.integers(5, 9))
    return int(rng.integers(4, 9)), 3, 3


def ask(rng: np.random.Generator, scene: Scene, task: str) -> tuple[str, str]:
    """Draws one question of `task` about `scene`: `(question, answer)`, rows, columns and moments counted from 1."""
    moments, rows, columns = scene.grid
    if task in ("cell", "large", "below"):
        below = task == "below"
        while True:
            r, c = int(rng.integers(0, rows - below)), int(rng.integers(0, columns))
            if (digit := int(scene.digits[0, r + below, c])) >= 0:
                return f"{'below ' if below else ''}row {r + 1} column {c + 1}?", str(digit)
    shown = scene.digits.reshape(moments, -1).max(axis=1)  # the digit of each moment
    if task == "when":
        moment = int(rng.integers(0, moments))
        return f"when is {shown[moment]}?", str(moment + 1)
    if task == "first":
        one, other = (int(m) for m in rng.permutation(moments)[:2])
        return f"{shown[one]} or {shown[other]} first?", str(shown[min(one, other)])
    raise ValueError(f"task={task!r} must be one of {TASKS}")


def converse(
    rng: np.random.Generator, scene: Scene, questions: int = QUESTIONS_PER_ROW, tasks: tuple[str, ...] = TASKS
) -> list[tuple[str, str]]:
    """Draws a training conversation: different questions of `tasks` that suit the scene, fewer if it has too few."""
    impossible = {"below": (scene.digits[0, 1:] < 0).all(), "first": len(scene.digits) == 1}
    tasks = tuple(task for task in tasks if SCENE_OF_TASK[task] == scene.kind and not impossible.get(task))
    drawn = {}
    for _ in range(20 * questions):
        question, answer = ask(rng, scene, tasks[int(rng.integers(0, len(tasks)))])
        drawn[question] = answer
        if len(drawn) == questions:
            break
    return list(drawn.items())


def to_row(scene: Scene, turns: list[tuple[str, str]], task: str) -> dict:
    """Returns a scene and its questions as a row in TRL's conversational vision format."""
    pictures = [Image.fromarray(frame) for frame in scene.frames]
    messages = []
    for i, (question, answer) in enumerate(turns):
        vision = [{"type": "video" if scene.kind == "clip" else "image"}] if i == 0 else []
        messages.append({"role": "user", "content": [*vision, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    media = {"images": [], "videos": [pictures]} if scene.kind == "clip" else {"images": pictures, "videos": []}
    return {"messages": messages, **media, "task": task}


def training_scenes(seed: int, n: int, sizes: Sizes = "teacher") -> Iterator[tuple[Scene, list[tuple[str, str]]]]:
    """
    Composes `n` training scenes with their conversations; scene `i` depends on `(seed, i, sizes)` alone.

    Args:
        seed (`int`), n (`int`): what the scenes are drawn from, and how many.
        sizes (`str`):
            `"teacher"` as its teacher learned, `"test"` no mosaic smaller than those of the test split, `"wide"` for
            three scenes in ten a mosaic of 2x2 to 10x10 cells, a clip of which each frame is shown twice, or twice as
            many questions.
    """
    if sizes not in get_args(Sizes):
        raise ValueError(f"sizes={sizes!r} must be one of {get_args(Sizes)}")
    for i in range(n):
        rng = np.random.default_rng((seed, i))
        kind = SCENES[rng.choice(len(SCENES), p=SCENE_SHARES)]
        wide = sizes == "wide" and rng.random() < WIDE_SHARE
        if wide:
            yield _wide_scene(rng, kind)
        else:
            scene = compose(rng, kind, "train", FULL_SIZES[kind] if sizes == "test" and kind != "clip" else None)
            yield scene, converse(rng, scene)


def _wide_scene(rng: np.random.Generator, kind: str) -> tuple[Scene, list[tuple[str, str]]]:
    """Draws a scene, and questions about it, of a size that the teacher was not trained on."""
    if kind == "clip":
        scene = compose(rng, kind, "train")
        slow = replace(scene, frames=scene.frames.repeat(2, axis=0))
        return slow, converse(rng, slow, tasks=("first",))  # "when" counts moments, which last twice as long here
    if kind == "mosaic":
        scene = compose(rng, "large", "train")
        return scene, converse(rng, scene, WIDE_QUESTIONS)
    rows, columns = (int(side) for side in rng.integers(WIDE_SIDES[0], WIDE_SIDES[1] + 1, 2))
    scene = compose(rng, kind, "train", (1, rows, columns))
    return scene, converse(rng, scene)


def training_rows(seed: int, n: int, sizes: Sizes = "teacher") -> Iterator[dict]:
    """Composes `n` training rows, most of eight questions; `task` names the kind of scene."""
    for scene, turns in training_scenes(seed, n, sizes):
        yield to_row(scene, turns, scene.kind)


def evaluation_scenes(task: str, n: int, seed: int = 0) -> Iterator[tuple[Scene, tuple[str, str]]]:
    """Composes `n` scenes of held-out digits at the test size, each with one question of `task`."""
    if task not in TASKS:
        raise ValueError(f"task={task!r} must be one of {TASKS}")
    for i in range(n):
        rng = np.random.default_rng((10**6 + seed, TASKS.index(task), i))
        scene = compose(rng, SCENE_OF_TASK[task], "test")
        yield scene, ask(rng, scene, task)


def evaluation_rows(task: str, n: int, seed: int = 0) -> Iterator[dict]:
    """Composes `n` rows of held-out digits with exactly one question of `task` each."""
    for scene, turn in evaluation_scenes(task, n, seed):
        yield to_row(scene, [turn], task)
