"""Scenes and how they are drawn: surfaces, text and icons, each with a note of where it is."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .sources import BACKGROUNDS, load_font, load_icons


@dataclass(frozen=True)
class Item:
    """A letter, word, field's value, icon or bar at one place. Boxes are left, top, right, bottom in pixels."""

    kind: str
    label: str
    box: tuple[float, float, float, float]
    picture: int = 0  # number of the image, or moment of the video
    colour: str | None = None


@dataclass(frozen=True)
class Scene:
    """Images or one video, and the facts that all answers come from."""

    kind: str
    images: tuple[np.ndarray, ...]  # each [height, width, 3] uint8
    video: np.ndarray | None  # [frames, height, width, 3] uint8
    facts: dict[str, Any]
    items: tuple[Item, ...]
    sources: frozenset[str]  # such as "font:Lato", "word:STOP", "number:42", "drawing:ph-fill", "style:bmh"
    opening: str = ""  # text between the pictures and the first question


def paint_surface(rng: np.random.Generator, width: int, height: int, tone: tuple[int, ...], split: str) -> np.ndarray:
    """Returns a surface `[height, width, 3]` of about one tone, in one of the split's ways."""
    way = BACKGROUNDS[split][rng.integers(len(BACKGROUNDS[split]))]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    strength = rng.uniform(6, 18)
    shade = {
        "flat": lambda: 0 * x,
        "slope": lambda: (x / width - 0.5) * strength,
        "grain": lambda: rng.normal(0, strength / 3, x.shape).astype(np.float32),
        "diagonal": lambda: ((x + y) / (width + height) - 0.5) * strength,
        "stripes": lambda: ((y // 4) % 2 - 0.5) * strength / 2,
    }[way]()
    return np.clip(np.array(tone, np.float32) + shade[..., None], 0, 255).astype(np.uint8)


@dataclass
class Canvas:
    """An image under way; `items` and `sources` collect what was drawn."""

    image: Image.Image
    picture: int = 0
    items: list[Item] = field(default_factory=list)
    sources: set[str] = field(default_factory=set)

    @classmethod
    def blank(cls, rng, width: int, height: int, tone: tuple[int, ...], split: str, picture: int = 0) -> "Canvas":
        return cls(Image.fromarray(paint_surface(rng, width, height, tone, split)), picture)

    def text(self, text: str, left: float, top: float, family: str, size: int, bold: bool, ink) -> None:
        """Writes one word whose letters' top is at `top`, and notes it and every character."""
        font = load_font(family, size, bold)
        _, above, _, below = font.getbbox(text)
        ImageDraw.Draw(self.image).text((left, top - above), text, font=font, fill=tuple(ink))
        ends = [font.getlength(text[:i]) for i in range(len(text) + 1)]
        for i, character in enumerate(text):
            box = (left + ends[i], top, left + ends[i + 1], top + below - above)
            self.items.append(Item("letter", character, box, self.picture))
        self.items.append(Item("word", text, (left, top, left + ends[-1], top + below - above), self.picture))
        self.sources.add(f"font:{family}")

    def icon(self, name: str, colour: str, left: float, top: float, drawing: str, size: int, ink) -> None:
        """Draws an icon into the square of `size` pixels at `(left, top)`."""
        font, characters = load_icons(drawing, size)
        x0, y0, x1, y1 = font.getbbox(characters[name])
        at = (left + (size - x1 + x0) / 2 - x0, top + (size - y1 + y0) / 2 - y0)
        ImageDraw.Draw(self.image).text(at, characters[name], font=font, fill=tuple(ink))
        box = (left, top, left + size, top + size)
        self.items.append(Item("icon", name, box, self.picture, colour))
        self.sources |= {f"drawing:{drawing}", f"size:{size}"}

    def pixels(self) -> np.ndarray:
        return np.asarray(self.image)


def text_size(text: str, family: str, size: int, bold: bool) -> tuple[float, float]:
    """Returns width and height in pixels of a line."""
    font = load_font(family, size, bold)
    _, above, _, below = font.getbbox(text)
    return font.getlength(text), below - above


def contrasting(rng: np.random.Generator, on_dark: bool) -> tuple[int, ...]:
    """Draws an ink that is read easily on a dark or a light surface."""
    low, high = (205, 256) if on_dark else (0, 60)
    return tuple(int(v) for v in rng.integers(low, high, 3))


def pick(rng: np.random.Generator, values):
    """Draws one of `values`."""
    return values[int(rng.integers(len(values)))]
