import pytest
import torch

from linmu_hf.data import encode_prompts
from linmu_hf.distillation import pseudo_targets as module
from linmu_hf.distillation.collator import encode_row
from linmu_hf.distillation.pseudo_targets import Answer, decode_pseudo_targets, encode_answers


pytestmark = pytest.mark.core_training


@pytest.fixture(scope="module")
def teacher(make_teacher):
    return make_teacher()


def decode_turn_by_turn(teacher, processor, row, limit):
    """The plain way: generate every answer after the teacher's earlier ones, which are appended as they were said."""
    end, answers = processor.tokenizer.convert_tokens_to_ids("<|im_end|>"), []
    for turn, message in enumerate(row["messages"]):
        if message["role"] != "assistant":
            continue
        prompt = encode_prompts(processor, [module._cut_after_turn(row, turn // 2)])
        # What the template made of the earlier answers gives way to their ids.
        ids, starts = prompt["input_ids"][0], module._spans(encode_row(processor, row)["labels"])
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
    decoded = decode_pseudo_targets(teacher, processor, rows, max_new_tokens=limit, batch_size=4)
    assert decoded == [decode_turn_by_turn(teacher, processor, row, limit) for row in rows]
    answers = [answer for answers in decoded for answer in answers]
    assert not all(answer.stopped for answer in answers)
    assert all(len(answer.ids) == limit for answer in answers if not answer.stopped)


def targets_of(processor, row, answers):
    """For each assistant turn the ids that are learned, and all that the model sees from its start."""
    features = encode_answers(processor, row, answers)
    spans = module._spans(features["labels"])
    return [features["input_ids"][start:end].tolist() for start, end in spans], features


def test_a_cut_answer_has_no_end_to_learn(processor, rows):
    """Its turn is closed for the turns after it, but nobody learns that it ended there."""
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    row = rows[8]  # three turns
    answers = [Answer([5, 6, 7], True), Answer([8], False), Answer([9, 10], False)]
    learned, features = targets_of(processor, row, answers)
    assert learned == [[5, 6, 7, end], [8], [9, 10]]
    ids = features["input_ids"].tolist()
    assert ids[ids.index(8) + 1] == end
    truth = encode_row(processor, row)
    assert ids.count(end) == truth["input_ids"].tolist().count(end)
    assert all(len(features[key]) == len(ids) for key in module.TOKEN_FIELDS)
    kinds = [[(each["mm_token_type_ids"] == kind).sum() for kind in (0, 1, 2)] for each in (features, truth)]
    assert kinds[0][1:] == kinds[1][1:] and kinds[0][0] - kinds[1][0] == 3


def test_the_true_answers_as_ids_give_the_row_itself(processor, rows):
    for row in rows:
        features = encode_answers(processor, row, module._true_answers(processor, row))
        for key, value in encode_row(processor, row).items():
            torch.testing.assert_close(features[key], value)


@pytest.mark.parametrize(
    "said", ["<|box_start|>(12,30)<|box_end|>", "<|object_ref_start|>cat<|object_ref_end|>", " 7 \n"]
)
def test_special_tokens_and_spaces_of_an_answer_are_targets(teacher, processor, rows, said, monkeypatch):
    tokenizer = processor.tokenizer
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def generate(input_ids, **kwargs):
        return torch.cat([input_ids, torch.tensor([[*ids, end, tokenizer.pad_token_id]] * len(input_ids))], 1)

    monkeypatch.setattr(teacher, "generate", generate)
    for row, answers in zip(rows[:3], decode_pseudo_targets(teacher, processor, rows[:3])):
        assert all(answer == Answer(ids, True) for answer in answers)
        assert targets_of(processor, row, answers)[0] == [[*ids, end]] * len(answers)


def test_what_the_teacher_says_anyway_is_not_generated(teacher, processor, rows, monkeypatch):
    monkeypatch.setattr(module, "_deviating_turns", lambda teacher, processor, rows: [[] for _ in rows])
    monkeypatch.setattr(module, "_generate", None)
    decoded = decode_pseudo_targets(teacher, processor, rows)
    assert decoded == [module._true_answers(processor, row) for row in rows]


def test_deviating_turns_are_those_in_which_an_argmax_differs(teacher, processor, rows):
    row = rows[8]  # three turns
    features = encode_row(processor, row)
    (all_turns,) = module._deviating_turns(teacher, processor, [features])
    assert all_turns == [0, 1, 2]
    batch = module.encode_row(processor, row)
    logits = teacher(**{key: v[None] if key in module.TOKEN_FIELDS else v for key, v in batch.items()}).logits
    logits[..., module._suppressed(teacher)] = -torch.inf
    said = logits[0, :-1].argmax(-1)
    start, end = module._spans(batch["labels"])[1]
    batch["labels"][start:end] = said[start - 1 : end - 1]
    assert list(module._deviating_turns(teacher, processor, [batch])) == [[0, 2]]


def test_images_of_later_turns_are_cut_with_them(rows):
    image = {"type": "image"}
    messages = [
        {"role": "user", "content": [image, image, {"type": "text", "text": "first?"}]},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": [image, {"type": "text", "text": "second?"}]},
        {"role": "assistant", "content": "2"},
    ]
    row = {"messages": messages, "images": ["a", "b", "c"]}
    assert module._cut_after_turn(row, 0)["images"] == ["a", "b"]
    assert module._cut_after_turn(row, 1)["images"] == ["a", "b", "c"]


def test_a_killed_decoding_continues(teacher, processor, rows, tmp_path, monkeypatch):
    file, options = tmp_path / "targets.jsonl", {"max_new_tokens": 4, "batch_size": 4}
    whole = decode_pseudo_targets(teacher, processor, rows, **options, cache_file=file)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:5]) + lines[5][:9])  # four rows and a part of one
    decoded_rows = []
    original = module._decode
    monkeypatch.setattr(module, "_decode", lambda *args: decoded_rows.extend(args[2]) or original(*args))
    again = decode_pseudo_targets(teacher, processor, rows, **options, cache_file=file)
    assert len(decoded_rows) == len(rows) - 4
    assert again == whole
    assert file.read_text().splitlines(keepends=True) == lines


def test_answers_of_other_rows_or_another_limit_are_not_taken(teacher, make_teacher, processor, rows, tmp_path):
    file = tmp_path / "targets.jsonl"
    decode_pseudo_targets(teacher, processor, rows[:2], max_new_tokens=2, cache_file=file)
    turned = [{**rows[0], "images": [image.rotate(180) for image in rows[0]["images"]]}, rows[1]]
    for other, its_rows, limit in (
        (teacher, turned, 2),
        (teacher, rows[:2], 3),
        (make_teacher(seed=1), rows[:2], 2),
    ):
        with pytest.raises(ValueError, match=r"targets\.jsonl holds answers .*delete it"):
            decode_pseudo_targets(other, processor, its_rows, max_new_tokens=limit, cache_file=file)
