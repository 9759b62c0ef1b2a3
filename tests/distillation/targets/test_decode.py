import pytest
import torch

from linmu_hf.data import encode_prompts
from linmu_hf.distillation.losses import IGNORE_INDEX, next_token_targets
from linmu_hf.distillation.rows.collator import TOKEN_FIELDS, encode_row
from linmu_hf.distillation.targets import decode as module
from linmu_hf.distillation.targets.decode import decode_rows, judge, suppressed
from linmu_hf.distillation.targets.encode import Answer, answer_spans, cut_after_turn, encode_skeleton, true_answers


pytestmark = pytest.mark.core_training


@pytest.fixture(scope="module")
def teacher(make_teacher):
    return make_teacher()


def decode_all(teacher, processor, rows, **options):
    """In batches of four."""
    numbered = list(enumerate(rows))
    batches = [dict(numbered[start : start + 4]) for start in range(0, len(rows), 4)]
    decoded = [row for batch in batches for row in decode_rows(teacher, processor, batch, **options)]
    return [row.answers for row in decoded]


def decode_turn_by_turn(teacher, processor, row, limit):
    """The plain way: generate every answer after the teacher's earlier ones, which are appended as they were said."""
    end, answers = processor.tokenizer.convert_tokens_to_ids("<|im_end|>"), []
    for turn, message in enumerate(row["messages"]):
        if message["role"] != "assistant":
            continue
        prompt = encode_prompts(processor, [cut_after_turn(row, turn // 2)])
        # What the template made of the earlier answers gives way to their ids.
        ids, starts = prompt["input_ids"][0], answer_spans(encode_row(processor, row)["labels"])
        for (start, stop), answer in reversed(list(zip(starts, answers))):
            ids = torch.cat([ids[:start], torch.tensor([*answer.ids, end]), ids[stop:]])
        kinds = torch.where(ids == processor.image_token_id, 1, torch.where(ids == processor.video_token_id, 2, 0))
        prompt |= {
            "input_ids": ids[None],
            "attention_mask": ids.new_ones(1, len(ids)),
            "mm_token_type_ids": kinds[None],
        }
        suppressed = [processor.image_token_id, processor.video_token_id]
        said = teacher.generate(**prompt, max_new_tokens=limit, do_sample=False, suppress_tokens=suppressed)
        said = said[0, len(ids) :].tolist()
        answers.append(Answer(said[: said.index(end)], True) if end in said else Answer(said, False))
    return answers


@pytest.mark.parametrize("limit", [1, 4])
def test_equals_decoding_turn_by_turn(teacher, processor, rows, limit):
    decoded = decode_all(teacher, processor, rows, max_new_tokens=limit)
    assert decoded == [decode_turn_by_turn(teacher, processor, row, limit) for row in rows]
    answers = [answer for answers in decoded for answer in answers]
    assert not all(answer.stopped for answer in answers)
    assert all(len(answer.ids) == limit for answer in answers if not answer.stopped)


def test_what_the_teacher_says_anyway_is_not_generated(teacher, processor, rows, monkeypatch):
    monkeypatch.setattr(module, "judge", lambda teacher, processor, rows, top_k: ([[] for _ in rows], None))
    monkeypatch.setattr(module, "generate", None)
    decoded = decode_all(teacher, processor, rows)
    assert decoded == [true_answers(processor, row, encode_skeleton(processor, row)) for row in rows]


def test_deviating_turns_are_those_in_which_an_argmax_differs(teacher, processor, rows):
    row = rows[8]  # three turns
    features = encode_row(processor, row)
    (all_turns,) = judge(teacher, processor, [features])[0]
    assert all_turns == [0, 1, 2]
    batch = encode_row(processor, row)
    logits = teacher(**{key: v[None] if key in TOKEN_FIELDS else v for key, v in batch.items()}).logits
    logits[..., suppressed(teacher)] = -torch.inf
    said = logits[0, :-1].argmax(-1)
    start, end = answer_spans(batch["labels"])[1]
    batch["labels"][start:end] = said[start - 1 : end - 1]
    assert judge(teacher, processor, [batch])[0] == [[0, 2]]


@pytest.mark.parametrize("k", [3, "all"])
def test_log_probabilities_are_the_teachers_at_the_true_answers(teacher, processor, rows, k, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 5)
    k = len(processor.tokenizer) if k == "all" else k
    decoded = decode_rows(teacher, processor, dict(enumerate(rows)), max_new_tokens=2, top_k=k)
    assert [row.answers for row in decoded] == decode_all(teacher, processor, rows, max_new_tokens=2)
    for row, (_, topk) in zip(rows, decoded):
        features = encode_row(processor, row)
        targets = next_token_targets(features.pop("labels")[None])
        batch = {key: value[None] if key in TOKEN_FIELDS else value for key, value in features.items()}
        with torch.no_grad():
            logprobs = teacher(**batch).logits[targets != IGNORE_INDEX].log_softmax(-1)
        assert topk.ids.dtype == torch.int32 and topk.logprobs.dtype == torch.float32
        torch.testing.assert_close(topk.logprobs, logprobs.gather(1, topk.ids.long()), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(topk.logprobs, logprobs.topk(k).values, rtol=1e-4, atol=1e-4)
