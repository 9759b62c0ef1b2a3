"""Rows of `linmu_hf.data` as tasks of lmms-eval: files in a folder for its `--include_path`."""

import json
import shutil
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ...data import Row, answer_text, load_rows
from ...data.formats import MEDIA, question_text, read_row
from ...files import write_text
from ..retention import answer_limit, correct_answers, tasks_of


KEEP = "keep_special_tokens_of_the_reference"  # of `generation_kwargs`: answers are judged by these, too
FUNCTIONS = ("doc_to_messages", "doc_to_text", "doc_to_target", "process_results")


def write_tasks(
    dataset: str, split: str, folder: Path, processor, limit: int | None = None, without: Container[int] = ()
) -> dict[str, str]:
    """
    Writes a task for each value of the column `task` of a dataset, with its rows, and `names.json`.

    Args:
        dataset, split: As for [`load_rows`].
        folder (`Path`): Where the files go; what is there is replaced.
        processor (`ProcessorMixin`): Counts the tokens of the longest reference.
        limit (`int`, *optional*): At most this many rows of every task.
        without (`Container[int]`, *optional*): Numbers of rows that are left out.

    Returns:
        `dict[str, str]`: The task in the column, by its name for `--tasks`.
    """
    rows = load_rows(dataset, split)
    names: dict[str, str] = {}
    tasks = tasks_of(rows)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_text(folder / "linmu_rows.py", f"from {__name__} import {', '.join(FUNCTIONS)}\n")
    for task in dict.fromkeys(tasks):
        some = rows.select([i for i, one in enumerate(tasks) if one == task and i not in without][:limit])
        if not len(some):
            continue
        name = f"linmu_{len(names)}_{''.join(c if c.isalnum() else '_' for c in task)}"
        datasets.DatasetDict({split: some}).save_to_disk(str(folder / "data" / name))
        write_text(folder / f"{name}.yaml", _describe(name, folder, split, answer_limit(processor, some)))
        names[name] = task
    write_text(folder / "names.json", json.dumps(names))
    return names


def _describe(name: str, folder: Path, split: str, limit: int) -> str:
    functions = "\n".join(f"{name}: !function linmu_rows.{name}" for name in FUNCTIONS)
    return f"""task: {name}
dataset_path: {(folder / "data" / name).absolute()}
dataset_kwargs:
  load_from_disk: true
test_split: {split}
output_type: generate_until
{functions}
generation_kwargs:
  max_new_tokens: {limit}
  {KEEP}: true
  temperature: 0
  do_sample: false
metric_list:
  - metric: score
    aggregation: mean
    higher_is_better: true
"""


def doc_to_messages(doc: Row, lmms_eval_specific_kwargs: Any = None) -> list[dict[str, Any]]:
    """Returns what comes before the row's last answer, each picture and video in its part."""
    row = read_row(doc)
    media = {kind: iter(row[column]) for kind, column in MEDIA.items()}
    last = max(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
    return [{**message, "content": _parts(message["content"], media)} for message in row["messages"][:last]]


def _parts(content: Any, media: Mapping[str, Any]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{**part, "url": next(media[part["type"]])} if part["type"] in MEDIA else part for part in content]


def doc_to_text(doc: Row) -> str:
    """Returns the texts before the row's last answer, of rows that lmms-eval hands over without pictures."""
    return question_text(doc)


def doc_to_target(doc: Row) -> str:
    """Returns the row's last answer."""
    return answer_text(doc)


def process_results(doc: Row, results: list[str]) -> dict[str, float]:
    """Returns whether the answer is right, as `linmu-eval` judges it."""
    return {"score": float(np.mean(correct_answers([doc] * len(results), results)))}
