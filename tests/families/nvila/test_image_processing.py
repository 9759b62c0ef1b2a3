"""NVILA's image and video processors: pixels equal to SigLIP's own processor on every tile, and their grids."""

import numpy as np
import pytest
import torch
from nvila_processors import clip, picture, released, tiny
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.video_utils import VideoMetadata


def siglip(tiles, edge):
    """What the upstream processor makes of pictures, stacked: [tiles, 3, edge, edge]."""
    processor = SiglipImageProcessorPil(size={"height": edge, "width": edge})
    return torch.cat([processor(tile, return_tensors="pt")["pixel_values"] for tile in tiles])


def cropped(image, columns, rows, edge):
    resized = image.resize((columns * edge, rows * edge))  # bicubic is PIL's own choice
    return [
        resized.crop(
            (edge * (i % columns), edge * (i // columns), edge * (i % columns + 1), edge * (i // columns + 1))
        )
        for i in range(columns * rows)
    ]


@pytest.mark.parametrize("make", [tiny, released])
def test_every_tile_equals_siglips(make):
    image = picture(160, 90)
    edge = 448 if make is released else 16
    cases = {
        "dynamic_s2": [(1, 1), (2, 2), (4, 3)],
        "dynamic": [(2, 1), (1, 1)] if make is released else [(4, 2), (1, 1)],
        "resize": [(1, 1)],
    }
    for tiling, mosaics in cases.items():
        batch = make(tiling).image_processor(image, return_tensors="pt")
        tiles = [tile for mosaic in mosaics for tile in cropped(image, *mosaic, edge)]
        assert torch.equal(batch["pixel_values"], siglip(tiles, edge)), tiling
        assert batch["pixel_values"].dtype == torch.float32


def test_kinds_of_images_are_one_picture():
    processor = tiny("resize").image_processor
    image = picture(30, 20, mode="RGBA")
    rgb = image.convert("RGB")
    pixels = siglip([rgb], 16)
    array = np.asarray(rgb)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for given in (image, rgb, np.asarray(image), array, array.transpose(2, 0, 1), tensor, array / 255):
        assert torch.equal(processor(given, return_tensors="pt")["pixel_values"], pixels)
    grey = picture(30, 20, mode="L")
    for given in (grey, np.asarray(grey)[None]):
        assert torch.equal(processor(given, return_tensors="pt")["pixel_values"], siglip([grey.convert("RGB")], 16))
    palette = rgb.quantize(16)
    assert torch.equal(processor(palette, return_tensors="pt")["pixel_values"], siglip([palette.convert("RGB")], 16))


def test_files_are_opened(tmp_path):
    image = picture(30, 20)
    image.save(tmp_path / "picture.png")
    processor = tiny("dynamic").image_processor
    for given in (str(tmp_path / "picture.png"), [[str(tmp_path / "picture.png")]]):
        batch = processor(given, return_tensors="pt")
        assert torch.equal(batch["pixel_values"], processor(image, return_tensors="pt")["pixel_values"])


def test_only_images_alone_in_their_sample_are_tiled():
    processor = tiny("dynamic").image_processor
    images = [picture(64, 16, 0), picture(32, 16, 1), picture(16, 16, 2)]
    flat = processor(images, return_tensors="pt")
    assert flat["image_grid_thw"].tolist() == [[1, 3, 12], [1, 3, 6], [1, 3, 3]]
    assert len(flat["pixel_values"]) == 5 + 3 + 1
    together = processor([images], return_tensors="pt")
    assert together["image_grid_thw"].tolist() == [[1, 3, 3]] * 3
    assert torch.equal(together["pixel_values"], siglip(images, 16))
    mixed = processor([images[:1], images[1:]], return_tensors="pt")
    assert mixed["image_grid_thw"].tolist() == [[1, 3, 12], [1, 3, 3], [1, 3, 3]]
    assert torch.equal(mixed["pixel_values"][:5], flat["pixel_values"][:5])
    off = processor(images, image_aspect_ratio="resize", return_tensors="pt")
    assert torch.equal(off["pixel_values"], together["pixel_values"])


def test_scales_come_small_to_large():
    batch = released("dynamic_s2").image_processor(picture(108, 192), return_tensors="np")
    assert batch["pixel_values"].shape == (1 + 4 + 10, 3, 448, 448)
    assert batch["image_grid_thw"].tolist() == [[1, 80, 32]] and batch["image_grid_thw"].dtype == np.int64


def test_mean_and_std_can_be_the_models_own():
    processor = tiny("resize", mean_std=([0.2, 0.3, 0.4], [0.5, 0.6, 0.7]))
    image = picture(16, 16)
    expected = (np.asarray(image) / 255 - [0.2, 0.3, 0.4]) / [0.5, 0.6, 0.7]
    batch = processor.image_processor(image, return_tensors="np")
    np.testing.assert_allclose(batch["pixel_values"][0].transpose(1, 2, 0), expected, atol=1e-6)
    video = processor.video_processor([[image] * 8], return_tensors="np")
    np.testing.assert_allclose(video["pixel_values_videos"][0].transpose(1, 2, 0), expected, atol=1e-6)


def test_unknown_tiling():
    with pytest.raises(ValueError, match=r'image_aspect_ratio=.pad. must be "dynamic_s2"'):
        tiny().image_processor(picture(16, 16), image_aspect_ratio="pad")


def frame_numbers(pixels):
    """Of the frames of [`clip`], from their pixels."""
    return ((pixels[:, 0, 0, 0] + 1) / 2 * 255).round().int().tolist()


@pytest.mark.parametrize(
    ("frames", "count", "taken"),
    [
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (100, 4, [0, 33, 66, 99]),
        (30, 8, [0, 4, 8, 12, 17, 21, 25, 29]),
        (3, 8, [0, 0, 1, 1, 1, 1, 2, 2]),
        (9, 1, [0]),
    ],
)
def test_frames_are_spread_over_the_whole_video(frames, count, taken):
    processor = tiny(num_video_frames=count).video_processor
    batch = processor(clip(frames), return_tensors="pt")
    assert frame_numbers(batch["pixel_values_videos"]) == taken
    assert batch["video_grid_thw"].tolist() == [[count, 2, 2]]


def test_fps_and_metadata_change_nothing_but_are_returned():
    processor = tiny().video_processor
    metadata = VideoMetadata(total_num_frames=30, fps=10.0)
    batch = processor(clip(30), fps=1, video_metadata=[metadata], return_metadata=True, return_tensors="pt")
    assert frame_numbers(batch["pixel_values_videos"]) == [0, 4, 8, 12, 17, 21, 25, 29]
    assert list(batch["video_metadata"][0].frames_indices) == [0, 4, 8, 12, 17, 21, 25, 29]


def test_frames_that_are_sampled_stay():
    batch = tiny().video_processor([clip(3), clip(5)], do_sample_frames=False, return_tensors="pt")
    assert frame_numbers(batch["pixel_values_videos"]) == [0, 1, 2, 0, 1, 2, 3, 4]
    assert batch["video_grid_thw"].tolist() == [[3, 2, 2], [5, 2, 2]]


def test_every_frame_equals_siglips():
    frames = [picture(40, 30, seed) for seed in range(4)]
    array = np.stack([np.asarray(frame) for frame in frames])
    processor = tiny(num_video_frames=4).video_processor
    channels_first = torch.from_numpy(array).permute(0, 3, 1, 2)
    for given in ([frames], array, [array], channels_first, [channels_first]):
        batch = processor(given, return_tensors="pt")
        assert torch.equal(batch["pixel_values_videos"], siglip(frames, 16))


def test_pooled_grids_of_every_video():
    pools = {"video_encoder": "tsp", "pool_sizes": [[2, 1, 1], [4, 2, 2]]}
    processor = tiny("resize", **pools).video_processor
    batch = processor([clip(20), clip(9)], return_tensors="pt")
    assert batch["video_grid_thw"].tolist() == [[4, 2, 2], [2, 1, 1]] * 2
    assert batch["pixel_values_videos"].shape == (16, 3, 16, 16)
    with pytest.raises(ValueError, match="does not divide a video of 6 frames: give a multiple of 4"):
        processor(clip(6), do_sample_frames=False)


def test_video_of_pictures_on_disk(tmp_path):
    files = []
    for number in range(2):
        files.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(clip(2)[number]).save(files[-1])
    batch = tiny().video_processor([[files]], do_sample_frames=False, return_tensors="pt")
    assert frame_numbers(batch["pixel_values_videos"]) == [0, 1]
