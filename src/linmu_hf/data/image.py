"""Pictures in the forms that rows give them: opened upright and in RGB, or only their size read."""

import base64
import io
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps


BARE_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}=*\s*")  # no path: these have dots


def local_file(source: Any, *keys: str) -> Any:
    """
    Resolves `source`: the path of a local file, a file object, or `source` itself.

    Args:
        source (`Any`):
            A path, a `file://` or `data:` address, bytes, or a mapping with one of them.
        keys (`str`):
            Keys of a mapping to look under, besides `bytes`, `path` and `url`.

    Raises:
        `ValueError`: if there is no such file, or it would have to be downloaded.
    """
    while isinstance(source, Mapping):
        found = [source[key] for key in (*keys, "bytes", "path", "url") if source.get(key) is not None]
        if not found:
            raise ValueError(f"its keys are {sorted(source)}: give a path or bytes")
        source = found[0]
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, (str, Path)):
        return source
    path = str(source)
    if path.startswith("data:"):
        return io.BytesIO(base64.b64decode(path.partition(",")[2]))
    path = path.removeprefix("file://")
    if "://" in path:
        raise ValueError(f"{path[:120]} is on another machine: download it and give the file")
    if not os.path.exists(path):
        if BARE_BASE64.fullmatch(path):
            raise ValueError(
                f'{path[:40]}... is no file: if it is base64, put "data:image/png;base64," in front of it'
            )
        raise ValueError(f"{path[:120]} does not exist: give a file, best with its whole path")
    return path


def open_image(source: Any) -> Any:
    """
    Opens a picture upright and in RGB; an array is returned as it is.

    EXIF rotation is applied, transparent parts become white, and 16 bits, and fractions from 0 to 1, are scaled to 8
    bits.

    Raises:
        `ValueError`: if it is not a picture, or a damaged one, or its values are of a range that nothing tells.
    """
    image = _open(source)
    image_size(image)
    if not isinstance(image, Image.Image):
        return image
    kind = image.format
    try:
        image = ImageOps.exif_transpose(image)
        factor = _factor(image, kind)
        if factor:
            return _to_rgb(image, factor)
    except Exception as error:  # decoders of damaged files raise all kinds
        raise ValueError(f"{_shown(source)} is a damaged image: {error}") from error
    raise ValueError(
        f"{_shown(source)} has values from {np.min(image):g} to {np.max(image):g} in 32 bits, and nothing says which "
        "is white: save it with 8 or 16 bits"
    )


def image_size(source: Any) -> tuple[int, int]:
    """Returns height and width, reading no more than the header."""
    image = _open(source)
    shape: tuple[int, ...] = (image.height, image.width) if isinstance(image, Image.Image) else np.shape(image)
    if len(shape) == 3:
        shape = shape[:2] if shape[2] in (1, 3, 4) else shape[1:]  # channels may come first or last
    if len(shape) != 2:
        raise ValueError(f"{_shown(source)} is not an image: give a file, a PIL image or an array")
    if 0 in shape:
        raise ValueError(f"{_shown(source)} is an image of {shape[0]} x {shape[1]} pixels: leave it out")
    return shape[0], shape[1]


def _open(source: Any) -> Any:
    file = local_file(source, "image")
    if not isinstance(file, str) and not hasattr(file, "read"):
        return file
    try:
        return Image.open(file)
    except Exception as error:
        raise ValueError(f"{_shown(source)} is not an image that Pillow can read") from error


def _factor(image: Image.Image, kind: str | None) -> float:
    """By what the values of a picture are multiplied to have 8 bits; 0 if that is not known."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return 1
    low, high = np.min(image), np.max(image)
    if image.mode == "F" and 0 <= low and high <= 1:
        return 255
    if 0 <= low and high <= 255:
        return 1
    # Pillow has 16 bits of these files in mode "I".
    return 1 / 256 if image.mode.startswith("I;16") or (kind in ("PNG", "PPM") and 0 <= low) else 0


def _to_rgb(image: Image.Image, factor: float) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image) * factor
        image = Image.fromarray((np.rint(values) if factor > 1 else values).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _shown(source: Any) -> str:
    source = source.get("path") or "it" if isinstance(source, Mapping) else source
    return source[:120] if isinstance(source, str) else str(source) if isinstance(source, Path) else "it"
