"""Rows of JSON files one after another: objects such as JSON Lines, or one list that is never held whole."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any


CHUNK = 1 << 16  # characters read at a time
SOMETHING = re.compile(r"[^ \t\r\n]")
DECODER = json.JSONDecoder()
AS_UTF8 = "save the file as UTF-8"


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
        number = 0
        with fsspec.open(name, "rt", encoding="utf-8-sig", compression="infer") as file:
            try:
                start, place = _skip_space(file, "", 0)
                read = _entries if start[place : place + 1] == "[" else _values
                for row in read(file, start, place):
                    if not isinstance(row, dict):
                        raise ValueError(f"it is {row!r:.60} and no object")
                    yield row
                    number += 1
            except UnicodeDecodeError as error:
                raise ValueError(f"{name} cannot be read at row {number} or after: {error}: {AS_UTF8}") from error
            except ValueError as error:
                raise ValueError(f"{name} cannot be read at row {number}: {error}") from error


def _values(file, text: str, place: int) -> Iterator[Any]:
    """The values of a file, with white space between them."""
    while place < len(text):
        row, text, place = _decode(file, text, place)
        yield row
        text, place = _skip_space(file, text, place)


def _entries(file, text: str, place: int) -> Iterator[Any]:
    """The entries of the list that is the whole file."""
    text, place = _skip_space(file, text, place + 1)
    while text[place : place + 1] != "]":
        row, text, place = _decode(file, text, place)
        yield row
        text, place = _skip_space(file, text, place)
        if text[place : place + 1] == ",":
            text, place = _skip_space(file, text, place + 1)
            if text[place : place + 1] == "]":
                raise ValueError("there is a comma after the last row of the list: remove it")
        elif text[place : place + 1] != "]":
            raise ValueError(f"{text[place : place + 40]!r} comes before it, where a comma or `]` belongs")
    text, place = _skip_space(file, text, place + 1)
    if place < len(text):
        raise ValueError(
            f"{text[place : place + 40]!r} comes after the end of the list: a file is one list, or objects without one"
        )


def _skip_space(file, text: str, place: int) -> tuple[str, int]:
    """The text and the place in it of the next character that is no white space; the text is empty at the end."""
    while True:
        first = SOMETHING.search(text, place)
        if first:
            return text, first.start()
        text, place = file.read(CHUNK), 0
        if not text:
            return text, place


def _decode(file, text: str, place: int) -> tuple[Any, str, int]:
    """A value, then the text and the place after it; what is not read yet is read if the value goes on there."""
    size = CHUNK
    while True:
        try:
            row, end = DECODER.raw_decode(text, place)
            return row, text, end
        except json.JSONDecodeError as error:
            goes_on = error.pos > len(text) - 16 or error.msg.startswith("Unterminated string")
            chunk = file.read(size) if goes_on else ""
            if not chunk:
                raise ValueError(f"{error.msg} at {text[error.pos : error.pos + 40]!r}") from error
            text, place, size = text[place:] + chunk, 0, 2 * size
