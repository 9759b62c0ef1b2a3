"""Frames of a video are those that the processor chooses, at the times at which the file shows them."""

from fractions import Fraction

import numpy as np
import nvila_processors
import pytest
import torch
from PIL import Image
from synthetic import ask, image, make_teacher_config, say
from transformers.video_utils import VideoMetadata

from linmu_hf import LinMUConfig, LinMUForConditionalGeneration
from linmu_hf.data import check_dataset, encode_prompts, encode_rows
from linmu_hf.data.hashing import row_key
from linmu_hf.data.lengths import count_tokens
from linmu_hf.data.video import VIDEO_FPS, choose_frames, read_video, video_size


pytestmark = pytest.mark.core_training


av = pytest.importorskip("av")
ROW = [ask("when is 7?", videos=1), say("8")]


def write(file, fps, n, codec="mpeg4", times=None):
    """A clip of `n` frames that grow brighter."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i in range(n):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 240 * i // n, np.uint8), format="rgb24")
            if times:
                frame.time_base, frame.pts = stream.codec_context.time_base or 1 / Fraction(fps), times[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(file)


def brightness(video):
    return [float(np.asarray(frame).mean()) for frame in video.frames]


@pytest.mark.parametrize(
    ("fps", "n", "seconds"), [(Fraction(1, 4), 8, 8.0), (1, 8, 2.0), (2, 8, 1.0), (5, 20, 1.0), (30, 120, 1.0)]
)
def test_real_rates_reach_the_model(processor, tmp_path, fps, n, seconds):
    file = write(tmp_path / "clip.mp4", fps, n)
    check_dataset([{"messages": ROW, "videos": [file]}], processor)
    for video in (file, {"video": file}, {"path": None, "bytes": open(file, "rb").read()}):
        batch = encode_prompts(processor, [{"messages": ROW, "videos": [video]}])
        assert batch["video_grid_thw"][0, 0] == 4
        assert batch["second_per_grid_ts"].tolist() == [seconds]


def test_containers_without_a_number_of_frames(processor, tmp_path):
    for name, codec in (("a.mkv", "mpeg4"), ("a.webm", "libvpx"), ("a.ts", "mpeg2video"), ("a.flv", "flv")):
        fps = 25 if name == "a.ts" else 30
        video = read_video(write(tmp_path / name, fps, 2 * fps, codec), processor)
        assert video.metadata.total_num_frames == 2 * fps
        assert video.metadata.sampled_fps == pytest.approx(VIDEO_FPS)
        assert brightness(video) == pytest.approx([0, 60, 120, 180], abs=8)


def test_frames_are_chosen_by_their_time(processor, tmp_path):
    """Ten frames in the first second, two in the next four: what is on screen at 0, 0.5, 1 ... seconds."""
    times = [*range(0, 10), 30, 50]
    video = read_video(write(tmp_path / "slow.mkv", 10, 12, times=times), processor)
    assert len(video) == 10
    shown = [max(i for i, time in enumerate(times) if time <= moment) for moment in range(0, 50, 5)]
    assert brightness(video) == pytest.approx([240 * i // 12 for i in shown], abs=8)


def test_long_videos_are_cut_to_the_processors_most(processor, tmp_path):
    video = read_video(write(tmp_path / "long.mp4", 2, 40), processor)
    assert len(video) == 40
    processor.video_processor.max_frames = 12
    try:
        video = read_video(str(tmp_path / "long.mp4"), processor)
        assert len(video) == 12 and video.metadata.sampled_fps == pytest.approx(0.6)
        own = processor.video_processor.sample_frames(VideoMetadata(total_num_frames=40, fps=2.0), fps=2.0)
        assert video.metadata.frames_indices == own.tolist() == choose_frames(processor, video.metadata)
        assert len(read_video([image(8, 8)] * 14, processor)) == 14  # frames that were chosen before
        (tmp_path / "frames").mkdir()
        for i in range(14):
            Image.new("RGB", (8, 8)).save(tmp_path / "frames" / f"{i:02}.png")
        assert len(read_video(str(tmp_path / "frames"), processor)) == 12
    finally:
        del processor.video_processor.max_frames


def test_one_frame(processor, tmp_path):
    assert len(read_video(write(tmp_path / "one.mp4", 2, 1), processor)) == 1


def test_a_rate_to_choose_at(processor, tmp_path):
    file = write(tmp_path / "clip.mp4", 8, 32)
    video = read_video({"video": file, "fps": 4.0}, processor)
    assert len(video) == 16 and video.metadata.sampled_fps == 4.0


def test_frames_with_and_without_a_rate(processor, tmp_path):
    frames = [image(16, 24, seed) for seed in range(4)]
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(4)]
    expected = encode_rows(processor, [{"messages": ROW, "videos": [frames]}])
    assert expected["second_per_grid_ts"].tolist() == [1.0]
    for video in (paths, str(tmp_path), np.stack([np.asarray(frame) for frame in frames]), {"frames": paths}):
        batch = encode_rows(processor, [{"messages": ROW, "videos": [video]}])
        for name in expected:
            torch.testing.assert_close(torch.as_tensor(batch[name]), torch.as_tensor(expected[name]))
    slow = encode_rows(processor, [{"messages": ROW, "videos": [{"frames": frames, "fps": 0.25}]}])
    assert slow["second_per_grid_ts"].tolist() == [8.0]


SECONDS = {
    "no rate": ({}, {}, 1.0),
    "a rate": ({"fps": 0.5}, {}, 4.0),
    "a rate as text": ({"fps": "0.5"}, {}, 4.0),
    "time stamps": ({"timestamps": [10, 14, 18, 22]}, {}, 8.0),
    "time stamps that are not even": ({"timestamps": [0, 1, 2, 6]}, {}, 4.0),
    "the row's rate": ({}, {"fps": 0.25}, 8.0),
    "a rate for each video": ({}, {"fps": [0.25]}, 8.0),
    "the row's time stamps": ({}, {"timestamps": [0.0, 0.5, 1.0, 1.5]}, 1.0),
    "its own goes before the row's": ({"fps": 1}, {"fps": 0.25}, 2.0),
}


@pytest.mark.parametrize("name", SECONDS)
def test_the_time_of_frames_belongs_to_the_row(processor, tmp_path, name):
    own, of_row, seconds = SECONDS[name]
    frames = [image(16, 24, seed) for seed in range(4)]
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"{i}.png")
    for source in (frames, str(tmp_path)):
        video = {"frames": source, **own} if own else source
        row = {"messages": ROW, "videos": [video], **of_row}
        check_dataset([row], processor)
        assert encode_rows(processor, [row])["second_per_grid_ts"].tolist() == [seconds]


def test_a_file_knows_its_own_rate(processor, tmp_path):
    """A column `fps` says how fast the film was, not how many frames to take of it."""
    file = write(tmp_path / "clip.mp4", 4, 16)
    plain = encode_rows(processor, [{"messages": ROW, "videos": [file]}])
    row = {"messages": ROW, "videos": [file], "fps": 30.0}
    assert encode_rows(processor, [row])["second_per_grid_ts"].tolist() == plain["second_per_grid_ts"].tolist() == [1]


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "mpeg4"), ("a.mkv", "mpeg4"), ("a.webm", "libvpx"), ("a.ts", "mpeg2video"), ("a.flv", "flv")],
)
def test_a_part_of_a_file_is_that_part(processor, tmp_path, name, codec):
    """Frames of `video_start` to `video_end` are those of the whole file at these seconds; time begins anew."""
    file = write(tmp_path / name, 25, 200, codec)  # 8 seconds
    with av.open(file) as container:
        whole = [float(frame.to_ndarray(format="rgb24").mean()) for frame in container.decode(video=0)]
    for start, end, n in ((0.0, 2.0, 51), (3.0, 5.0, 51), (6.4, 100.0, 40), (7.96, 8.0, 1), (0.28, 0.56, 8)):
        part = {"video": file, "video_start": start, "video_end": end}
        video = read_video(part, processor)
        assert video.metadata.total_num_frames == n and video.metadata.fps == 25
        first = round(start * 25)
        assert brightness(video) == pytest.approx([whole[first + i] for i in video.metadata.frames_indices])
        assert video_size(part, processor) == video.frames.shape[:3]
    with open(file, "rb") as opened:
        given = {"video": opened.read(), "video_start": 3.0, "video_end": 5.0, "fps": 4.0}
    assert len(read_video(given, processor)) == 8


def test_a_part_of_a_file_in_a_row(processor, tmp_path):
    file = write(tmp_path / "clip.mp4", 5, 40)
    part = {"type": "video", "video": file, "video_start": 2, "video_end": 4}
    rows = [
        {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "when?"}]}, ROW[1]]},
        {"messages": [ask("when?", videos=1), ROW[1]], "videos": [{"video": file, "video_start": 2, "video_end": 4}]},
    ]
    check_dataset(rows, processor)
    batch = encode_rows(processor, rows)
    frames = read_video(rows[1]["videos"][0], processor)
    expected = encode_rows(processor, [{"messages": [ask("when?", videos=1), ROW[1]], "videos": [frames]}])
    half = len(batch["pixel_values_videos"]) // 2
    for i in range(2):
        assert torch.equal(batch["input_ids"][i], expected["input_ids"][0])
        assert torch.equal(batch["pixel_values_videos"][i * half :][:half], expected["pixel_values_videos"])
    assert [count_tokens(processor, row) for row in rows] == [batch["input_ids"].shape[1]] * 2
    plain = {**rows[1], "videos": [file]}
    assert len({row_key(row) for row in (rows[0], rows[1], plain)}) == 2  # the same part, and the whole


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (
            {"video_start": 3, "video_end": 2},
            "its video_start=3, video_end=2 must be seconds, the start before the end",
        ),
        ({"video_start": "soon"}, "its video_start='soon' must be seconds"),
        ({"video_start": -1}, "its video_start=-1 must be seconds"),
    ],
)
def test_parts_that_mean_nothing(processor, tmp_path, clip, message):
    row = {"messages": ROW, "videos": [{"video": write(tmp_path / "clip.mp4", 4, 16), **clip}]}
    with pytest.raises(ValueError, match=f"row 0 .*video 0: {message}"):
        check_dataset([row], processor)


def test_parts_that_are_not_there(processor, tmp_path):
    file = write(tmp_path / "clip.mp4", 4, 16)
    with pytest.raises(ValueError, match="its video_start=9 leaves no frame of 4 seconds"):
        read_video({"video": file, "video_start": 9}, processor)
    with pytest.raises(ValueError, match="it has `video_end`, and frames: give those that are meant"):
        read_video({"frames": [image(16, 24)] * 4, "video_end": 1}, processor)


def test_rates_of_one_batch(processor):
    """Every video of a batch has the positions that it has alone."""
    config = LinMUConfig.from_teacher(make_teacher_config(processor, layers=1))
    model = LinMUForConditionalGeneration(config)
    frames = [image(16, 24, seed) for seed in range(4)]
    two = [{"role": "user", "content": [{"type": "video"}, {"type": "video"}, {"type": "text", "text": "?"}]}, ROW[1]]
    rows = [
        {"messages": ROW, "videos": [{"frames": frames, "fps": 0.5}]},
        {"messages": ROW[:1] + ROW[1:], "videos": [frames]},
        {"messages": two, "videos": [{"frames": frames, "timestamps": [0, 3, 6, 9]}, {"frames": frames, "fps": 4}]},
    ]
    names = ("input_ids", "attention_mask", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids")

    def positions(batch):
        return model.model.get_positions(**{name: batch[name] for name in names})[0]

    batch = encode_rows(processor, rows)
    assert batch["second_per_grid_ts"].tolist() == pytest.approx([4.0, 1.0, 6.0, 0.5])
    together = positions(batch)
    for i, row in enumerate(rows):
        alone = positions(encode_rows(processor, [row]))
        assert torch.equal(together[:, i, : alone.shape[2]], alone[:, 0])


def test_nvila_takes_frames_with_times():
    """Its positions know no time: what a row says about it is read, checked, and changes nothing."""
    processor = nvila_processors.tiny(num_video_frames=4)
    frames = [image(16, 24, seed) for seed in range(4)]
    plain = encode_rows(processor, [{"messages": ROW, "videos": [frames]}])
    for timing in ({"fps": 0.5}, {"timestamps": [0, 1, 2, 3]}):
        row = {"messages": ROW, "videos": [{"frames": frames, **timing}]}
        batch = encode_rows(processor, [row])
        assert "second_per_grid_ts" not in batch and torch.equal(batch["input_ids"], plain["input_ids"])


BAD_TIMES = [
    ({"fps": 0}, "its fps=0 must be a positive number"),
    ({"fps": "fast"}, "its fps='fast' must be"),
    ({"timestamps": [0, 1, 2]}, r"its timestamps=\[0, 1, 2\] must be 4 rising numbers"),
    ({"timestamps": [0, 2, 1, 3]}, "must be 4 rising numbers"),
    ({"timestamps": "soon"}, "must be 4 rising numbers"),
    ({"fps": 1, "timestamps": [0, 1, 2, 3]}, "leave one out"),
]


@pytest.mark.parametrize(("timing", "message"), BAD_TIMES)
def test_times_that_mean_nothing(processor, timing, message):
    row = {"messages": ROW, "videos": [{"frames": [image(16, 24)] * 4, **timing}]}
    for check in (lambda: check_dataset([row], processor), lambda: encode_rows(processor, [row])):
        with pytest.raises(ValueError, match=f"row 0 .*video 0: .*{message}"):
            check()


def test_times_that_fit_no_video(processor, tmp_path):
    row = {"messages": ROW, "videos": [[image(16, 24)] * 4], "fps": [1, 2]}
    with pytest.raises(ValueError, match="row 0: it has 2 `fps` for 1 videos"):
        check_dataset([row], processor)
    file = write(tmp_path / "clip.mp4", 4, 16)
    row = {"messages": ROW, "videos": [{"video": file, "timestamps": [0, 1]}]}
    with pytest.raises(ValueError, match="a file has its own"):
        check_dataset([row], processor)


def test_temporal_positions_of_a_slow_clip(processor, tmp_path):
    config = LinMUConfig.from_teacher(make_teacher_config(processor, layers=1))
    model = LinMUForConditionalGeneration(config)
    file = write(tmp_path / "clip.mp4", Fraction(1, 4), 8)
    batch = encode_prompts(processor, [{"messages": ROW, "videos": [file]}])
    names = ("input_ids", "attention_mask", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids")
    positions = model.model.get_positions(**{name: batch[name] for name in names})[0][0, 0]
    times = positions[batch["mm_token_type_ids"][0] == 2].unique()
    step = 8 * config.vision_config.tokens_per_second
    assert (times - times[0]).tolist() == [0, step, 2 * step, 3 * step]


def test_nvila_takes_its_number_of_frames(tmp_path):
    processor = nvila_processors.tiny(num_video_frames=4)
    video = read_video(write(tmp_path / "a.mkv", 30, 60), processor)
    assert brightness(video) == pytest.approx([0, 80, 160, 236], abs=8)
    assert len(read_video(write(tmp_path / "b.mp4", 2, 2), processor)) == 4  # with repeats


def test_held_upright(processor, tmp_path):
    """A phone writes how it was held into the matrix of the track."""
    file = tmp_path / "clip.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        picture = np.zeros((32, 64, 3), np.uint8)
        picture[:, :32] = 255  # bright on the left
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(file.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    for i, value in enumerate((0, one, 0, -one, 0, 0)):  # a quarter clockwise
        data[matrix + 4 * i : matrix + 4 * i + 4] = value.to_bytes(4, "big", signed=True)
    file.write_bytes(data)
    frame = read_video(str(file), processor).frames[0]
    assert frame.shape == (64, 32, 3)
    assert frame[:24].mean() > 200 and frame[40:].mean() < 50  # what was left is above


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "none.mp4", "none.mp4 does not exist"),
        (lambda path: path, "is empty: a folder given as video holds one image per frame"),
        (lambda path: [image(8, 8), image(8, 16)], "several sizes"),
        (lambda path: 7, "it is a int: give a file"),
    ],
)
def test_bad_videos_are_named(processor, tmp_path, make, message):
    with pytest.raises(ValueError, match=f"row 1 .*video 0: .*{message}"):
        encode_rows(
            processor, [{"messages": ROW, "videos": [[image(8, 8)]]}, {"messages": ROW, "videos": [make(tmp_path)]}]
        )
