"""What the teacher says in every assistant turn, greedily, with the true answers as a draft."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ...data import Row, read_row
from ..float32_logits import Float32Logits
from ..losses import IGNORE_INDEX, next_token_targets
from ..rows.collator import Features, collate
from .encode import Answer, TopK, answer_spans, encode_answers, encode_prompt, encode_skeleton, true_answers


CHUNK = 1024  # positions whose logits exist at a time

# Settings of a model that decide nothing where the likeliest token is taken and the longest length given.
IRRELEVANT = {
    "max_length", "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p", "bos_token_id",
    "pad_token_id", "use_cache", "cache_implementation", "return_dict_in_generate", "transformers_version",
    "_from_model_config",
}  # fmt: skip


class Decoded(NamedTuple):
    """The teacher's answers to one row, and its log-probabilities at the tokens of the true ones."""

    answers: list[Answer]
    topk: TopK | None


@torch.no_grad()
def decode_rows(
    teacher, processor, rows: Mapping[int, Row], *, max_new_tokens: int = 128, top_k: int = 0
) -> list[Decoded]:
    """
    Decodes what the teacher says in every assistant turn of a batch of rows, each turn after its own earlier answers.

    Where one forward pass over the true answers shows that the teacher would have said them word for word, nothing
    has to be generated; only a turn at which it deviates is decoded, and the turns after it are then tried again.

    Args:
        teacher (`LinMUForConditionalGeneration`): the teacher.
        processor (`ProcessorMixin`): its processor.
        rows (`Mapping[int, Mapping]`): conversational rows by their numbers, see [`encode_rows`].
        max_new_tokens (`int`, *optional*, defaults to 128): see [`decode_pseudo_targets`].
        top_k (`int`, *optional*, defaults to 0): likeliest tokens to note for every token of the true answers.

    Returns:
        `list[Decoded]`: one for each row.
    """
    rows = {number: read_row(row, number) for number, row in rows.items()}
    skeletons = {number: encode_skeleton(processor, row, number) for number, row in rows.items()}
    answers = {number: true_answers(processor, row, skeletons[number], number) for number, row in rows.items()}
    topk: list[TopK | None] = [None] * len(rows)
    pending = dict.fromkeys(rows, 0)  # row -> first turn that is not decoded yet
    while pending:
        batch = [encode_answers(processor, rows[n], answers[n], n, skeletons[n]) for n in pending]
        found, likeliest = judge(teacher, processor, batch, top_k)
        if top_k:  # the first time round, at the true answers
            topk, top_k = likeliest, 0
        deviating = {}
        for number, turns in zip(pending, found, strict=True):
            turn = next((turn for turn in turns if turn >= pending[number]), None)
            if turn is not None:
                deviating[number] = turn
        prompts = [
            encode_prompt(processor, rows[n], answers[n][:turn], n, skeletons[n]) for n, turn in deviating.items()
        ]
        decoded = generate(teacher, processor, prompts, max_new_tokens) if prompts else []
        for (number, turn), ids in zip(deviating.items(), decoded, strict=True):
            stopped = ids[-1] in stop_tokens(teacher, processor)
            answers[number][turn] = Answer(ids[:-1] if stopped else ids, stopped)
        pending = {number: turn + 1 for number, turn in deviating.items() if turn + 1 < len(answers[number])}
    return [Decoded(*row) for row in zip(answers.values(), topk, strict=True)]


def judge(teacher, processor, rows: Sequence[Features], top_k: int = 0) -> tuple[list[list[int]], list[TopK | None]]:
    """
    Returns for each row the assistant turns in which the teacher, given all before, would have said another token,
    and with `top_k` its likeliest tokens, of those that the tokenizer knows, for every labelled one.
    """
    batch = {key: value.to(teacher.device) for key, value in collate(rows, processor.tokenizer.pad_token_id).items()}
    targets = next_token_targets(batch.pop("labels"))  # [b, t]
    counted = targets != IGNORE_INDEX
    hidden_states = teacher.model(**batch, use_cache=False).last_hidden_state[counted]
    banned, known = suppressed(teacher), len(processor.tokenizer)
    wrong, ids, logprobs = [], [], []
    for chunk, wanted in zip(hidden_states.split(CHUNK), targets[counted].split(CHUNK), strict=True):
        with Float32Logits():
            logits = teacher.lm_head(chunk)
        if top_k:
            best = F.log_softmax(logits, -1)[:, :known].topk(top_k)
            ids.append(best.indices.int().cpu())
            logprobs.append(best.values.float().cpu())
        said = logits.to(chunk.dtype)  # as `generate` compares them
        said[:, banned] = -torch.inf
        wrong.append(said.argmax(-1) != wanted)
    errors = torch.zeros_like(counted)
    errors[counted] = torch.cat(wrong)
    turns = [
        [turn for turn, (start, end) in enumerate(answer_spans(row)) if row_errors[start:end].any()]
        for row, row_errors in zip(targets, errors, strict=True)
    ]
    if not top_k:
        return turns, [None] * len(rows)
    sizes = counted.sum(1).tolist()
    topk = zip(torch.cat(ids).split(sizes), torch.cat(logprobs).split(sizes), strict=True)
    return turns, [TopK(*each) for each in topk]


def generate(
    model, processor, prompts: Sequence[Features], max_new_tokens: int, scores: LogitsProcessor | None = None
) -> list[list[int]]:
    """
    Decodes the next turn after each prompt: the likeliest tokens, by what `scores` makes of the logits.

    Args:
        model (`LinMUForConditionalGeneration`): Teacher or student, in evaluation mode.
        processor (`ProcessorMixin`): Its processor.
        prompts (`Sequence[Features]`): Encoded rows that end where an answer begins.
        max_new_tokens (`int`): Tokens after which an answer is cut.
        scores (`LogitsProcessor`, *optional*): Changes the logits of every step.

    Returns:
        `list[list[int]]`: The ids of each answer, of which the last is a stop token unless it was cut.
    """
    settings, pad = generation_settings(model, processor), processor.tokenizer.pad_token_id
    config = GenerationConfig(max_new_tokens=max_new_tokens, use_cache=True, pad_token_id=pad, **settings)
    batch = collate(prompts, pad, padding_side="left")
    batch = {key: value.to(model.device) for key, value in batch.items()}
    given = LogitsProcessorList([] if scores is None else [scores])
    said: Tensor = model.generate(**batch, generation_config=config, logits_processor=given)
    answers, stops = [], stop_tokens(model, processor)
    for ids in said[:, batch["input_ids"].shape[1] :].tolist():
        stop = next((place for place, id in enumerate(ids) if id in stops), len(ids))
        answers.append(ids[: stop + 1])
    return answers


def generation_settings(model, processor) -> dict[str, Any]:
    """
    Returns all that decides an answer besides the weights and its longest length: stop tokens, banned ones, and what
    else the model's own settings hold, but a penalty, which would make it say what it does not believe.
    """
    own = model.generation_config.to_diff_dict()
    eos = own.get("eos_token_id")
    return {name: value for name, value in own.items() if name not in IRRELEVANT and value is not None} | {
        "do_sample": False,
        "repetition_penalty": 1.0,
        "eos_token_id": processor.tokenizer.eos_token_id if eos is None else eos,
        "suppress_tokens": suppressed(model),
    }


def stop_tokens(model, processor) -> set[int]:
    """Returns the tokens that end an answer."""
    eos = generation_settings(model, processor)["eos_token_id"]
    return {eos} if isinstance(eos, int) else set(eos)


def suppressed(model) -> list[int]:
    """Returns the tokens that no answer may hold: untrained ones, and placeholders of images that are not there."""
    config = model.config
    ids = [*(model.generation_config.suppress_tokens or []), config.image_token_id, config.video_token_id]
    return [id for id in ids if id < config.text_config.vocab_size]
