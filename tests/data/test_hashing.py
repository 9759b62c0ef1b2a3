"""A row's key: the same for the same question, answer and pictures, wherever and however they are stored."""

import hashlib
import shutil

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from synthetic import ask, image, say
from transformers.video_utils import VideoMetadata

from linmu_hf.data import load_rows, row_key
from linmu_hf.data.hashing import BLOCK, update_hash
from linmu_hf.data.loading import raw_rows, undecoded
from linmu_hf.data.video import Video


pytestmark = pytest.mark.core_training


@pytest.fixture
def row(tmp_path):
    image(24, 40).save(tmp_path / "a.png")
    return {"messages": [ask("which digit?", images=1), say("7")], "images": [str(tmp_path / "a.png")]}


def test_the_form_does_not_count(row, tmp_path):
    key = row_key(row)
    content = (tmp_path / "a.png").read_bytes()
    moved = shutil.copytree(tmp_path, tmp_path / "moved") / "b.png"
    (tmp_path / "moved" / "a.png").rename(moved)
    sharegpt = [{"from": "human", "value": "<image>which digit?"}, {"from": "gpt", "value": [{"text": "7"}]}]
    with_nones = [
        {**row["messages"][0]},
        {"role": "assistant", "content": [{"text": "7", "type": "text", "image": None}]},
    ]
    for same in (
        {"split": "x", "images": row["images"], "messages": row["messages"]},
        {**row, "images": [str(moved)]},
        {**row, "images": [{"bytes": content, "path": "elsewhere.png"}]},
        {**row, "images": [content]},
        {"image": moved, "messages": row["messages"]},
        {"image": moved, "messages": with_nones},
        {"image": moved, "conversations": sharegpt},
    ):
        assert row_key(same, 3) == key
    assert row_key({**row, "id": 17}) == f"17:{key}" and row_key({**row, "id": None}) == key


def test_every_part_counts(row, tmp_path):
    image(24, 40, seed=1).save(tmp_path / "b.png")
    frames = [image(8, 8, seed=i) for i in range(3)]
    video = {"messages": [ask("which digit?", videos=1), say("7")]}
    different = [
        row,
        {**row, "messages": [ask("which digit?", images=1), say("8")]},
        {**row, "messages": [ask("which cat?", images=1), say("7")]},
        {**row, "images": [str(tmp_path / "b.png")]},
        {**row, "images": [image(24, 40)]},  # decoded: its pixels
        {**video, "videos": [frames]},
        {**video, "videos": [frames[::-1]]},
        {**video, "videos": [{"frames": frames, "fps": 0.5}]},
        {**video, "videos": [{"frames": frames, "fps": 4}]},
        {**video, "videos": [frames], "fps": 8},
        {**video, "videos": [frames], "timestamps": [0.0, 1.0, 5.0]},
        {**video, "videos": [np.stack([np.asarray(frame) for frame in frames])]},
        {**video, "videos": [str(tmp_path)]},
        {**video, "videos": ["/not/there.mp4"]},
    ]
    assert len({row_key(each) for each in different}) == len(different)


def test_values_of_every_kind_count(tmp_path):
    """Of a run's rows: two pictures are two values, however they are given."""
    for name in ("a.png", "b.png"):
        image(24, 40, seed=ord(name[0])).save(tmp_path / name)
    frames = [np.stack([np.asarray(image(8, 8, seed=i))] * 2) for i in range(2)]
    kinds = {
        "path": [tmp_path / "a.png", tmp_path / "b.png"],
        "open file": [open(tmp_path / name, "rb") for name in ("a.png", "b.png")],
        "video": [Video(some, VideoMetadata(total_num_frames=2, fps=2.0)) for some in frames],
        "rate": [Video(frames[0], VideoMetadata(total_num_frames=2, fps=fps)) for fps in (1.0, 2.0)],
    }
    for kind, values in kinds.items():
        hashes = []
        for value in (*values, values[0]):
            digest = hashlib.sha256()
            update_hash(digest, {"images": [value]})
            hashes.append(digest.hexdigest())
        assert hashes[0] != hashes[1] and hashes[0] == hashes[2], kind
    (tmp_path / "a.png").write_bytes((tmp_path / "b.png").read_bytes())
    digest = hashlib.sha256()
    update_hash(digest, {"images": [tmp_path / "a.png"]})
    first = hashlib.sha256()
    update_hash(first, {"images": [tmp_path / "b.png"]})
    assert digest.hexdigest() != first.hexdigest()  # names count, too


def test_a_text_that_names_a_file_is_a_text(tmp_path, monkeypatch):
    row = {"messages": [ask("a.txt"), say("7")]}
    key = row_key(row)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    assert row_key(row) == key


@pytest.mark.parametrize("size", [1, BLOCK, 4 * BLOCK, 4 * BLOCK + 1, 9 * BLOCK])
def test_size_and_both_ends_of_a_file_count(row, size):
    content = bytes(range(256)) * (size // 256 + 1)
    forms = [
        content[:size],
        content[: size - 1],
        b"x" + content[1:size],
        content[: size - 1] + b"x",
        content[: size + 1],
    ]
    assert len({row_key({**row, "images": [form]}) for form in forms}) == len(set(forms))


def test_a_picture_that_was_read_keeps_its_key(row):
    picture = image(24, 40)
    key = row_key({**row, "images": [picture]})
    picture.load()
    assert row_key({**row, "images": [picture]}) == key


def test_map_style_stored_and_streamed_rows_have_equal_keys(row, tmp_path):
    part = {"type": Value("string"), "text": Value("string")}
    message = {"role": Value("string"), "content": List(part)}
    rows = [{**row, "messages": [row["messages"][0], say(str(digit))]} for digit in range(5)]
    keys = [row_key(each) for each in rows]
    dataset = undecoded(Dataset.from_list(rows, Features({"messages": List(message), "images": List(ImageFeature())})))
    assert [row_key(each) for each in dataset] == keys
    assert [row_key(each) for each in raw_rows(dataset)] == keys
    assert [row_key(each) for each in dataset.to_iterable_dataset(num_shards=2)] == keys
    dataset.to_parquet(tmp_path / "rows.parquet")  # holds the files' bytes
    assert [row_key(each) for each in load_rows(str(tmp_path / "rows.parquet"))] == keys
