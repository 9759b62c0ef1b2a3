"""Lengths are counted without decoding anything, and are those that the encoded rows have."""

import numpy as np
import nvila_processors
import pytest
from PIL import Image
from synthetic import ask, image, say

from linmu_hf.data import encode_rows
from linmu_hf.data.lengths import count_tokens


pytestmark = pytest.mark.core_training


ROWS = [
    {"messages": [ask("which digit?", images=1), say("7"), ask("and now?"), say("three")], "images": [image(24, 40)]},
    {"messages": [{"role": "user", "content": "hi"}, say("hello you")]},
    {"messages": [ask("which?", images=2), say("8")], "images": [image(8, 8), np.zeros((64, 30, 3), np.uint8)]},
    {
        "messages": [ask("what came first?", videos=1), say("8")],
        "videos": [[image(16, 24, seed) for seed in range(3)]],
    },
    {
        "messages": [ask("and?", videos=1, images=1), say("8")],
        "images": [image(40, 20)],
        "videos": [[image(8, 64)] * 8],
    },
]


@pytest.fixture(params=["qwen", "nvila"])
def either(request, processor):
    return processor if request.param == "qwen" else nvila_processors.tiny(num_video_frames=4)


def test_counted_is_encoded(either):
    for number, row in enumerate(ROWS):
        breaks = 0
        if either.__class__.__name__ == "NVILAProcessor":
            if len(row.get("images", [])) > 1:
                continue  # several images of a text are one tile each, and only a single one is counted
            # the line break after an image and after every frame is not counted
            breaks = len(row.get("images", [])) + sum(map(len, row.get("videos", [])))
        assert count_tokens(either, row) + breaks == encode_rows(either, [row])["input_ids"].shape[1], number


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_video_files(processor, tmp_path, kind):
    if kind == "file":
        av = pytest.importorskip("av")
        source = str(tmp_path / "clip.mp4")
        with av.open(source, "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for i in range(24):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 48, 3), i, np.uint8), "rgb24")))
            container.mux(stream.encode())
    else:
        source = str(tmp_path)
        for i in range(5):
            Image.new("RGB", (48, 32)).save(tmp_path / f"{i}.png")
    row = {"messages": [ask("what?", videos=1), say("8")], "videos": [source]}
    assert count_tokens(processor, row) == encode_rows(processor, [row])["input_ids"].shape[1]


def test_what_cannot_be_counted_is_named(processor):
    row = {"messages": [ask("which?", images=1), say("7")], "images": ["none.png"]}
    with pytest.raises(ValueError, match=r"row 3: none\.png does not exist"):
        count_tokens(processor, row, 3)
