"""
Recall of a key and its value over a distance.

A row is real text with statements in it, "Name and secret word: Robert apple.", and later the same statement again.
At the word before the value, a model that remembers the first statement knows the value of the second. The distance
is the number of tokens from the value in the first statement to the same value in the second. Every key and every
value occurs in one pair only, so no model can guess: without memory the share of right values is 0.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .text import BEGINNINGS, TextRows


DISTANCES = (32, 64, 128, 256, 512, 1024)
FORM = "\n\nName and secret word:{key}{value}.\n\n"
PER_ROW = 2  # questions for each distance in a row: with more, the teacher itself mixes them up
LENGTH = 1280  # tokens of a row: room for the longest distance and for all statements
KEYS = (
    "Robert Mary John David Susan Thomas Sarah Peter Paul George Anna Martin Alice Henry Laura Frank Helen Simon "
    "Emma Daniel Maria Jack Kate Oliver Lucy Adam Edward Julia Michael Ruth William Grace James Jane Charles Rose "
    "Richard Emily Joseph Sophia"
).split()
VALUES = (
    "apple river stone green house bridge silver garden winter paper horse window yellow mountain bread music forest "
    "table island flower summer glass metal sugar ocean copper purple camera engine kitchen planet market rabbit salt "
    "tower shadow basket violin hammer candle desert butter pepper orange tiger pencil bottle carpet lemon eagle"
).split()


@dataclass(frozen=True)
class Question:
    """Row `row` asks at token `at` for the value `answer`, which it has seen `distance` tokens before."""

    row: int
    at: int
    distance: int
    answer: int


def recall_rows(
    filler: Sequence[Tensor], tokenizer, distances: Sequence[int] = DISTANCES, seed: int = 0
) -> tuple[Tensor, list[Question]]:
    """
    Puts statements into rows of text, as many questions for each distance as fit, the same number in every row.

    Args:
        filler (`Sequence[Tensor]`): rows of ordinary text, [t] each and all of one length.
        tokenizer: the teacher's.
        distances (`Sequence[int]`, *optional*): in tokens.
        seed (`int`, *optional*, defaults to 0): another one gives other keys, values and places.

    Returns:
        `tuple[Tensor, list[Question]]`: the rows, [n, t], and the questions.
    """
    generator = torch.Generator().manual_seed(seed)
    keys, values = single_tokens(KEYS, tokenizer), single_tokens(VALUES, tokenizer)
    rows, questions = [], []
    for number, text in enumerate(filler):
        row = text.clone()
        free = torch.ones(len(row), dtype=torch.bool)
        free[:4] = False
        chosen_keys = torch.randperm(len(keys), generator=generator)
        chosen_values = torch.randperm(len(values), generator=generator)
        for index, distance in enumerate(sorted(list(distances) * PER_ROW, reverse=True)):
            key, value = keys[chosen_keys[index]], values[chosen_values[index]]
            statement, before = make_statement(tokenizer, key, value)
            at = place(free, len(statement), distance, generator)
            for start in (at, at + distance):
                row[start : start + len(statement)] = statement
                free[start : start + len(statement)] = False
            questions.append(Question(number, at + distance + before - 1, distance, value))
        rows.append(row)
    return torch.stack(rows), questions


def recall_set(folder: Path, tokenizer, questions: int = 64, seed: int = 0) -> tuple[Tensor, list[Question]]:
    """Returns the rows and questions of [`recall_rows`] on held-out text, with `questions` for each distance."""
    text = TextRows(folder, "held_out", tokenizer, LENGTH, seed=seed + 1)
    step = len(BEGINNINGS)  # raw text alone
    return recall_rows([text[step * index] for index in range(-(-questions // PER_ROW))], tokenizer, seed=seed)


def make_statement(tokenizer, key: int, value: int) -> tuple[Tensor, int]:
    """Returns the tokens of a statement, and how many of them come before the value."""
    tokens: list[int] = []
    for part in re.split(r"(\{\w+\})", FORM):
        if part == "{value}":
            before = len(tokens)
        known = {"{key}": [key], "{value}": [value]}
        tokens += known.get(part) or tokenizer(part, add_special_tokens=False)["input_ids"]
    return torch.tensor(tokens), before


def place(free: Tensor, length: int, distance: int, generator: torch.Generator) -> int:
    """Returns a random start such that `length` tokens from it, and `distance` tokens later, are free."""
    runs = free.unfold(0, length, 1).all(1)
    starts = (runs[: len(runs) - distance] & runs[distance:]).nonzero()[:, 0] if distance < len(runs) else []
    if not len(starts):
        raise ValueError(f"no room for a distance of {distance} tokens in a row of {len(free)}: take longer rows")
    return int(starts[torch.randint(len(starts), (1,), generator=generator)])


def single_tokens(words: Sequence[str], tokenizer) -> list[int]:
    """Returns the tokens of those words that are one token after a space."""
    encoded = [tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words]
    return [ids[0] for ids in encoded if len(ids) == 1]


@torch.no_grad()
def recall(model, rows: Tensor, questions: Sequence[Question], batch_size: int = 1) -> dict[str, Any]:
    """
    Asks a model every question of [`recall_rows`].

    Returns:
        `dict`: `share`, for each distance how many values were the model's first choice among all tokens;
        `choice`, how many were its first choice among the values of the same row; `loss`, the mean of -log p of the
        value; and `questions`, how many there were for each distance.
    """
    outcomes: dict[int, list[tuple[bool, bool, float]]] = {}
    for first in tqdm(range(0, len(rows), batch_size), desc="recalling", leave=False):
        hidden = model.model(input_ids=rows[first : first + batch_size], use_cache=False).last_hidden_state
        for row in range(first, min(first + batch_size, len(rows))):
            asked = [question for question in questions if question.row == row]
            logits = model.lm_head(hidden[row - first, [question.at for question in asked]]).float()
            answers = torch.tensor([question.answer for question in asked])
            exact = logits.argmax(-1) == answers
            choice = answers[logits[:, answers].argmax(-1)] == answers
            loss = -logits.log_softmax(-1).gather(1, answers[:, None])[:, 0]
            for question, *outcome in zip(asked, exact.tolist(), choice.tolist(), loss.tolist(), strict=True):
                outcomes.setdefault(question.distance, []).append(tuple(outcome))
    figures: dict[str, dict[int, Any]] = {"share": {}, "choice": {}, "loss": {}, "questions": {}}
    for distance, results in sorted(outcomes.items()):
        for name, column in zip(("share", "choice", "loss"), zip(*results, strict=True), strict=True):
            figures[name][distance] = sum(column) / len(results)
        figures["questions"][distance] = len(results)
    return figures
