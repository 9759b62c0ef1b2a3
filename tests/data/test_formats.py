"""Rows of the shapes that people have are read as what they mean, or refused in one line that names the row."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Json, List, Value
from datasets import Image as ImageFeature
from datasets import Video as VideoFeature
from PIL import Image
from synthetic import ask, image, say

from linmu_hf.data import answer_text, check_dataset, encode_prompts, encode_rows, load_rows


pytestmark = pytest.mark.core_training


PICTURE = image(24, 40)
BUFFER = io.BytesIO()
PICTURE.save(BUFFER, "png")
PNG = BUFFER.getvalue()
PART = {"type": Value("string"), "text": Value("string")}
MEANT = {"messages": [ask("which digit?", images=1), say("7")], "images": [PICTURE]}
TEXT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "7"}]}


def with_image(**part):
    return [{"role": "user", "content": [part, {"type": "text", "text": "which digit?"}]}, say("7")]


def same(processor, row, meant):
    for encode in (encode_rows, encode_prompts):
        actual, expected = encode(processor, [row]), encode(processor, [meant])
        assert actual.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(torch.as_tensor(actual[name]), torch.as_tensor(expected[name]), rtol=0, atol=0)
    assert answer_text(row) == answer_text(meant)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Holds a picture, and is not where the command is run."""
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(PNG)
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "data"


def write_lines(folder, rows):
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


SHAPES = {
    "parts of unequal keys": {"messages": with_image(type="image"), "images": ["a.png"]},
    "parts with both keys": {"messages": with_image(type="image", text=None), "images": ["a.png"]},
    "column image": {"messages": with_image(type="image"), "image": "a.png"},
    "base64 in image_url": {
        "messages": with_image(
            type="image_url", image_url={"url": "data:image/png;base64," + base64.b64encode(PNG).decode()}
        )
    },
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "<image>\nwhich digit?"}, {"from": "gpt", "value": "7"}],
        "images": ["a.png"],
    },
    "JSON text": {"messages": json.dumps(MEANT["messages"]), "images": ["a.png"]},
    "columns of roles and contents": {
        "messages": {"role": ["user", "assistant"], "content": [m["content"] for m in MEANT["messages"]]},
        "images": ["a.png"],
    },
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("single_file", [True, False])
def test_lines_are_read(processor, folder, shape, single_file):
    file = write_lines(folder, [SHAPES[shape]] * 2)
    rows = load_rows(file if single_file else str(folder), "train")
    check_dataset(rows, processor)
    for row in rows:
        same(processor, row, MEANT)


def test_paths_inside_messages(processor, folder):
    row = {"messages": with_image(type="image", image=f"file://{folder / 'a.png'}")}
    same(processor, row, MEANT)
    row["images"] = [image(8, 8)]
    row["messages"] = [*row["messages"], ask("and this?", images=1), say("8")]
    meant = {"messages": [*MEANT["messages"], ask("and this?", images=1), say("8")], "images": [PICTURE, image(8, 8)]}
    same(processor, row, meant)  # a part's own picture takes none of the column


def test_system_line_string_and_parts_in_one_file(processor, folder):
    lines = [
        {"messages": [{"role": "system", "content": "Be kind."}, *MEANT["messages"]], "images": ["a.png"]},
        {**TEXT, "images": []},
    ]
    rows = load_rows(write_lines(folder, lines))
    check_dataset(rows, processor)
    same(processor, rows[0], {**lines[0], "images": [PICTURE]})
    same(processor, rows[1], TEXT)
    assert answer_text(rows[1]) == "7"  # which JSON takes for a number


BYTES = {"bytes": PNG, "path": None}
STORED = {
    "bytes": ([], List(PART), {"bytes": Value("binary"), "path": Value("string")}),
    "Image": ([], List(PART), ImageFeature()),
    "null for no image": ([None], List(PART), ImageFeature()),
    "parts as Json": ([], Json(), ImageFeature()),
}


def filled(messages):
    """Messages as Arrow holds them: lists of parts, all with all keys."""
    contents = [[m["content"]] if isinstance(m["content"], str) else m["content"] for m in messages]
    parts = [[{"type": "text", "text": p} if isinstance(p, str) else {"text": None, **p} for p in c] for c in contents]
    return [{"role": message["role"], "content": content} for message, content in zip(messages, parts)]


@pytest.mark.parametrize("kind", STORED)
def test_stored_rows_are_read(processor, tmp_path, kind):
    no_images, parts, media = STORED[kind]
    rows = [{**TEXT, "images": no_images}, {**MEANT, "images": [BYTES]}]
    if parts != Json():
        rows = [{**row, "messages": filled(row["messages"])} for row in rows]
    features = Features({"messages": List({"role": Value("string"), "content": parts}), "images": List(media)})
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "rows")
    stored = load_rows(str(tmp_path / "rows"))
    check_dataset(stored, processor)
    same(processor, stored[0], TEXT)
    same(processor, stored[1], MEANT)
    same(processor, stored.select([1])[0], MEANT)


def test_the_check_copies_no_picture(processor, monkeypatch):
    """More than 2 GiB of pictures in a chunk overflow Arrow's offsets if anything puts them together."""
    features = Features(
        {"messages": List({"role": Value("string"), "content": List(PART)}), "images": List(ImageFeature())}
    )
    rows = [{"messages": filled(MEANT["messages"]), "images": [BYTES]}] * 3
    dataset = Dataset.from_list(rows, features=features)
    seen = []

    def image_size(source):
        seen.append(source["bytes"])
        return 24, 40

    monkeypatch.setattr("linmu_hf.data.rows.image_size", image_size)
    check_dataset(dataset, processor)
    start = dataset.data["images"].chunk(0).values.field("bytes").buffers()[2]
    assert all(start.address <= picture.read_buffer().address < start.address + start.size for picture in seen)
    assert len(seen) == 3


def test_transforms_are_applied(processor):
    lazy = Dataset.from_list([{"q": "hi", "a": "7"}] * 2).with_transform(
        lambda batch: {
            "messages": [
                [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
                for q, a in zip(batch["q"], batch["a"])
            ]
        }
    )
    check_dataset(lazy, processor)
    same(processor, lazy[1], TEXT)
    broken = Dataset.from_list([{"q": 1}, {"q": 0}]).with_transform(
        lambda batch: {"messages": [TEXT["messages"]], "x": [1 / q for q in batch["q"]]}
    )
    with pytest.raises(ValueError, match="row 1 cannot be read: division"):
        check_dataset(broken)


def test_videos_of_datasets_need_no_decoder(processor, tmp_path):
    features = Features(
        {"messages": List({"role": Value("string"), "content": List(PART)}), "videos": List(VideoFeature())}
    )
    content = [{"type": "video", "text": None}, {"type": "text", "text": "what?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "7"}]}]
    rows = Dataset.from_list([{"messages": turns, "videos": [{"bytes": b"none", "path": None}]}], features=features)
    rows.save_to_disk(tmp_path / "rows")
    rows = load_rows(str(tmp_path / "rows"))
    check_dataset(rows, processor)
    pytest.importorskip("av")
    with pytest.raises(ValueError, match=r"row 0 \('what\?'\), video 0: it is not a video"):
        encode_rows(processor, [rows[0]])


def test_a_conversation_may_go_on_after_its_last_answer(processor):
    row = {"messages": [*MEANT["messages"], ask("and now?", images=1)], "images": [PICTURE, image(8, 8)]}
    check_dataset([row], processor)
    prompt, meant = encode_prompts(processor, [row]), encode_prompts(processor, [MEANT])
    for name in meant:
        torch.testing.assert_close(prompt[name], meant[name], rtol=0, atol=0)
    labels = encode_rows(processor, [row])["labels"]
    assert processor.tokenizer.decode(labels[labels >= 0]) == "7<|im_end|>"


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
REFUSED = {
    "tool calls": ({"messages": [*TEXT["messages"], CALL]}, r"message 2 \(assistant\) calls a tool.*as text"),
    "no content": ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]}, "has no content: give it"),
    "no role": ({"messages": [{"content": "x"}]}, "has no `role`"),
    "web address": (
        {"messages": with_image(type="image_url", image_url={"url": "http://x/y.png"})}, "http://x/y.png .*download it"
    ),
    "missing file": ({**MEANT, "images": ["none.png"]}, "image 0: none.png does not exist"),
    "missing video": ({"messages": [ask("a", videos=1), say("b")], "videos": ["clip.mp4"]}, "clip.mp4 does not exist"),
    "other columns": ({"question": "q", "answer": "7"}, r"\['answer', 'question'\]: give messages"),
    "a sentence": ({"messages": "user: hi"}, "'user: hi' is neither"),
    "picture in an answer": (
        {"messages": [ask("draw"), {"role": "assistant", "content": [{"type": "image"}]}], "images": [PICTURE]},
        "message 1 .* holds a picture.* move it",
    ),
    "audio": ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}, say("b")]}, "'a.wav'"),
    "placeholder": ({"messages": [ask("what is <|image_pad|>?"), say("b")]}, r"<\|image_pad\|> in a text"),
    "no picture": ({**MEANT, "images": [{"bytes": b"<html>404</html>", "path": None}]}, "image 0: it is not an image"),
    "long picture": ({**MEANT, "images": [image(1, 250)]}, "aspect ratio.* got 250"),
    "empty video": ({"messages": [ask("a", videos=1), say("b")], "videos": [[]]}, "video 0: it has no frames"),
    "number": ({**MEANT, "images": [7]}, "image 0: it is not an image"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_rest_is_refused_in_one_line(processor, name):
    row, expected = REFUSED[name]
    for check in (check_dataset, encode_rows):
        arguments = ([MEANT, row], processor) if check is check_dataset else (processor, [MEANT, row])
        with pytest.raises(ValueError, match=expected) as refused:
            check(*arguments)
        assert str(refused.value).startswith("row 1") and len(str(refused.value).splitlines()) == 1


def test_damaged_pictures_are_named_where_they_are_read(processor):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for kind, cut in (("png", 40), ("jpeg", 15)):
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, kind)
        row = {**MEANT, "images": [{"bytes": buffer.getvalue()[:-cut], "path": f"{kind}.x"}]}
        with pytest.raises(ValueError, match=rf"row 41 .*image 0: {kind}.x is a damaged image"):
            encode_rows(processor, [MEANT, row], [40, 41])


@pytest.mark.parametrize("shape", SHAPES)
def test_lines_are_streamed(processor, folder, shape):
    file = write_lines(folder, [SHAPES[shape]] * 2)
    for place in (file, str(folder)):
        rows = load_rows(place, streaming=True)
        assert not hasattr(rows, "__len__")
        for _ in range(2):
            loaded = list(rows)
            assert len(loaded) == 2
            same(processor, loaded[1], MEANT)


def test_long_lists_are_streamed(folder):
    """Entries of any length, wherever chunks end; one list with and without line breaks."""
    rows = [{"n": n, "text": 'a "]{" \u00e9' * (n * 700 % 9000)} for n in range(60)]
    for indent in (None, 1):
        (folder / "list.json").write_text(json.dumps(rows, indent=indent))
        assert list(load_rows(str(folder / "list.json"), streaming=True)) == rows
    (folder / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert list(load_rows(str(folder / "list.jsonl"), streaming=True)) == rows
    for text, message in (
        ('[{"n": 1}, {"n": ', "cannot be read at row 1: Expecting value at ''"),
        ("[1]", "it is 1 and no object"),
    ):
        (folder / "list.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            list(load_rows(str(folder / "list.json"), streaming=True))


def test_unreadable_files_are_one_line(folder):
    (folder / "train.jsonl").write_text("{not json\n")
    with pytest.raises(ValueError, match=r"train\.jsonl cannot be read") as refused:
        load_rows(str(folder / "train.jsonl"))
    assert len(str(refused.value).splitlines()) == 1
    (folder / "notes.txt").write_text("hi")
    with pytest.raises(ValueError, match=r"notes\.txt is no dataset.*jsonl"):
        load_rows(str(folder / "notes.txt"))
