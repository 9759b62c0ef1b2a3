"""Hashes of rows: of all that a row holds, and the key by which answers to it are found again."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL.Image import Image

from .formats import MEDIA, Row, read_row
from .image import local_file
from .video import Video, frame_files


BLOCK, BLOCKS = 16 * 1024, 4  # what is read of a file: so many bytes at so many places, the ends among them
SOURCES = ("image", "frames", "video", "bytes", "path", "url")


def row_key(row: Row, index: int = 0) -> str:
    """
    Returns a key of what a row says: its messages and the contents of its pictures and videos.

    It depends neither on the row's place in the dataset, nor on the order of its columns, other columns, the folder
    that its files are in, or whether these are files or bytes. Of a file only its size and 64 KiB of its content are
    read. A picture that was decoded counts by its pixels and so has another key than the file: read datasets
    undecoded.

    Args:
        row (`Mapping`): a row of any shape that [`read_row`] knows.
        index (`int`, *optional*, defaults to 0): the row's number, for errors.

    Returns:
        `str`: 32 hexadecimal digits, after the row's own `id` and a colon where it has one.

    Raises:
        `ValueError`: if [`read_row`] refuses the row.
    """
    row = read_row(row, index)
    own = row.get("id")
    digest = hashlib.sha256(json.dumps(row["messages"], sort_keys=True).encode())
    for column in MEDIA.values():
        digest.update(f"{column}{len(row[column])}".encode())
        for medium in row[column]:
            _update_medium(digest, medium)
    key = digest.hexdigest()[:32]
    return key if own is None else f"{own}:{key}"


def _update_medium(digest, medium: Any) -> None:
    inner = medium
    while isinstance(inner, Mapping):  # with a frame rate, for example
        others = {key: value for key, value in inner.items() if key not in SOURCES and value is not None}
        if others:
            update_hash(digest, others)
        inner = next((inner[key] for key in SOURCES if inner.get(key) is not None), None)
    try:
        source = local_file(medium, *SOURCES[:3])
    except ValueError:  # not there: reported where it is read
        return update_hash(digest, medium)
    if isinstance(source, str) and os.path.isdir(source):
        source = frame_files(source)
    if isinstance(source, str):
        with open(source, "rb") as file:
            _update_content(digest, file)
    elif hasattr(source, "read"):
        _update_content(digest, source)
    elif isinstance(source, Image):
        digest.update(f"{source.mode}{source.size}".encode() + source.tobytes())
    elif isinstance(source, (list, tuple)):
        digest.update(f"[{len(source)}".encode())
        for frame in source:
            _update_medium(digest, frame)
    else:
        update_hash(digest, source)


def _update_content(digest, file: IO[bytes]) -> None:
    """Adds the size of a file and blocks of its content, spread over it evenly."""
    place = file.tell()
    size = file.seek(0, os.SEEK_END)
    digest.update(f"file{size}".encode())
    last = max(size - BLOCK, 0)
    starts = range(0, size, BLOCK) if size <= BLOCK * BLOCKS else [last * i // (BLOCKS - 1) for i in range(BLOCKS)]
    for start in starts:
        file.seek(start)
        digest.update(file.read(BLOCK))
    file.seek(place)


def update_hash(digest, value: Any) -> None:
    """
    Adds one value of any nesting to a hash; of a file that is named its path, size and 64 KiB of its content, of one
    that is open all but the path.
    """
    if isinstance(value, Mapping):
        digest.update(f"{{{len(value)}".encode())
        for key in sorted(value, key=str):
            digest.update(f"{key}:".encode())
            update_hash(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            update_hash(digest, item)
    elif isinstance(value, Image):
        # One that was opened and not yet read is still what its file holds.
        if getattr(value, "fp", None) is not None and os.path.isfile(getattr(value, "filename", "") or ""):
            update_hash(digest, value.filename)
        else:
            digest.update(f"{value.mode}{value.size}".encode() + value.tobytes())
    elif isinstance(value, (np.ndarray, torch.Tensor)):
        array = np.ascontiguousarray(value)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    elif isinstance(value, Path):
        update_hash(digest, str(value))
    elif isinstance(value, Video):
        update_hash(digest, [value.frames, value.metadata.fps, list(value.metadata.frames_indices or [])])
    elif hasattr(value, "read") and hasattr(value, "seek"):
        _update_content(digest, value)
    elif isinstance(value, bytes):
        digest.update(f"bytes{len(value)}".encode() + value)
    elif isinstance(value, str):
        digest.update(f"str{len(value)}{value}".encode(errors="surrogatepass"))
        if len(value) < 4096 and os.path.isfile(value):
            with open(value, "rb") as file:
                _update_content(digest, file)
    else:  # numbers and None by value; of what else there may be, the type
        known = value is None or isinstance(value, (bool, int, float, np.generic))
        digest.update((repr(value) if known else type(value).__name__).encode())
