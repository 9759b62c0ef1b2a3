import pytest
import torch

from linmu_hf.data import encode_prompts
from linmu_hf.distillation.rows.collator import TOKEN_FIELDS, encode_row
from linmu_hf.distillation.targets.decode import decode_rows
from linmu_hf.distillation.targets.encode import (
    Answer,
    answer_spans,
    cut_after_turn,
    encode_answers,
    encode_prompt,
    encode_skeleton,
    true_answers,
)


pytestmark = pytest.mark.core_training


@pytest.fixture(scope="module")
def teacher(make_teacher):
    return make_teacher()


def targets_of(processor, row, answers):
    """For each assistant turn the ids that are learned, and all that the model sees from its start."""
    features = encode_answers(processor, row, answers)
    spans = answer_spans(features["labels"])
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
    assert all(len(features[key]) == len(ids) for key in TOKEN_FIELDS)
    kinds = [[(each["mm_token_type_ids"] == kind).sum() for kind in (0, 1, 2)] for each in (features, truth)]
    assert kinds[0][1:] == kinds[1][1:] and kinds[0][0] - kinds[1][0] == 3


def test_the_true_answers_as_ids_give_the_row_itself(processor, rows):
    for row in rows:
        features = encode_answers(processor, row, true_answers(processor, row, encode_skeleton(processor, row)))
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
    for row, (answers, _) in zip(rows[:3], decode_rows(teacher, processor, dict(enumerate(rows[:3])))):
        assert all(answer == Answer(ids, True) for answer in answers)
        assert targets_of(processor, row, answers)[0] == [[*ids, end]] * len(answers)


def test_images_of_later_turns_are_cut_with_them(rows):
    image = {"type": "image"}
    messages = [
        {"role": "user", "content": [image, image, {"type": "text", "text": "first?"}]},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": [image, {"type": "text", "text": "second?"}]},
        {"role": "assistant", "content": "2"},
    ]
    row = {"messages": messages, "images": ["a", "b", "c"]}
    assert cut_after_turn(row, 0)["images"] == ["a", "b"]
    assert cut_after_turn(row, 1)["images"] == ["a", "b", "c"]


def test_a_prompt_is_the_row_cut_before_its_turn(processor, rows):
    """With a skeleton of the whole row, which spares reading its media again, or without."""
    image, text = rows[0]["images"][0], [{"type": "text", "text": "second?"}]
    more = [{"role": "user", "content": [{"type": "image"}, *text]}, {"role": "assistant", "content": "2"}]
    late = {"messages": [*rows[0]["messages"], *more], "images": [*rows[0]["images"], image]}
    said = [Answer([5, 6, 7], True), Answer([8], False)]
    for row, turn in ((rows[8], 0), (rows[8], 1), (rows[8], 2), (late, 0), (late, 1)):
        expected = encode_prompts(processor, [cut_after_turn(row, turn)])
        prompt = encode_prompt(processor, row, said[:turn], 0, encode_skeleton(processor, row))
        torch.testing.assert_close(prompt, encode_prompt(processor, row, said[:turn]))
        assert prompt.keys() == expected.keys()
        for key in prompt.keys() - TOKEN_FIELDS:
            torch.testing.assert_close(prompt[key], torch.as_tensor(expected[key]))
        if turn == 0:
            assert torch.equal(prompt["input_ids"], expected["input_ids"][0])
