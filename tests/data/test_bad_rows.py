"""Rows of any other form are refused by a `ValueError` that names them, so that `max_bad_rows` can leave them out."""

import json

import numpy as np
import pytest
from PIL import Image
from synthetic import ask, image, say

from linmu_hf.data import bad_rows, encode_rows, load_rows, read_row, row_key


pytestmark = pytest.mark.core_training


GOOD = {"messages": [ask("hi"), say("7")]}


def asked(**message):
    return {"messages": [{"role": "user", "content": "hi", **message}, say("7")]}


def with_picture(picture):
    return {"messages": [ask("which?", images=1), say("7")], "images": [picture]}


BAD = {
    "no row": None,
    "a list": [GOOD],
    "null as a part": asked(content=[{"type": "text", "text": "hi"}, None]),
    "a number as a part": asked(content=[1]),
    "a number as the type": asked(content=[{"type": 1, "text": "hi"}]),
    "a list as the type": asked(content=[{"type": ["image"]}]),
    "a number as the role": asked(role=1),
    "a list as from": {"conversations": [{"from": ["human"], "value": "hi"}, {"from": "gpt", "value": "7"}]},
    "a list of numbers as content": asked(content=object()),
    "number": {"messages": 5},
    "true": {"messages": True},
    "JSON of a number": {"messages": "5"},
    "one message": {"messages": GOOD["messages"][0]},
    "null as a message": {"messages": [None, say("7")]},
    "prompt": {"prompt": {"role": "user"}, "completion": "7"},
    "completion": {"prompt": "hi", "completion": {"text": "7"}},
    "history of one": {"query": "hi", "response": "7", "history": [["x"]]},
    "history of three": {"query": "hi", "response": "7", "history": [["x", "y", "z"]]},
    "history of a text": {"query": "hi", "response": "7", "history": "xy"},
    "history of texts": {"query": "hi", "response": "7", "history": ["xy"]},
    "history of messages": {"query": "hi", "response": "7", "history": [{"role": "user", "content": "x"}]},
    "half a pair": {"conversation": [{"human": "hi"}]},
    "no pair": {"conversation": [{"human": "hi", "assistant": "7"}, None]},
    "a list as instruction": {"instruction": ["add"], "output": "7"},
    "a list as input": {"instruction": "add", "input": [3, 4], "output": "7"},
    "half a character": asked(content="smile \ud83d"),
    "half a character in a part": asked(content=[{"type": "text", "text": "\ude00"}]),
    "half a character as the role": asked(role="\ud83d"),
    "half a character in an answer": {"messages": [ask("hi"), say("\ud83d")]},
    "empty picture": with_picture(Image.new("RGB", (0, 5))),
    "empty array": with_picture(np.zeros((0, 0, 3), np.uint8)),
    "empty frames": {
        "messages": [ask("a", videos=1), say("b")],
        "videos": [[np.zeros((0, 8, 3), np.uint8)] * 2],
    },
    "base64": with_picture("iVBORw0KGgo" + "A" * 9000),
    "short base64": with_picture("iVBORw0KGgo" + "A" * 300),
    "a number as pictures": {**with_picture(None), "images": 5},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named(processor, name):
    row = BAD[name]
    ((number, error),) = bad_rows([GOOD, row], processor)
    with pytest.raises(ValueError, match=r"^row 1") as refused:
        encode_rows(processor, [GOOD, row])
    for message in (str(error), str(refused.value)):
        assert number == 1 and message.startswith("row 1") and len(message.splitlines()) == 1 and len(message) < 500
        assert message.encode()
    try:
        row_key(row, 1)
    except ValueError as error:
        assert str(error).startswith("row 1")


def test_bare_base64_is_told_what_it_lacks(processor, tmp_path):
    (tmp_path / "train.json").write_text(json.dumps([GOOD, BAD["short base64"], BAD["base64"]]))
    for streaming in (False, True):
        rows = list(load_rows(str(tmp_path / "train.json"), streaming=streaming))
        errors = [str(error) for _, error in bad_rows(rows, processor)]
        assert len(errors) == 2
        for number, error in enumerate(errors, 1):
            assert error.startswith(f"row {number} ") and 'put "data:image/png;base64," in front' in error


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"prompt": 3, "completion": 7}, ["3", "7"]),
        ({"instruction": "add", "input": 34, "output": 0}, ["add\n34", "0"]),
        ({"query": 0, "response": 7, "history": []}, ["0", "7"]),
    ],
)
def test_numbers_are_texts(row, texts):
    """As Arrow has columns in which every text is a number."""
    assert [message["content"] for message in read_row(row)["messages"]] == texts


def test_good_rows_stay_good(processor):
    assert not list(bad_rows([GOOD, asked(content="smile \U0001f600"), with_picture(image(8, 8))], processor))
