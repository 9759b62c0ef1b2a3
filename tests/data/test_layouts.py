"""Rows in the layouts of published datasets mean what their authors meant, whether named or recognised."""

import json

import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from synthetic import ask, image, say

from linmu_hf.data import check_dataset, encode_rows, load_rows, read_row
from linmu_hf.data.formats import texts_of


pytestmark = pytest.mark.core_training


PICTURE, OTHER = image(24, 40), image(16, 16)
FRAMES = [image(16, 24, seed) for seed in range(4)]


@pytest.fixture
def folder(tmp_path):
    PICTURE.save(tmp_path / "a.png")
    OTHER.save(tmp_path / "b.png")
    for clip in ("clips/one", "part_1/clips/two", "all_test/v_abc.mp4"):  # a folder of frames is a video, too
        (tmp_path / clip).mkdir(parents=True)
        for i, frame in enumerate(FRAMES):
            frame.save(tmp_path / clip / f"{i}.png")
    return tmp_path


def same(processor, row, meant):
    actual, expected = encode_rows(processor, [row]), encode_rows(processor, [meant])
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(torch.as_tensor(actual[name]), torch.as_tensor(expected[name]), rtol=0, atol=0)


def tagged(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def roles(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


ONE = {"messages": [ask("which digit?", images=1), say("7")], "images": [PICTURE]}
CLIP = {"messages": [ask("what came first?", videos=1), say("8")], "videos": [FRAMES]}
TEXT = {"messages": roles("hi", "7")}
TWO_TURNS = {"messages": [*ONE["messages"], *roles("and now?", "8")], "images": [PICTURE]}
BOTH = {"messages": [ask("which?", images=1, videos=1), say("7")], "images": [PICTURE], "videos": [FRAMES]}

ROWS = {
    "LLaVA-OneVision": (
        {
            "id": "3", "image": "a.png", "data_source": "chartqa",
            "conversations": tagged("<image>\nwhich digit?", "7", "and now?", "8"),
        },
        TWO_TURNS,
    ),
    "LLaVA-OneVision without an image": (
        {"id": "4", "image": None, "conversations": tagged("hi", "7"), "data_source": "magpie_pro"}, TEXT
    ),
    "LLaVA-Video-178K": (
        {
            "id": "5", "video": "clips/one", "data_source": "part_1",
            "conversations": tagged("<image>\nwhat came first?", "8"),
        },
        CLIP,
    ),
    "LLaVA-Video-178K from above its folder": (
        {
            "id": "6", "video": "clips/two", "data_source": "part_1",
            "conversations": tagged("<image>\nwhat came first?", "8"),
        },
        CLIP,
    ),
    "ShareGPT with <video>": (
        {"conversations": tagged("<video>what came first?", "8"), "videos": ["clips/one"]}, CLIP
    ),
    "LLaMA-Factory": (
        {"messages": roles("<image><video>which?", "7"), "images": ["a.png"], "videos": ["clips/one"]}, BOTH
    ),
    "media without marks come first": ({"messages": roles("which digit?", "7"), "images": ["a.png"]}, ONE),
    "VILA": ({"id": "s", "video": "clips/one", "conversations": tagged("what came first?", "8")}, CLIP),
    "TRL prompt and completion": (
        {"prompt": [ask("which digit?", images=1)], "completion": [say("7")], "images": ["a.png"]}, ONE
    ),
    "TRL texts": ({"prompt": "hi", "completion": "7"}, TEXT),
    "ms-swift query": (
        {
            "query": "and now?", "response": "8", "history": [["<image>which digit?", "7"]], "images": ["a.png"],
        },
        TWO_TURNS,
    ),
    "ms-swift pairs": (
        {
            "system": "Be kind.",
            "conversation": [{"human": "hi", "assistant": "7"}, {"human": "and now?", "assistant": "8"}],
        },
        {"messages": [{"role": "system", "content": "Be kind."}, *roles("hi", "7", "and now?", "8")]},
    ),
    "Alpaca": ({"instruction": "add", "input": "3 4", "output": "7"}, {"messages": roles("add\n3 4", "7")}),
    "ActivityNet-QA": (
        {"video_name": "abc", "question": "what came first?", "question_id": "abc_0", "answer": "8", "type": 3}, CLIP
    ),
    "a tag in a text without media": (
        {"messages": roles("what does <video> mean in HTML?", "7")},
        {"messages": [ask("what does <video> mean in HTML?"), say("7")]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("lines", [True, False])
def test_rows_of_files(processor, folder, name, streaming, lines):
    row, meant = ROWS[name]
    file = folder / "train.json"
    file.write_text("".join(json.dumps(r) + "\n" for r in (row, row)) if lines else json.dumps([row, row], indent=1))
    loaded = list(load_rows(str(file), streaming=streaming))
    check_dataset(loaded, processor)
    assert len(loaded) == 2
    for each in loaded:
        same(processor, each, meant)


@pytest.mark.parametrize("streaming", [False, True])
def test_activitynet_questions_and_answers(processor, folder, streaming):
    questions = [{"video_name": "abc", "question": "what came first?", "question_id": f"abc_{i}"} for i in range(2)]
    answers = [{"answer": text, "type": 3, "question_id": f"abc_{i}"} for i, text in ((1, "9"), (0, "8"))]
    (folder / "val_q.json").write_text(json.dumps(questions))
    with pytest.raises(ValueError, match=r"no val_a\.json beside it"):
        load_rows(str(folder / "val_q.json"))
    (folder / "val_a.json").write_text(json.dumps(answers))
    rows = list(load_rows(str(folder / "val_q.json"), streaming=streaming))
    same(processor, rows[0], CLIP)
    assert read_row(rows[1])["messages"][1]["content"] == "9" and rows[1]["id"] == "abc_1"
    (folder / "val_a.json").write_text(json.dumps(answers[:1]))
    with pytest.raises(ValueError, match=r"cannot be joined.*abc_0"):
        load_rows(str(folder / "val_q.json"))


def test_a_video_that_is_not_there_is_named(processor, folder):
    row = {"video_name": "xyz", "question": "what?", "question_id": "1", "answer": "8"}
    with pytest.raises(ValueError, match=r"row 0 \('what\?'\), video 0: xyz does not exist"):
        check_dataset([row], processor)


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_in_parquet(processor, tmp_path, streaming):
    """As LLaVA-OneVision-Data is on the Hub."""
    features = Features(
        {
            "id": Value("string"),
            "image": ImageFeature(),
            "conversations": List({"from": Value("string"), "value": Value("string")}),
            "data_source": Value("string"),
        }
    )
    row = {"id": "3", "conversations": tagged("<image>\nwhich digit?", "7"), "data_source": "x"}
    rows = [{**row, "image": PICTURE}, {**row, "image": None, "conversations": tagged("hi", "7")}]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train.parquet")
    loaded = list(load_rows(str(tmp_path / "train.parquet"), streaming=streaming))
    assert loaded[0]["image"]["bytes"][:4] == b"\x89PNG"  # undecoded
    same(processor, loaded[0], ONE)
    same(processor, loaded[1], TEXT)


def test_a_layout_by_name_beats_the_columns(processor, folder):
    row = {"messages": roles("which?", "1"), "prompt": "hi", "completion": "7"}
    (folder / "train.json").write_text(json.dumps([row]))
    same(processor, load_rows(str(folder / "train.json"))[0], {"messages": roles("which?", "1")})
    for streaming in (False, True):
        rows = load_rows(str(folder / "train.json"), layout="prompt-completion", streaming=streaming)
        same(processor, next(iter(rows)), TEXT)
    with pytest.raises(ValueError, match="layout='llama' is not known: choose one of messages, sharegpt"):
        load_rows(str(folder / "train.json"), layout="llama")


def test_media_in_another_folder(processor, folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "train.json").write_text(json.dumps([ROWS["LLaVA-OneVision"][0]]))
    for streaming in (False, True):
        rows = load_rows(str(elsewhere / "train.json"), media_folder=str(folder), streaming=streaming)
        same(processor, next(iter(rows)), TWO_TURNS)
    with pytest.raises(FileNotFoundError, match=r"media_folder=.*none is no folder"):
        load_rows(str(elsewhere / "train.json"), media_folder=str(folder / "none"))


def test_other_rows_see_one_that_works(processor):
    with pytest.raises(ValueError, match=r"row 0, id 'q7': .*its columns are \['id', 'text'\].*\"images\"") as refused:
        check_dataset([{"id": "q7", "text": "hi"}], processor)
    example = str(refused.value).split("as in ")[1]
    row = json.loads(example)
    check_dataset([{**row, "images": [PICTURE]}], processor)


def test_more_marks_than_media(processor):
    row = {"id": 9, "conversations": tagged("<image><image>which?", "7"), "image": PICTURE}
    with pytest.raises(ValueError, match=r"row 0, id 9 \('which\?'\) asks for 2 images .* has 1"):
        check_dataset([row], processor)


IN_A_PART = {
    "image": {"type": "image", "image": "a.png"},
    "url": {"type": "image", "url": "a.png"},
    "image_url": {"type": "image_url", "image_url": {"url": "a.png"}},
}


@pytest.mark.parametrize("suffix", ["json", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("part", IN_A_PART)
def test_relative_paths_in_parts(processor, folder, part, streaming, suffix):
    """Files named in messages are looked up beside the dataset, also where the first rows have none."""
    asked = [IN_A_PART[part], {"type": "text", "text": "which digit?"}]
    texts = [{"type": "text", "text": "a.png"}]  # a text that is the name of a file stays a text
    rows = [{"messages": [{"role": "user", "content": content}, roles("", "7")[1]]} for content in (texts, asked)]
    for row in rows:
        row["messages"][1]["content"] = [{"type": "text", "text": "7"}]
    if suffix == "json":
        (folder / "parts.json").write_text(json.dumps(rows))
    else:
        Dataset.from_list(rows).to_parquet(folder / "parts.parquet")
    loaded = list(load_rows(str(folder / f"parts.{suffix}"), streaming=streaming))
    assert list(texts_of(read_row(loaded[0]))) == ["a.png", "7"]
    assert read_row(loaded[1])["images"][0] in (str(folder / "a.png"), {"url": str(folder / "a.png")})
    same(processor, loaded[1], ONE)
