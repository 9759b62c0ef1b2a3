import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from synthetic import CHAT_TEMPLATE, ask, image, say

from linmu_hf.data import answer_text, check_dataset, encode_prompts, encode_rows


pytestmark = pytest.mark.core_training


ROWS = [
    {
        "messages": [ask("which digit?", images=1), say("7"), ask("and now?"), say("three")],
        "images": [image(24, 40)],
        "videos": [],
    },
    {"messages": [{"role": "user", "content": "hi"}, say("hello you")]},
    {
        "messages": [ask("what came first?", videos=1, images=2), say("8")],
        "images": [image(8, 8), image(16, 32)],
        "videos": [[image(16, 24, seed) for seed in range(3)]],
    },
]


def trained_text(processor, batch, row):
    labels = batch["labels"][row]
    return processor.tokenizer.decode(labels[labels >= 0])


def test_labels_are_the_assistant_turns(processor):
    batch = encode_rows(processor, ROWS)
    assert trained_text(processor, batch, 0) == "7<|im_end|>three<|im_end|>"
    assert trained_text(processor, batch, 1) == "hello you<|im_end|>"
    assert trained_text(processor, batch, 2) == "8<|im_end|>"
    kept = batch["labels"] >= 0
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert not kept[batch["attention_mask"] == 0].any()
    assert batch["attention_mask"][:, 0].all()  # right padding


MARKED_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'][0]['text'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}<|im_end|>{% endfor %}"
)


def test_generation_marks_of_the_template_are_used(processor):
    processor.chat_template = MARKED_TEMPLATE
    try:
        batch = encode_rows(processor, ROWS[1:2])
        with pytest.raises(ValueError, match=r"row 0 .'hi'. has no token to learn from"):
            encode_rows(processor, [{"messages": [ROWS[1]["messages"][0], say("")]}])
    finally:
        processor.chat_template = CHAT_TEMPLATE
    assert trained_text(processor, batch, 0) == "hello you"  # this template marks no closing token


def test_videos_are_two_frames_per_second(processor):
    batch = encode_rows(processor, ROWS)
    assert batch["second_per_grid_ts"].tolist() == [1.0]
    assert batch["video_grid_thw"].tolist() == [[2, 4, 6]]
    assert batch["image_grid_thw"].shape == (3, 3)


def test_prompts_end_where_the_answer_begins(processor):
    rows = ROWS[1:]
    batch = encode_prompts(processor, rows)
    assert batch["attention_mask"][:, -1].all()  # left padding
    for ids in batch["input_ids"]:
        assert processor.tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    assert [answer_text(row) for row in rows] == ["hello you", "8"]


def test_rows_from_disk_equal_rows_in_memory(processor):
    parts = List({"type": Value("string"), "text": Value("string"), "image": Value("string")})
    features = Features(
        {
            "messages": List({"role": Value("string"), "content": parts}),
            "images": List(ImageFeature()),
            "videos": List(List(ImageFeature())),
        }
    )
    rows = [{**row, "videos": row.get("videos", [])} for row in (ROWS[0], ROWS[2])]
    for row in rows:
        row["messages"] = [
            {**message, "content": [{"text": None, "image": None, **part} for part in message["content"]]}
            for message in row["messages"]
        ]
    dataset = Dataset.from_list(rows, features=features)
    check_dataset(dataset)
    expected, actual = encode_rows(processor, rows), encode_rows(processor, list(dataset))
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ask("digit?", images=1), say("7")]}, "row 1 .'digit[?]'. asks for 1 images .* has 0"),
        ({"messages": [ask("digit?"), say("7")], "images": [image(8, 8)]}, "asks for 0 images .* has 1"),
        ({"messages": [ask("first?", videos=1), say("7")], "videos": None}, "asks for 1 videos .* has 0"),
        ({"messages": [ask("digit?")]}, "row 1.* no assistant turn"),
        ({"text": "digit?"}, "row 1: it has no `messages`"),
    ],
)
def test_bad_rows_are_named(processor, row, message):
    for check in (
        check_dataset,
        lambda rows: encode_rows(processor, rows),
        lambda rows: encode_prompts(processor, rows),
    ):
        with pytest.raises(ValueError, match=message):
            check([ROWS[0], row])
