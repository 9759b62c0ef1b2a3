"""
The teacher's answers on disk, by the key of their row, in shards that only grow.

    pseudo_targets.json         what the answers were made of; a store takes no others
    shard-00000/answers.jsonl   a line for each row: its key, where its log-probabilities are, its answers
    shard-00000/topk.bin        for each row ids [n, k] int32, then log-probabilities [n, k] float32, little-endian

A shard has one writer at a time. The log-probabilities of some rows reach the disk before their lines do, so whatever
a killed writer leaves is complete up to some line: what is after it is ignored, and cut off by the next writer.

Log-probabilities are stored in float32: the probability that the k leave to all others is a difference from 1, of
which half precision would leave nothing.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from ...data import row_key
from ...data.loading import raw_rows
from ...files import locked
from .decode import Decoded
from .encode import Answer, TopK


FORMAT = 1
HEADER = "pseudo_targets.json"
ANSWERS, TOPK = "answers.jsonl", "topk.bin"
LINE = re.compile(rb'\{"key": ("(?:[^"\\]|\\.)*"), "topk": (?:null|\[(\d+), (\d+)\]), .*\}\n')
DECODE = "run linmu-pseudo-targets with this dataset and --output_dir once more"
REMEDIES = {
    "teacher": "give the teacher that made them",
    "processor": "give the processor that made them",
    "top_k": "set top_k to {}",
    "max_new_tokens": "set max_completion_length to {}",
}


class Place(NamedTuple):
    """The place of a row's line."""

    shard: Path
    start: int
    size: int


class PseudoTargets:
    """
    A reader of a store of teacher answers: `key in store`, `store.answers(key)`, `store.topk(key)`.

    It holds the keys and opens files anew for each row, so that worker processes may copy it.

    Args:
        folder (`str` or `Path`): the store.
        made_of (`Mapping`, *optional*): what the answers must have been made of, from [`describe`] of `fill.py`.

    Raises:
        `FileNotFoundError`: there is no store.
        `ValueError`: it is damaged, or holds the answers of another teacher, processor or limit.
    """

    def __init__(self, folder: str | Path, made_of: Mapping[str, Any] | None = None):
        self.folder = Path(folder)
        self.header = read_header(self.folder)
        if made_of is not None:
            check_header(self.folder, self.header, made_of)
        self.places = {
            key: place for shard in sorted(self.folder.glob("shard-*")) for key, place, _ in _scan_shard(shard)
        }

    @property
    def top_k(self) -> int:
        """Returns the number of log-probabilities for each answer token; 0 for none."""
        return self.header["made_of"]["top_k"]

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def answers(self, key: str, index: int = 0) -> list[Answer]:
        """Returns the answers of the row with that key; errors name its number, `index`."""
        return [Answer(turn["ids"], turn["finish_reason"] == "stop") for turn in self._read(key, index)["answers"]]

    def topk(self, key: str, index: int = 0) -> TopK:
        """Returns the likeliest tokens at the true answers of the row with that key."""
        if not self.top_k:
            raise ValueError(f"{self.folder} holds no log-probabilities: decode with --top_k 64, for example")
        start, n = self._read(key, index)["topk"]
        with open(self.places[key].shard / TOPK, "rb") as file:
            file.seek(start)
            data = file.read(_topk_bytes(n, self.top_k))
        ids, logprobs = (np.frombuffer(data, kind).reshape(2, n, -1)[part] for part, kind in enumerate(("<i4", "<f4")))
        return TopK(torch.tensor(ids), torch.tensor(logprobs))

    def check_rows(self, rows: Iterable[Mapping], max_bad_rows: int = 0) -> str:
        """
        Returns a hash of the answers to these rows. Raises a `ValueError` that counts the rows without an answer and
        names the first, if these are more than `max_bad_rows`; all rows are read once.
        """
        missing, digest = [], hashlib.sha256()
        for index, row in enumerate(raw_rows(rows)):
            try:
                if isinstance(row, ValueError):
                    raise row
                key = row_key(row, index)
                if key in self:
                    digest.update(json.dumps([key, self._read(key, index)["answers"]]).encode())
                else:
                    missing.append(index)
            except ValueError:
                if not max_bad_rows:
                    raise
                missing.append(index)
        if len(missing) > max_bad_rows:
            raise ValueError(f"{self.folder} has no answers to {len(missing)} rows, row {missing[0]} first: {DECODE}")
        return digest.hexdigest()[:16]

    def _read(self, key: str, index: int) -> dict[str, Any]:
        if key not in self.places:
            raise ValueError(f"{self.folder} has no answers to row {index} (key {key}): {DECODE}")
        shard, start, size = self.places[key]
        with open(shard / ANSWERS, "rb") as file:
            file.seek(start)
            return json.loads(file.read(size))


class ShardWriter:
    """A writer that appends rows to the shard that [`open_shard`] opened."""

    def __init__(self, answers: IO[bytes], topk: IO[bytes]):
        self._answers, self._topk = answers, topk

    def write(self, rows: Mapping[str, Decoded]) -> None:
        """Appends some rows by their keys; they are on disk when it returns."""
        lines = []
        for key, (answers, topk) in rows.items():
            place = None
            if topk is not None:
                place = [self._topk.tell(), len(topk.ids)]
                self._topk.write(topk.ids.numpy().astype("<i4").tobytes())
                self._topk.write(topk.logprobs.numpy().astype("<f4").tobytes())
            turns = [{"ids": ids, "finish_reason": "stop" if stopped else "length"} for ids, stopped in answers]
            lines.append(json.dumps({"key": key, "topk": place, "answers": turns}) + "\n")
        _to_disk(self._topk)
        self._answers.write("".join(lines).encode())
        _to_disk(self._answers)


@contextmanager
def open_shard(folder: Path, number: int) -> Iterator[ShardWriter]:
    """
    Opens shard `number` of a store for appending, with what a killed writer left of an unfinished row cut off.

    Raises:
        `BlockingIOError`: another process is writing it.
    """
    shard = folder / f"shard-{number:05d}"
    with locked(shard):
        shard.mkdir(exist_ok=True)
        written = list(_scan_shard(shard))
        with open(shard / ANSWERS, "ab") as answers, open(shard / TOPK, "ab") as topk:
            _, last, end = written[-1] if written else ("", Place(shard, 0, 0), 0)
            answers.truncate(last.start + last.size)
            topk.truncate(max([end, *(row[2] for row in written)]))
            for file in (answers, topk):
                file.seek(0, os.SEEK_END)
            yield ShardWriter(answers, topk)


def write_header(folder: Path, made_of: Mapping[str, Any], about: Mapping[str, Any], number: int = 0) -> None:
    """
    Makes a store for answers that are made of `made_of`, or checks that the one in `folder` is. Shard `number` writes
    a file of its own first, which it takes away also where it was killed before.

    Raises:
        `ValueError`: it holds other answers, or `folder` holds something else.
    """
    own = folder / f"{HEADER}.{number}"
    if not (folder / HEADER).exists():
        folder.mkdir(parents=True, exist_ok=True)
        strangers = [path.name for path in folder.iterdir() if not path.name.startswith((".", HEADER))]
        if strangers and not (folder / HEADER).exists():
            raise ValueError(f"{folder} holds {sorted(strangers)[0]} and no answers: give a folder of its own")
        # Several processes may begin at once: the first one's file stays.
        with open(own, "wb") as file:
            file.write(json.dumps({"format": FORMAT, "made_of": made_of, "about": about}, indent=2).encode() + b"\n")
            _to_disk(file)
        try:
            os.link(own, folder / HEADER)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(own, folder / HEADER)
    own.unlink(missing_ok=True)
    check_header(folder, read_header(folder), made_of)


def read_header(folder: Path) -> dict[str, Any]:
    """Reads what a store's answers were made of."""
    file = folder / HEADER
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is no folder of teacher answers: make it with linmu-pseudo-targets")
    try:
        header = json.loads(file.read_text())
        if header["format"] == FORMAT and isinstance(header["made_of"]["top_k"], int):
            return header
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"{file} is damaged, or of another version: decode into another folder")


def check_header(folder: Path, header: Mapping[str, Any], made_of: Mapping[str, Any]) -> None:
    """Raises a `ValueError` that says what differs between a store's answers and those that are wanted."""
    have = header["made_of"]
    differing = [name for name in made_of if have.get(name) != made_of[name]]
    if differing:
        texts = [text for name in differing for text in _differences(name, have.get(name), made_of[name])]
        remedies = [REMEDIES[name].format(have.get(name)) for name in differing if name in REMEDIES]
        about = ", ".join(f"{name} {value}" for name, value in header.get("about", {}).items() if value)
        remedy = ", ".join(
            [*remedies, "or decode into another folder"] if remedies else ["decode into another folder"]
        )
        raise ValueError(f"{folder} holds other answers ({about}): {'; '.join(texts)}: {remedy}")


def _differences(name: str, there: Any, here: Any) -> list[str]:
    """What differs between two values; of settings each one that does."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        keys = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
        return [
            f"{name}: {key} is {there.get(key, 'not noted')} there and {here.get(key, 'not set')} here" for key in keys
        ]
    return [f"{name} is {there} there and {here} here"]


def _scan_shard(shard: Path) -> Iterator[tuple[str, Place, int]]:
    """Yields key, place and end of the log-probabilities of each complete row of a shard."""
    if not (shard / ANSWERS).exists():
        return
    top_k = read_header(shard.parent)["made_of"]["top_k"]
    size = (shard / TOPK).stat().st_size if (shard / TOPK).exists() else 0
    with open(shard / ANSWERS, "rb") as lines:
        start = 0
        for line in lines:
            found = LINE.fullmatch(line)
            end = int(found[2]) + _topk_bytes(int(found[3]), top_k) if found and found[2] else 0
            if not found or end > size:
                return
            yield json.loads(found[1]), Place(shard, start, len(line)), end
            start += len(line)


def _topk_bytes(n: int, top_k: int) -> int:
    return 8 * n * top_k


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
