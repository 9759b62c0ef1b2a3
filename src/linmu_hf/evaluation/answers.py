"""The answers of a model on disk, a line for each as soon as it is there: a killed evaluation goes on where it was."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import Row, row_key
from ..files import write_text
from .retention import generate_answers


class AnswerStore:
    """
    Answers by the key of their row. Each process appends to a file of its own; all read all.

    Args:
        folder (`Path`): For `made_of.json` and the files of the processes.
        made_of (`Mapping[str, Any]`): What decides about answers: JSON.
        processes (`accelerate.PartialState`): The first process makes the folder, the others wait for it.

    Raises:
        `ValueError`: The folder holds answers of another make.
    """

    def __init__(self, folder: Path, made_of: Mapping[str, Any], processes):
        self.folder, self.process = folder, processes.process_index
        header = folder / "made_of.json"
        if header.exists():
            differs = {name for name, value in json.loads(header.read_text()).items() if made_of.get(name) != value}
            if differs:
                raise ValueError(
                    f"{folder} holds answers made with another {', '.join(sorted(differs))}: remove it, or give "
                    "another --output"
                )
        elif processes.process_index == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(header, json.dumps(made_of, indent=1) + "\n")
        processes.wait_for_everyone()

    def read(self) -> dict[str, tuple[str, bool]]:
        """Returns text, and whether it was cut by the limit, of every answer by the key of its row."""
        found = {}
        for file in sorted(self.folder.glob("answers-*.jsonl")):
            for line in file.read_bytes().splitlines():
                try:
                    key, text, cut = json.loads(line)
                except ValueError:
                    continue  # all that a killed process wrote of its last line
                found[key] = (text, cut)
        return found

    def add(self, keys: Sequence[str], texts: Sequence[str], cut: Sequence[bool]) -> None:
        """Keeps some answers, for good."""
        file = self.folder / f"answers-{self.process}.jsonl"
        lines = "".join(json.dumps(entry) + "\n" for entry in zip(keys, texts, cut, strict=True)).encode()
        with open(file, "ab") as stream:
            if stream.tell() and not file.read_bytes().endswith(b"\n"):
                lines = b"\n" + lines  # begins a line anew
            stream.write(lines)
            stream.flush()
            os.fsync(stream.fileno())


def describe_model(path: str) -> list[list[Any]]:
    """Returns name, size and time of the files of a model in a folder: those of another training differ."""
    folder = Path(path).expanduser()
    files = sorted(file for file in folder.glob("*") if file.is_file()) if folder.is_dir() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def answer_and_keep(
    model, processor, rows: Sequence[Row], numbers: Sequence[int], unusable: dict[int, str], store: AnswerStore,
    processes, **options,
) -> tuple[list[str], list[int]]:  # fmt: skip
    """
    Answers the rows that the store has no answer to, each process its share.

    Args:
        model, processor, rows, numbers, unusable, options: As for [`generate_answers`].
        store (`AnswerStore`): Takes the answers.
        processes (`accelerate.PartialState`): Number of this process, of all, and how they wait for each other.

    Returns:
        `tuple[list[str], list[int]]`: The answers to all rows, and the numbers of those that were cut.
    """
    keys = [row_key(row, number) for row, number in zip(rows, numbers, strict=True)]
    known = store.read()
    missing = [i for i, key in enumerate(keys) if key not in known and numbers[i] not in unusable]
    processes.wait_for_everyone()  # all have read the same before anyone adds
    own = missing[processes.process_index :: processes.num_processes]

    def keep(places: list[int], texts: list[str], cut: list[bool]) -> None:
        store.add([keys[own[place]] for place in places], texts, cut)

    some = [rows[i] for i in own]
    generate_answers(
        model, processor, some, numbers=[numbers[i] for i in own], unusable=unusable, keep=keep, **options
    )
    processes.wait_for_everyone()
    known = store.read()
    for number, key in zip(numbers, keys):
        if key not in known:
            unusable.setdefault(number, f"row {number} cannot be encoded: another process says why")
    answers = [known.get(key, ("", False)) for key in keys]
    return [text for text, _ in answers], [number for number, (_, cut) in zip(numbers, answers) if cut]
