"""Rows of JSON files one after another: JSON Lines, or one list that is never held whole."""

import json
from collections.abc import Iterator, Sequence
from typing import Any


CHUNK = 1 << 16  # characters read at a time


def read_json_rows(files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """
    Yields the rows of JSON files. (`datasets` streams JSON, too, but texts beside lists in one column come out as JSON
    text.)

    Args:
        files (`Sequence[str]`): Paths, or addresses that `fsspec` opens.

    Raises:
        `ValueError`: A file is not JSON, or an entry is not an object; names the file and the entry.
    """
    import fsspec

    for name in files:
        with fsspec.open(name, "rt", encoding="utf-8", compression="infer") as file:
            start = file.read(CHUNK)
            while start and not start.strip():
                start = file.read(CHUNK)
            read = _entries if start.lstrip().startswith("[") else _lines
            number = 0
            try:
                for number, row in enumerate(read(file, start)):  # noqa: B007
                    if not isinstance(row, dict):
                        raise ValueError(f"it is {row!r:.60} and no object")
                    yield row
            except ValueError as error:
                raise ValueError(f"{name} cannot be read at row {number} or after: {error}") from error


def _lines(file, start: str) -> Iterator[Any]:
    rest = start
    while True:
        *lines, rest = rest.split("\n")
        yield from (json.loads(line) for line in lines if line.strip())
        chunk = file.read(CHUNK)
        if not chunk:
            break
        rest += chunk
    if rest.strip():
        yield json.loads(rest)


def _entries(file, start: str) -> Iterator[Any]:
    decoder, text, place = json.JSONDecoder(), start, start.index("[") + 1
    size = CHUNK
    while True:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        if text[place : place + 1] == "]":
            return
        try:
            row, place = decoder.raw_decode(text, place)
            size = CHUNK
            yield row
        except ValueError:  # it may go on in what is not read yet
            chunk = file.read(size)
            if not chunk:
                raise
            text, place, size = text[place:] + chunk, 0, 2 * size
