"""Teacher-decoded answers for the sequence-level loss (Eq. 8)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..data import encode_prompts, encode_rows, read_row
from .losses import IGNORE_INDEX, next_token_targets


Messages = list[dict[str, Any]]
MEDIA = {"image": "images", "video": "videos"}


@torch.no_grad()
def decode_pseudo_targets(
    teacher,
    processor,
    rows: Sequence[Mapping],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    cache_file: str | Path | None = None,
) -> list[Messages]:
    """
    The conversations of `rows` with every assistant turn replaced by what the teacher says: decoded greedily, each
    turn after the teacher's own earlier answers.

    The true answers serve as a draft. Where one forward pass shows that the teacher would have said them word for
    word, nothing has to be generated; only a turn at which it deviates is decoded, and the turns behind it are then
    tried again.

    Args:
        teacher (`LinMUForConditionalGeneration`): the teacher.
        processor (`ProcessorMixin`): its processor.
        rows (`Sequence[Mapping]`): conversational rows, see [`encode_rows`].
        max_new_tokens (`int`, *optional*, defaults to 128): longest answer, in tokens.
        batch_size (`int`, *optional*, defaults to 8): rows at a time.
        cache_file (`str` or `Path`, *optional*):
            JSON lines, one for each row that is done. A later call on the same rows continues behind them.

    Returns:
        `list[list[dict]]`: the `messages` of each row.
    """
    done = [] if cache_file is None else _read_lines(Path(cache_file))
    for start in tqdm(range(len(done), len(rows), batch_size), desc="teacher's answers", unit="batch"):
        batch = [read_row(rows[index], index) for index in range(start, min(start + batch_size, len(rows)))]
        decoded = _decode(teacher, processor, batch, max_new_tokens)
        done += decoded
        if cache_file is not None:
            with open(cache_file, "a") as lines:
                lines.writelines(json.dumps(messages) + "\n" for messages in decoded)
    return done


def _decode(teacher, processor, rows: list[dict], max_new_tokens: int) -> list[Messages]:
    rows = [{**row, "messages": [dict(message) for message in row["messages"]]} for row in rows]
    pending = dict.fromkeys(range(len(rows)), 0)  # row -> first turn that is not decoded yet
    while pending:
        deviating = {}
        found = _deviating_turns(teacher, processor, [rows[index] for index in pending])
        for index, turns in zip(pending, found, strict=True):
            turn = next((turn for turn in turns if turn >= pending[index]), None)
            if turn is not None:
                deviating[index] = turn
        cut = [_cut_behind_turn(rows[index], turn) for index, turn in deviating.items()]
        answers = _generate(teacher, processor, cut, max_new_tokens) if cut else []
        for (index, turn), answer in zip(deviating.items(), answers, strict=True):
            position = _assistant_turns(rows[index]["messages"])[turn]
            rows[index]["messages"][position]["content"] = [{"type": "text", "text": answer}]
        pending = {index: turn + 1 for index, turn in deviating.items()}
        pending = {i: turn for i, turn in pending.items() if turn < len(_assistant_turns(rows[i]["messages"]))}
    return [row["messages"] for row in rows]


def _deviating_turns(teacher, processor, rows: list[dict]) -> Iterator[list[int]]:
    """For each row the assistant turns in which the teacher, given all before, would have said another token."""
    batch = encode_rows(processor, rows).to(teacher.device)
    targets = next_token_targets(batch.pop("labels"))  # [b, t]
    counted = targets != IGNORE_INDEX
    hidden_states = teacher.model(**batch, use_cache=False).last_hidden_state
    wrong = torch.zeros_like(counted)
    logits = teacher.lm_head(hidden_states[counted])
    logits[:, teacher.generation_config.suppress_tokens or []] = -torch.inf
    wrong[counted] = logits.argmax(-1) != targets[counted]
    turn = _turn_numbers(counted)
    for index in range(len(rows)):
        yield turn[index][wrong[index]].unique().tolist()


def _turn_numbers(counted: Tensor) -> Tensor:
    """Numbers the runs of counted positions of each row: [b, t], 0 in the first run, 1 in the second."""
    starts = counted & ~torch.nn.functional.pad(counted[:, :-1], (1, 0))
    return starts.long().cumsum(1) - 1


def _generate(teacher, processor, rows: list[dict], max_new_tokens: int) -> list[str]:
    tokenizer = processor.tokenizer
    eos = teacher.generation_config.eos_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id if eos is None else eos,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=teacher.generation_config.suppress_tokens,
    )
    prompts = encode_prompts(processor, rows).to(teacher.device)
    ids = teacher.generate(**prompts, generation_config=config)[:, prompts["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _assistant_turns(messages: Messages) -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _cut_behind_turn(row: dict, turn: int) -> dict:
    """The row up to and with its assistant turn number `turn`, and the images and videos of that part only."""
    messages = row["messages"][: _assistant_turns(row["messages"])[turn] + 1]
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    kinds = [part["type"] for part in parts]
    media = {column: (row.get(column) or [])[: kinds.count(kind)] for kind, column in MEDIA.items()}
    return {**row, "messages": messages, **media}


def _read_lines(path: Path) -> list[Messages]:
    """The complete lines of the file; what a killed run left behind them is cut off."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    complete = [line for line in lines if line.endswith("\n")]
    path.write_text("".join(complete))
    return [json.loads(line) for line in complete]
