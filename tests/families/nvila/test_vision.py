"""NVILA's vision side in parts: each function against the same thing written out, grids, layouts, sizes, refusals."""

import math

import pytest
import tiny
import tiny_nvila
import torch
from transformers import SiglipVisionConfig

from linmu_hf import LinMUConfig, LinMUForConditionalGeneration, NVILAVisionConfig
from linmu_hf.families.nvila import vision as vision_nvila
from linmu_hf.families.nvila.vision import Downsample, join_scales, merge_tiles, pool, resize_area, split_tiles
from linmu_hf.modeling.checks import check_decoder_inputs
from linmu_hf.modeling.layout.token_layout import TokenLayout


def image_of(model, sample):
    """Positions and layout `[t, 4]` of a sample alone."""
    inputs = {name: value for name, value in tiny.batch(sample).items() if "pixel" not in name}
    positions, layout = model.model.get_positions(**inputs)
    return positions[:, 0], layout[0]


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize(("h", "w"), [(6, 6), (4, 4), (5, 8)])
def test_downsample(k, h, w):
    x = torch.randn(2, h, w, 3)
    actual = Downsample(k)(x)
    rows, columns = math.ceil(h / k), math.ceil(w / k)
    assert actual.shape == (2, rows * columns, 3 * k * k)
    for n in range(2):
        for i in range(rows):
            for j in range(columns):
                token = actual[n, i * columns + j].view(k, k, 3)
                for di in range(k):
                    for dj in range(k):
                        y, z = i * k + di, j * k + dj
                        expected = x[n, y, z] if y < h and z < w else torch.zeros(3)
                        assert torch.equal(token[di, dj], expected)


def test_merging_tiles_and_splitting_them_again():
    tiles = torch.randn(6, 2, 3, 5)
    merged = merge_tiles(tiles, 3, 2)
    assert merged.shape == (6, 6, 5)
    for tile in range(6):
        row, column = divmod(tile, 2)
        assert torch.equal(merged[2 * row : 2 * row + 2, 3 * column : 3 * column + 3], tiles[tile])
    assert torch.equal(split_tiles(merged, 3, 2), tiles)


def test_area_interpolation():
    line = torch.arange(4.0).view(1, 4, 1)
    assert resize_area(line, (1, 6)).flatten().tolist() == [0, 0.5, 1, 2, 2.5, 3]
    x = torch.randn(4, 8, 3)
    for size in ((12, 8), (12, 20), (6, 5), (4, 8)):
        expected = torch.empty(*size, 3)
        for i in range(size[0]):
            for j in range(size[1]):
                rows = slice(i * 4 // size[0], math.ceil((i + 1) * 4 / size[0]))
                columns = slice(j * 8 // size[1], math.ceil((j + 1) * 8 / size[1]))
                expected[i, j] = x[rows, columns].mean((0, 1))
        torch.testing.assert_close(resize_area(x, size), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_area_interpolation_is_exact_and_rounds_once(dtype, monkeypatch):
    interpolate, seen = torch.nn.functional.interpolate, []
    monkeypatch.setattr(
        torch.nn.functional, "interpolate", lambda x, **how: seen.append(x.dtype) or interpolate(x, **how)
    )
    x = torch.randn(4, 4, 3).to(dtype)
    actual = resize_area(x, (6, 6))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, resize_area(x.double(), (6, 6)).to(dtype), atol=0, rtol=0)
    assert seen[0] == (dtype if dtype == torch.float64 else torch.float32)


def test_scales_are_joined_small_to_large():
    config = tiny_nvila.vision_config(image_aspect_ratio="dynamic_s2", s2_scales=[8, 16, 24])
    tiles = torch.stack([torch.full((4, 4, 1), float(tile)) for tile in range(1 + 4 + 12)])
    joined = join_scales(config, tiles, 3, 4)
    assert joined.shape == (12, 4, 4, 3)
    for block in range(12):
        row, column = divmod(block, 4)
        assert (joined[block, ..., 0] == 0).all() and (joined[block, ..., 2] == 5 + block).all()
        assert (joined[block, 0, 0, 1]) == 1 + 2 * (row * 4 // 6) + column // 2  # of 12 x 16 cells each 6 x 8
    assert torch.equal(join_scales(config, tiles[3:4], 1, 1), torch.full((1, 4, 4, 3), 3.0))


@pytest.mark.parametrize("sizes", [[1, 1, 1], [3, 1, 1], [2, 2, 1], [6, 2, 4]], ids=str)
def test_pooling(sizes):
    t, h, w = sizes
    x = torch.randn(6, 4, 4, 3)
    actual = pool(x, sizes)
    expected = torch.empty(6 // t, 4 // h, 4 // w, 3)
    for i in range(6 // t):
        for j in range(4 // h):
            for k in range(4 // w):
                group = x[i * t : i * t + t, j * h : j * h + h, k * w : k * w + w]
                expected[i, j, k] = group.mean((0, 1, 2))
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_tiles_in_chunks_are_the_same(monkeypatch):
    model = tiny_nvila.model()
    inputs = tiny.batch(tiny_nvila.Sample(1, ("image", 3, 3), ("video", 3), 2))
    expected = model(**inputs).logits
    sizes = []
    model.model.visual.vision_tower.embeddings.register_forward_hook(lambda *args: sizes.append(len(args[1][0])))
    monkeypatch.setattr(vision_nvila, "TILES_AT_ONCE", 4)
    torch.testing.assert_close(model(**inputs).logits, expected)
    assert sizes == [4, 4, 2, 4, 2]


def test_layout_of_scales():
    positions, layout = image_of(tiny_nvila.plain(num_hidden_layers=1), tiny_nvila.Sample(2, ("image", 2, 3), 3))
    grid = [[0, 0, y, x] for y in range(4) for x in range(6)]
    assert layout.tolist() == [[-1] * 4] * 2 + grid + [[-1] * 4] * 4
    assert positions.tolist() == [list(range(2 + 24 + 1 + 3))] * 3


def test_layout_of_tiles_and_thumbnail():
    model = tiny_nvila.plain(vision=tiny_nvila.LITE, num_hidden_layers=1)
    sample = tiny_nvila.LiteSample(1, ("image", 2, 2), ("image", 1, 1), 2)
    positions, layout = image_of(model, sample)
    vision = layout[layout[:, 0] >= 0].tolist()
    tiles = [[0, 0, 2 * i + y, 2 * j + x] for i in range(2) for j in range(2) for y in range(2) for x in range(2)]
    cells = [[y, x] for y in range(2) for x in range(2)]
    assert vision == tiles + [[0, 1, *cell] for cell in cells] + [[1, 0, *cell] for cell in cells]
    separators = [place for place, token in enumerate(sample.ids) if token == tiny_nvila.NEWLINE]
    assert (layout[separators] == -1).all() and len(separators) == 2 * 5 + 1
    assert positions.tolist() == [list(range(len(sample)))] * 3


@pytest.mark.parametrize("max_span_frames", [None, 2])
def test_layout_of_pooled_videos(max_span_frames):
    class Twice(tiny_nvila.Sample):
        pool_sizes = ((2, 1, 1), (1, 2, 1))

    vision = tiny_nvila.S2 | {"pool_sizes": [[2, 1, 1], [1, 2, 1]]}
    model = tiny_nvila.plain(vision=vision, num_hidden_layers=1, max_span_frames=max_span_frames)
    _, layout = image_of(model, Twice(1, ("video", 3), 2))
    vision = layout[layout[:, 0] >= 0].tolist()
    frames = [(t, 2) for t in range(3)] + [(t, 1) for t in range(6)]
    first = [0, 0, 1, 2, 2, 3, 3, 4, 4] if max_span_frames else [0] * 3 + [1] * 6
    expected = []
    for span, (t, rows) in zip(first, frames):
        t = t % 2 if max_span_frames else t
        expected += [[span, t, y, x] for y in range(rows) for x in range(2)]
    assert vision == expected


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_a_thumbnail_is_an_image_of_its_own_to_the_windows(shift, wrap):
    """Windows of tiles and thumbnail are those of two images of these sizes."""
    config = tiny.text_config(image_window_size=[2, 2, 3], window_size=[2, 4, 4], window_wrap=wrap)
    tiles = [[0, 0, y, x] for y in range(4) for x in range(6)]
    together = torch.tensor([tiles + [[0, 1, y, x] for y in range(2) for x in range(2)]])
    apart = torch.tensor([tiles + [[1, 0, y, x] for y in range(2) for x in range(2)]])
    one, two = (
        TokenLayout.build(config, 1, 28, "cpu", vision_layout=layout).windows[shift] for layout in (together, apart)
    )
    assert all(torch.equal(*pair) for pair in zip(one.groups, two.groups, strict=True))
    assert torch.equal(one.slots, two.slots)


def test_every_frame_of_a_span_is_a_whole_grid_and_none_is_missing():
    """Tiles and a thumbnail are one span of two grids; what has a hole, or a frame too few, is not a span."""
    cells = [[0, 0, y, x] for y in range(4) for x in range(4)] + [[0, 1, y, x] for y in range(2) for x in range(2)]
    layout = torch.tensor([[[-1] * 4, *cells, [-1] * 4]])
    tokens = torch.zeros(1, layout.shape[1], dtype=torch.long)
    check_decoder_inputs(tokens, vision_layout=layout)
    no_first, hole, later = (layout.clone() for _ in range(3))
    no_first[layout[..., 1] == 0] = -1
    hole[0, 18] = -1
    later[0, 17:21, 1] = 2
    for wrong in (no_first, hole, later):
        with pytest.raises(ValueError, match="vision_layout has a span that is no whole grid"):
            check_decoder_inputs(tokens, vision_layout=wrong)


def test_frames_of_one_size_are_a_video_to_the_windows():
    config = tiny.text_config()
    layout = torch.tensor([[[0, t, y, x] for t in range(2) for y in range(2) for x in range(3)]])
    windows = TokenLayout.build(config, 1, 12, "cpu", vision_layout=layout).windows[False]
    assert [tuple(group.shape) for group in windows.groups] == [(1, 12)]


MEGA = 1e6
TOWER = SiglipVisionConfig(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=448,
    patch_size=14,
)  # fmt: skip
RELEASES = {
    "8B": ({"image_aspect_ratio": "dynamic_s2", "s2_scales": "448,896,1344"}, 124.85),
    "Lite-8B": ({"image_aspect_ratio": "dynamic", "projector_type": "mlp_downsample_3x3_fix"}, 122.20),
    "8B-Video": ({"video_encoder": "tsp", "pool_sizes": [[8, 1, 1]]}, 58.75),
}


@pytest.mark.parametrize(("options", "projector"), RELEASES.values(), ids=RELEASES)
def test_full_shapes_have_the_sizes_of_the_released_files(options, projector):
    vision = NVILAVisionConfig(tower_config=TOWER.to_dict(), out_hidden_size=3584, **options)
    text = {"vocab_size": 151648, "hidden_size": 3584, "num_hidden_layers": 1, "layer_types": ["full_attention"]}
    config = LinMUConfig(text_config=text, vision_config=vision, image_token_id=151649, video_token_id=151650)
    with torch.device("meta"):
        model = LinMUForConditionalGeneration(config).bfloat16()
    sides = {
        "vision_tower": model.model.visual.vision_tower,
        "mm_projector": model.model.visual.mm_projector,
        "lm_head": model.lm_head,
    }
    sizes = {
        name: sum(tensor.numel() * 2 for tensor in module.state_dict().values()) / MEGA
        for name, module in sides.items()
    }
    # a file holds a few kilobytes of names beside its tensors
    assert sizes == {
        "vision_tower": pytest.approx(826.65, abs=0.1),
        "mm_projector": pytest.approx(projector, abs=0.01),
        "lm_head": pytest.approx(1087.01, abs=0.01),
    }
    assert {name.split(".")[0] for name in model.model.visual.state_dict()} == {"vision_tower", "mm_projector"}


GRIDS = {
    "an image of two frames": (tiny_nvila.S2, "image", [[2, 4, 4]], r"image_grid_thw has the entry \[2, 4, 4\]"),
    "no whole tiles": (tiny_nvila.S2, "image", [[1, 4, 3]], r"positive multiples of 2: pass what the processor"),
    "no tiles": (tiny_nvila.LITE, "image", [[1, 0, 2]], r"image_grid_thw has the entry \[1, 0, 2\]"),
    "tiles where one is made": ({}, "image", [[1, 4, 2]], r"\[1, 4, 2\]; it must be 1, and .* 2 each"),
    "frames of another size": (
        tiny_nvila.S2, "video", [[3, 4, 2]], r"video_grid_thw has the entry \[3, 4, 2\]; for a video of 6 frames",
    ),
    "no frames": (tiny_nvila.S2, "video", [[0, 2, 2]], r"video_grid_thw has the entry \[0, 2, 2\]"),
    "one grid for two poolings": (
        tiny_nvila.S2 | {"pool_sizes": [[2, 1, 1], [4, 1, 1]]}, "video", [[2, 2, 2]],
        r"video_grid_thw has 1 rows; it must have one per video and each of pool_sizes",
    ),
    "no whole groups of frames": (
        tiny_nvila.S2 | {"pool_sizes": [[2, 1, 1], [4, 1, 1]]}, "video", [[3, 2, 2], [1, 2, 2]],
        r"\[1, 2, 2\]; for a video of 6 frames of 2 x 2 tokens and the pooling \[4, 1, 1\] .* without remainder",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("vision", "kind", "grids", "message"), GRIDS.values(), ids=GRIDS)
def test_grids_that_are_none(vision, kind, grids, message):
    side = tiny_nvila.plain(vision=vision, num_hidden_layers=1).model
    encode = side.get_image_features if kind == "image" else side.get_video_features
    with pytest.raises(ValueError, match=message):
        encode(torch.randn(4, 3, 8, 8), torch.tensor(grids))


PIXELS = {
    "too few tiles": ("image", [[1, 4, 4]], (4, 3, 8, 8), r"pixel_values of shape \(4, 3, 8, 8\) .* = \[5, 3, 8, 8\]"),
    "a tile too many": ("image", [[1, 2, 2]], (2, 3, 8, 8), r"must be \[tiles, channels, height, width\]"),
    "no smaller scales": ("image", [[1, 2, 4]], (2, 3, 8, 8), r"as image_grid_thw says = \[3, 3, 8, 8\]"),
    "tiles of another edge": ("image", [[1, 2, 2]], (1, 3, 16, 16), r"= \[1, 3, 8, 8\]"),
    "an odd number of frames": ("video", [[2, 2, 2]], (3, 3, 8, 8), r"\[frames, .* as video_grid_thw says = \[4, 3"),
    "patches": ("image", [[1, 2, 2]], (16, 24), r"pixel_values of shape \(16, 24\)"),
}


@pytest.mark.parametrize(("kind", "grids", "shape", "message"), PIXELS.values(), ids=PIXELS)
def test_pixels_that_do_not_fit(kind, grids, shape, message):
    side = tiny_nvila.plain(num_hidden_layers=1).model
    encode = side.get_image_features if kind == "image" else side.get_video_features
    with pytest.raises(ValueError, match=message):
        encode(torch.randn(shape), torch.tensor(grids))
    with pytest.raises(ValueError, match=f"came without {kind}_grid_thw; pass both"):
        encode(torch.randn(shape))


def test_the_media_of_a_row_stay_in_it():
    """Three tiles in one row and one in another, with grids the other way round: as many runs, other images."""
    model = tiny_nvila.plain(vision=tiny_nvila.LITE, num_hidden_layers=1)
    inputs = tiny.batch(tiny_nvila.LiteSample(1, ("image", 2, 1)), tiny_nvila.LiteSample(2, ("image", 1, 1)))
    inputs["image_grid_thw"] = inputs["image_grid_thw"].flip(0)
    where = {name: value for name, value in inputs.items() if "pixel" not in name}
    with pytest.raises(ValueError, match=r"\[1, 4, 2\], whose tokens would be in several rows of the batch"):
        model.model.get_positions(**where)
