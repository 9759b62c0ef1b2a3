"""Pictures in the forms that rows give them: opened upright and in RGB, or only their size read."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps


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
    if not Path(path).exists():
        raise ValueError(f"{path[:120]} does not exist: give a file, best with its whole path")
    return path


def open_image(source: Any) -> Any:
    """
    Opens a picture upright and in RGB; an array is returned as it is.

    EXIF rotation is applied, transparent parts become white, and 16 bits are scaled to 8.

    Raises:
        `ValueError`: if it is not a picture, or a damaged one.
    """
    image = _open(source)
    if not isinstance(image, Image.Image):
        image_size(image)
        return image
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders of damaged files raise all kinds
        raise ValueError(f"{_shown(source)} is a damaged image: {error}") from error


def image_size(source: Any) -> tuple[int, int]:
    """Returns height and width, reading no more than the header."""
    image = _open(source)
    if isinstance(image, Image.Image):
        return image.height, image.width
    shape = np.shape(image)
    if len(shape) == 3:
        shape = shape[:2] if shape[2] in (1, 3, 4) else shape[1:]  # channels may come first or last
    if len(shape) != 2:
        raise ValueError(f"{_shown(source)} is not an image: give a file, a PIL image or an array")
    return shape[0], shape[1]


def _open(source: Any) -> Any:
    file = local_file(source, "image")
    if not isinstance(file, str) and not hasattr(file, "read"):
        return file
    try:
        return Image.open(file)
    except Exception as error:
        raise ValueError(f"{_shown(source)} is not an image that Pillow can read") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        image = Image.fromarray((values >> 8 if values.max() > 255 else values).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _shown(source: Any) -> str:
    source = source.get("path") or "it" if isinstance(source, Mapping) else source
    return source[:120] if isinstance(source, str) else str(source) if isinstance(source, Path) else "it"
