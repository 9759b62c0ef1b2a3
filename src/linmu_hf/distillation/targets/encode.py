"""Rows with the teacher's answers in place of the true ones, and its log-probabilities beside them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...data import Row, read_row, row_key
from ...data.formats import MEDIA
from ..losses import IGNORE_INDEX, next_token_targets
from ..rows.collator import TOKEN_FIELDS, Features, encode_row


STAND_IN = "x"  # the text of every assistant turn of a skeleton


class Answer(NamedTuple):
    """One assistant turn: its token ids without a stop token, and whether a stop token came after them."""

    ids: list[int]
    stopped: bool


class TopK(NamedTuple):
    """The teacher's likeliest tokens for n answer tokens: `ids` [n, k] int32 and `logprobs` [n, k] float32."""

    ids: Tensor
    logprobs: Tensor


def encode_stored(store, processor, row: Row, index: int = 0) -> Features:
    """Encodes row `index` with the answers that a [`PseudoTargets`] store holds to it."""
    return encode_answers(processor, row, store.answers(row_key(row, index), index), index)


def stored_topk(store, row: Row, features: Features, index: int = 0) -> Features:
    """
    Returns `topk_ids` and `topk_logprobs` [t, k] of a row that was encoded with its true answers.

    Entry i is about the token after token i, as in [`next_token_targets`]; where no answer token follows it is zero.
    """
    topk = store.topk(row_key(row, index), index)
    counted = next_token_targets(features["labels"][None])[0] != IGNORE_INDEX
    if counted.sum() != len(topk.ids):
        raise ValueError(f"row {index} has {counted.sum()} answer tokens and {store.folder} knows {len(topk.ids)}")
    ids, logprobs = (value.new_zeros(len(counted), value.shape[1]) for value in topk)
    ids[counted], logprobs[counted] = topk
    return {"topk_ids": ids, "topk_logprobs": logprobs}


def encode_answers(
    processor, row: Row, answers: Sequence[Answer], number: int = 0, skeleton: Features | None = None
) -> Features:
    """
    Encodes row `number` of a dataset with other answers, given as token ids, in place of its own.

    Labels are the ids and, after an answer that stopped, the tokens that close its turn; after one that was cut these
    stay for the sake of the turns that follow, without a label. No picture has to be read if `skeleton` is given,
    which [`encode_skeleton`] made of the row.
    """
    skeleton = encode_skeleton(processor, row, number) if skeleton is None else skeleton
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


def true_answers(processor, row: Row, skeleton: Features, number: int = 0) -> list[Answer]:
    """Returns the row's own answers as token ids, given what [`encode_skeleton`] made of it."""
    truth = encode_row(processor, row, number)
    spans, turns = answer_spans(truth["labels"]), _turns(processor, skeleton)
    if len(spans) != len(turns):
        raise ValueError(f"row {number} has an assistant turn without a token: leave it out")
    closings = [end - closing for _, closing, end in turns]
    return [
        Answer(truth["input_ids"][start : end - closing].tolist(), True)
        for (start, end), closing in zip(spans, closings)
    ]


def encode_prompt(
    processor, row: Row, answers: Sequence[Answer], number: int = 0, skeleton: Features | None = None
) -> Features:
    """Encodes what is before the row's assistant turn number `len(answers)`, with the media of that part."""
    turn, cut = len(answers), cut_after_turn(row, len(answers))
    if any(len(cut[column]) < len(row.get(column) or []) for column in MEDIA.values()):
        row, skeleton = cut, None
    turns = sum(message["role"] == "assistant" for message in row["messages"])
    stand_ins = [Answer([0], True)] * (turns - turn)
    features = encode_answers(processor, row, [*answers, *stand_ins], number, skeleton)
    start, _ = answer_spans(features.pop("labels"))[turn]
    return {key: value[:start] if key in TOKEN_FIELDS else value for key, value in features.items()}


def cut_after_turn(row: Row, turn: int) -> dict:
    """Returns the row up to and with its assistant turn number `turn`, and the images and videos of that part only."""
    places = [index for index, message in enumerate(row["messages"]) if message["role"] == "assistant"]
    messages = row["messages"][: places[turn] + 1]
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    kinds = [part["type"] for part in parts]
    media = {column: (row.get(column) or [])[: kinds.count(kind)] for kind, column in MEDIA.items()}
    return {**row, "messages": messages, **media}


def answer_spans(labels: Tensor) -> list[tuple[int, int]]:
    """Returns start and end of every run of labels [t]."""
    counted = torch.nn.functional.pad((labels != IGNORE_INDEX).int(), (1, 1))
    return list(zip(*((counted.diff() == step).nonzero().flatten().tolist() for step in (1, -1))))


def encode_skeleton(processor, row: Row, number: int = 0) -> Features:
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
    for start, end in answer_spans(skeleton["labels"]):
        texts = ((stop, processor.tokenizer.decode(ids[start:stop])) for stop in range(start + 1, end))
        turns.append((start, next((stop for stop, text in texts if text.rstrip().endswith(STAND_IN)), end), end))
    return turns
