"""Teacher-decoded answers for the sequence-level loss (Eq. 8), as the token ids that the teacher generated."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..data import Row, read_row
from ..data.formats import MEDIA, fetch
from .collator import TOKEN_FIELDS, Features, collate, encode_row
from .fingerprint import fingerprint_processor, fingerprint_rows, fingerprint_weights
from .losses import IGNORE_INDEX, next_token_targets


STAND_IN = "x"  # the text of every assistant turn of a skeleton


class Answer(NamedTuple):
    """One assistant turn: its token ids without a stop token, and whether a stop token came after them."""

    ids: list[int]
    stopped: bool


@torch.no_grad()
def decode_pseudo_targets(
    teacher,
    processor,
    rows: Sequence[Mapping],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    cache_file: str | Path | None = None,
) -> list[list[Answer]]:
    """
    Decodes what the teacher says in every assistant turn of `rows`: greedily, each turn after its own earlier answers.

    The true answers serve as a draft. Where one forward pass shows that the teacher would have said them word for
    word, nothing has to be generated; only a turn at which it deviates is decoded, and the turns after it are then
    tried again.

    Args:
        teacher (`LinMUForConditionalGeneration`): the teacher.
        processor (`ProcessorMixin`): its processor.
        rows (`Sequence[Mapping]`): conversational rows, see [`encode_rows`].
        max_new_tokens (`int`, *optional*, defaults to 128):
            Longest answer that is decoded, in tokens. One that is cut there has not `stopped`, and its target no end.
        batch_size (`int`, *optional*, defaults to 8): rows at a time.
        cache_file (`str` or `Path`, *optional*):
            JSON lines: what the answers were made of, then one line for each row that is done. A later call with the
            same teacher, processor, rows and limit continues after them.

    Returns:
        `list[list[Answer]]`: an answer for each assistant turn of each row.

    Raises:
        `ValueError`: a bad row, or `cache_file` holds the answers of another teacher or to other rows.
    """
    done: list[list[Answer]] = []
    if cache_file is not None:
        made_of = {
            "teacher": fingerprint_weights(teacher),
            "processor": fingerprint_processor(processor),
            "rows": fingerprint_rows(rows),
            "max_new_tokens": max_new_tokens,
        }
        done = _read_answers(Path(cache_file), made_of)
    for start in tqdm(range(len(done), len(rows), batch_size), desc="teacher's answers", unit="batch"):
        numbers = range(start, min(start + batch_size, len(rows)))
        batch = {index: read_row(fetch(rows, index), index) for index in numbers}
        decoded = _decode(teacher, processor, batch, max_new_tokens)
        done += decoded
        if cache_file is not None:
            with open(cache_file, "a") as lines:
                lines.writelines(json.dumps(answers) + "\n" for answers in decoded)
    return done


def encode_answers(processor, row: Row, answers: Sequence[Answer], number: int = 0) -> Features:
    """
    Encodes row `number` of a dataset with other answers, given as token ids, in place of its own.

    Labels are the ids and, after an answer that stopped, the tokens that close its turn; after one that was cut these
    stay for the sake of the turns that follow, without a label.
    """
    skeleton = _encode_skeleton(processor, row, number)
    fields = torch.stack([skeleton[key] for key in TOKEN_FIELDS])
    pieces, position = [], 0
    for (start, closing, end), answer in zip(_turns(processor, skeleton), answers, strict=True):
        said = torch.tensor(answer.ids, dtype=fields.dtype)
        values = {"input_ids": said, "labels": said, "attention_mask": torch.ones_like(said)}
        close = fields[:, closing:end].clone()
        if not answer.stopped:
            close[TOKEN_FIELDS.index("labels")] = IGNORE_INDEX
        said = torch.stack([values.get(key, torch.zeros_like(said)) for key in TOKEN_FIELDS])
        pieces += [fields[:, position:start], said, close]
        position = end
    fields = torch.cat([*pieces, fields[:, position:]], dim=1)
    return {**skeleton, **dict(zip(TOKEN_FIELDS, fields))}


def _encode_skeleton(processor, row: Row, number: int) -> Features:
    """Encodes the row with the same short text in every assistant turn, which shows where answers belong."""
    row, messages = read_row(row, number), []
    for message in row["messages"]:
        if message["role"] == "assistant":
            text = STAND_IN if isinstance(message["content"], str) else [{"type": "text", "text": STAND_IN}]
            message = {"role": "assistant", "content": text}
        messages.append(message)
    return encode_row(processor, {**row, "messages": messages}, number)


def _turns(processor, skeleton: Features) -> list[tuple[int, int, int]]:
    """Where the answer of each assistant turn of a skeleton starts, where its closing tokens do, where it ends."""
    turns, ids = [], skeleton["input_ids"]
    for start, end in _spans(skeleton["labels"]):
        texts = ((stop, processor.tokenizer.decode(ids[start:stop])) for stop in range(start + 1, end))
        turns.append((start, next((stop for stop, text in texts if text.rstrip().endswith(STAND_IN)), end), end))
    return turns


def _spans(labels: Tensor) -> list[tuple[int, int]]:
    """Start and end of every run of labels [t]."""
    counted = torch.nn.functional.pad((labels != IGNORE_INDEX).int(), (1, 1))
    return list(zip(*((counted.diff() == step).nonzero().flatten().tolist() for step in (1, -1))))


def _true_answers(processor, row: Row, number: int = 0) -> list[Answer]:
    truth = encode_row(processor, row, number)
    spans, turns = _spans(truth["labels"]), _turns(processor, _encode_skeleton(processor, row, number))
    if len(spans) != len(turns):
        raise ValueError(f"row {number} has an assistant turn without a token: leave it out")
    closings = [end - closing for _, closing, end in turns]
    return [
        Answer(truth["input_ids"][start : end - closing].tolist(), True)
        for (start, end), closing in zip(spans, closings)
    ]


def _decode(teacher, processor, rows: dict[int, dict], max_new_tokens: int) -> list[list[Answer]]:
    answers = {number: _true_answers(processor, row, number) for number, row in rows.items()}
    pending = dict.fromkeys(rows, 0)  # row -> first turn that is not decoded yet
    while pending:
        batch = [encode_answers(processor, rows[number], answers[number], number) for number in pending]
        found = _deviating_turns(teacher, processor, batch)
        deviating = {}
        for number, turns in zip(pending, found, strict=True):
            turn = next((turn for turn in turns if turn >= pending[number]), None)
            if turn is not None:
                deviating[number] = turn
        prompts = [_prompt(processor, rows[n], answers[n][:turn], n) for n, turn in deviating.items()]
        decoded = _generate(teacher, processor, prompts, max_new_tokens) if prompts else []
        for (number, turn), answer in zip(deviating.items(), decoded, strict=True):
            answers[number][turn] = answer
        pending = {number: turn + 1 for number, turn in deviating.items() if turn + 1 < len(answers[number])}
    return list(answers.values())


def _deviating_turns(teacher, processor, rows: list[Features]) -> Iterator[list[int]]:
    """For each row the assistant turns in which the teacher, given all before, would have said another token."""
    batch = {key: value.to(teacher.device) for key, value in collate(rows, processor.tokenizer.pad_token_id).items()}
    targets = next_token_targets(batch.pop("labels"))  # [b, t]
    counted = targets != IGNORE_INDEX
    hidden_states = teacher.model(**batch, use_cache=False).last_hidden_state
    wrong = torch.zeros_like(counted)
    logits = teacher.lm_head(hidden_states[counted])
    logits[:, _suppressed(teacher)] = -torch.inf
    wrong[counted] = logits.argmax(-1) != targets[counted]
    for row, errors in zip(targets, wrong, strict=True):
        yield [turn for turn, (start, end) in enumerate(_spans(row)) if errors[start:end].any()]


def _prompt(processor, row: dict, answers: list[Answer], number: int) -> Features:
    """Everything before the row's assistant turn number `len(answers)`, with the images and videos of that part."""
    features = encode_answers(processor, _cut_after_turn(row, len(answers)), [*answers, Answer([0], True)], number)
    start, _ = _spans(features.pop("labels"))[-1]
    return {key: value[:start] if key in TOKEN_FIELDS else value for key, value in features.items()}


def _generate(teacher, processor, prompts: list[Features], max_new_tokens: int) -> list[Answer]:
    tokenizer = processor.tokenizer
    eos = teacher.generation_config.eos_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id if eos is None else eos,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=_suppressed(teacher),
    )
    batch = collate(prompts, tokenizer.pad_token_id, padding_side="left")
    batch = {key: value.to(teacher.device) for key, value in batch.items()}
    answers = []
    for ids in teacher.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :]:
        stops = torch.isin(ids, torch.tensor(config.eos_token_id, device=ids.device)).nonzero().flatten().tolist()
        answers.append(Answer(ids[: stops[0] if stops else None].tolist(), bool(stops)))
    return answers


def _suppressed(teacher) -> list[int]:
    """Tokens that no answer may hold: untrained ones, and placeholders of images that are not there."""
    config = teacher.config
    ids = [*(teacher.generation_config.suppress_tokens or []), config.image_token_id, config.video_token_id]
    return [id for id in ids if id < config.text_config.vocab_size]


def _cut_after_turn(row: dict, turn: int) -> dict:
    """The row up to and with its assistant turn number `turn`, and the images and videos of that part only."""
    places = [index for index, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    messages = row["messages"][: places[turn] + 1]
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    kinds = [part["type"] for part in parts]
    media = {column: (row.get(column) or [])[: kinds.count(kind)] for kind, column in MEDIA.items()}
    return {**row, "messages": messages, **media}


def _read_answers(path: Path, made_of: dict[str, Any]) -> list[list[Answer]]:
    """The complete lines of the file, which begins with `made_of`; what a killed run left after them is cut off."""
    complete = path.read_text().splitlines(keepends=True) if path.exists() else []
    complete = [line for line in complete if line.endswith("\n")] or [json.dumps(made_of) + "\n"]
    lines = [json.loads(line) for line in complete]
    if lines[0] != made_of:
        raise ValueError(f"{path} holds answers of another teacher or to other rows: delete it, they are decoded anew")
    path.write_text("".join(complete))
    return [[Answer(*answer) for answer in answers] for answers in lines[1:]]
