import copy
import json

import pytest

from linmu_hf.data import encode_prompts
from linmu_hf.distillation import decode_pseudo_targets
from linmu_hf.distillation import pseudo_targets as module


pytestmark = pytest.mark.core_training


@pytest.fixture(scope="module")
def teacher(make_teacher):
    return make_teacher()


def decode_turn_by_turn(teacher, processor, row):
    """The plain way: generate every answer after the teacher's earlier ones."""
    messages = copy.deepcopy(row["messages"])
    for position, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = encode_prompts(processor, [{**row, "messages": messages[: position + 1]}])
            ids = teacher.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :]
            text = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
            message["content"] = [{"type": "text", "text": text}]
    return messages


def test_equals_decoding_turn_by_turn(teacher, processor, rows):
    decoded = decode_pseudo_targets(teacher, processor, rows, max_new_tokens=4, batch_size=4)
    assert decoded == [decode_turn_by_turn(teacher, processor, row) for row in rows]
    assert decoded != [row["messages"] for row in rows]


def test_what_the_teacher_says_anyway_is_not_generated(teacher, processor, rows, monkeypatch):
    monkeypatch.setattr(module, "_deviating_turns", lambda teacher, processor, rows: [[] for _ in rows])
    monkeypatch.setattr(module, "_generate", None)
    assert decode_pseudo_targets(teacher, processor, rows) == [row["messages"] for row in rows]


def test_deviating_turns_are_those_in_which_an_argmax_differs(teacher, processor, rows):
    row = rows[8]  # three turns
    (all_turns,) = module._deviating_turns(teacher, processor, [row])
    assert all_turns == [0, 1, 2]
    batch = module.encode_rows(processor, [row])
    labels = batch.pop("labels")
    said = teacher(**batch).logits[0, :-1].argmax(-1)
    second = (labels[0, 1:] != -100).nonzero().flatten().tolist()[2:4]  # a digit and the end of the turn
    labels[0, 1:][second] = said[second]
    batch["labels"] = labels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "encode_rows", lambda *args: batch)
        assert list(module._deviating_turns(teacher, processor, [row])) == [[0, 2]]


def test_images_of_later_turns_are_cut_with_them(rows):
    image = {"type": "image"}
    messages = [
        {"role": "user", "content": [image, image, {"type": "text", "text": "first?"}]},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": [image, {"type": "text", "text": "second?"}]},
        {"role": "assistant", "content": "2"},
    ]
    row = {"messages": messages, "images": ["a", "b", "c"]}
    assert module._cut_behind_turn(row, 0)["images"] == ["a", "b"]
    assert module._cut_behind_turn(row, 1)["images"] == ["a", "b", "c"]


def test_a_killed_decoding_continues(teacher, processor, rows, tmp_path, monkeypatch):
    file = tmp_path / "targets.jsonl"
    whole = decode_pseudo_targets(teacher, processor, rows, max_new_tokens=4, batch_size=4)
    decode_pseudo_targets(teacher, processor, rows[:4], max_new_tokens=4, batch_size=4, cache_file=file)
    with open(file, "a") as lines:
        lines.write('[{"role": "us')  # half a line
    decoded_rows = []
    original = module._decode
    monkeypatch.setattr(module, "_decode", lambda *args: decoded_rows.extend(args[2]) or original(*args))
    again = decode_pseudo_targets(teacher, processor, rows, max_new_tokens=4, batch_size=4, cache_file=file)
    assert len(decoded_rows) == len(rows) - 4
    assert again == whole == [json.loads(line) for line in file.read_text().splitlines()]
