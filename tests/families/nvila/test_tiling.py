"""NVILA's tiling: the released checkpoints' answers, and the rule once more in other words."""

import numpy as np
import pytest
from nvila_processors import picture

from linmu_hf.families.nvila.tiling import (
    closest_mosaic,
    cut,
    dynamic_mosaics,
    image_runs,
    mosaics,
    pooled_grids,
    s2_mosaics,
    video_runs,
)


RELEASED = {"tile_size": 448, "min_tiles": 1, "max_tiles": 12}
S2 = {"tile_size": 448, "scales": [448, 896, 1344], "max_tiles": 12}


def transcribed(width, height, fewest, most, edge):
    """The published rule, word for word: walk all shapes from few tiles to many and remember the best so far."""
    shapes = set()
    for n in range(fewest, most + 1):
        for i in range(1, n + 1):
            for j in range(1, n + 1):
                if fewest <= i * j <= most:
                    shapes.add((i, j))
    chosen, smallest = (1, 1), float("inf")
    for i, j in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        difference = abs(width / height - i / j)
        if difference < smallest:
            smallest, chosen = difference, (i, j)
        elif difference == smallest and width * height > 0.5 * edge * edge * i * j:
            chosen = (i, j)
    return chosen


@pytest.mark.parametrize(
    ("size", "mosaic", "tiles", "tokens"),
    [
        ((448, 448), (1, 1), 1, 121),
        ((600, 600), (1, 1), 1, 121),
        ((634, 634), (2, 2), 5, 605),
        ((1000, 1000), (3, 3), 10, 1210),
        ((640, 480), (4, 3), 13, 1573),
        ((1920, 1080), (4, 2), 9, 1089),
        ((1080, 1920), (2, 4), 9, 1089),
        ((1000, 100), (10, 1), 11, 1331),
    ],
)
def test_known_answers_of_dynamic(size, mosaic, tiles, tokens):
    chosen = dynamic_mosaics(*size, **RELEASED)
    assert chosen[0] == mosaic and chosen[1:] == ([(1, 1)] if tiles > 1 else [])
    assert sum(columns * rows for columns, rows in chosen) == tiles
    runs = image_runs((1, 11 * mosaic[1], 11 * mosaic[0]), "dynamic", 11)
    assert sum(placeholders for placeholders, _ in runs) == tokens
    assert runs == [(121, 2)] * (tiles - 1) + [(121, 1)]


@pytest.mark.parametrize(
    ("size", "blocks", "tiles", "grid", "tokens"),
    [
        ((448, 448), (3, 3), 14, (48, 48), 2304),
        ((600, 600), (3, 3), 14, (48, 48), 2304),
        ((634, 634), (3, 3), 14, (48, 48), 2304),
        ((1000, 1000), (3, 3), 14, (48, 48), 2304),
        ((640, 480), (3, 4), 17, (48, 64), 3072),
        ((1920, 1080), (3, 4), 17, (48, 64), 3072),
        ((1080, 1920), (5, 2), 15, (80, 32), 2560),
        ((1000, 100), (1, 10), 15, (16, 160), 2560),
    ],
)
def test_known_answers_of_s2(size, blocks, tiles, grid, tokens):
    rows, columns = blocks
    chosen = s2_mosaics(*size, **S2)
    assert chosen == [(1, 1), (2, 2), (columns, rows)]
    assert sum(columns * rows for columns, rows in chosen) == tiles
    assert (16 * rows, 16 * columns) == grid
    assert image_runs((1, *grid), "dynamic_s2", 16) == [(tokens, 1)]


@pytest.mark.parametrize("limits", [(1, 12), (9, 12), (1, 6)])
def test_random_sizes_follow_the_rule(limits):
    generator = np.random.default_rng(0)
    # small numbers make exact ties of ratios, large ones both answers to a tie
    sizes = [*generator.integers(1, 2500, (100, 2)), *(generator.integers(1, 9, (100, 2)) * 160)]
    tied = 0
    for width, height in sizes:
        width, height = int(width), int(height)
        expected = transcribed(width, height, *limits, 448)
        assert closest_mosaic(width, height, mosaics(*limits), 448) == expected, (width, height)
        tied += transcribed(width, height, *limits, 1) != transcribed(width, height, *limits, 10**6)
    assert tied > 40 or limits[0] > 1  # the sizes put the rule for ties to the test


def test_tiles_are_cut_row_by_row():
    image = picture(60, 40)
    tiles = cut(image, (3, 2), tile_size=16, resample=3)
    assert len(tiles) == 6 and all(tile.size == (16, 16) for tile in tiles)
    rows = [np.concatenate([np.asarray(tile) for tile in tiles[start : start + 3]], axis=1) for start in (0, 3)]
    assert np.array_equal(np.concatenate(rows), np.asarray(image.resize((48, 32), resample=3)))


def test_too_few_tiles_allowed():
    with pytest.raises(ValueError, match="max_tiles must be at least min_tiles"):
        s2_mosaics(100, 100, tile_size=16, scales=[16, 64], max_tiles=12)


def test_frames_of_a_video_are_runs():
    assert pooled_grids(8, 16, [[1, 1, 1]]) == [[8, 16, 16]]
    assert sum(map(sum, video_runs([[8, 16, 16]]))) == 2056
    assert pooled_grids(256, 16, [[8, 1, 1]]) == [[32, 16, 16]]
    assert sum(map(sum, video_runs([[32, 16, 16]]))) == 8224
    assert video_runs(pooled_grids(4, 4, [[4, 1, 1], [2, 2, 4]])) == [(16, 1), (2, 1), (2, 1)]


@pytest.mark.parametrize(
    ("frames", "pool", "message"),
    [
        (7, [2, 1, 1], r"pool_sizes=\[\[2, 1, 1\]\] does not divide a video of 7 frames: give a multiple of 2"),
        (8, [1, 3, 1], r"pool_sizes=\[\[1, 3, 1\]\] must divide the 16x16 tokens"),
    ],
)
def test_pools_must_divide(frames, pool, message):
    with pytest.raises(ValueError, match=message):
        pooled_grids(frames, 16, [pool])
