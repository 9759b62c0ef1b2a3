"""
NVILA's tiling: into which tiles an image is cut, and how many tokens each part of it becomes.

A tile is a square of `tile_size` pixels, the input of the vision tower, and `tile_tokens` x `tile_tokens` tokens after
the projector. An image is resized to a mosaic of tiles without keeping its aspect ratio; the mosaic is chosen so that
its shape comes closest to the image's.
"""

from collections.abc import Sequence

from PIL import Image


Mosaic = tuple[int, int]  # columns, rows of tiles
Run = tuple[int, int]  # placeholders, and the separators after them


def mosaics(min_tiles: int, max_tiles: int) -> list[Mosaic]:
    """Returns all mosaics of `min_tiles` to `max_tiles` tiles, the fewest tiles first."""
    shapes = [(columns, rows) for columns in range(1, max_tiles + 1) for rows in range(1, max_tiles // columns + 1)]
    return sorted(
        (shape for shape in shapes if shape[0] * shape[1] >= min_tiles), key=lambda shape: shape[0] * shape[1]
    )


def closest_mosaic(width: int, height: int, candidates: Sequence[Mosaic], tile_size: int) -> Mosaic:
    """
    Returns the mosaic whose ratio of width to height is closest to the image's.

    Among equally close ones, each with more tiles is taken only if the image has more than half of its pixels.

    Raises:
        `ValueError`: if there are no candidates.
    """
    if not candidates:
        raise ValueError("there is no mosaic to choose from: max_tiles must be at least min_tiles")
    best, best_distance = candidates[0], float("inf")
    for columns, rows in candidates:
        distance = abs(width / height - columns / rows)
        fills_half = width * height > 0.5 * tile_size**2 * columns * rows
        if distance < best_distance or (distance == best_distance and fills_half):
            best, best_distance = (columns, rows), distance
    return best


def dynamic_mosaics(width: int, height: int, *, tile_size: int, min_tiles: int, max_tiles: int) -> list[Mosaic]:
    """Returns the mosaics of a `dynamic` image: the one closest in shape and, if it has several tiles, a thumbnail."""
    mosaic = closest_mosaic(width, height, mosaics(min_tiles, max_tiles), tile_size)
    return [mosaic] if mosaic == (1, 1) else [mosaic, (1, 1)]


def s2_mosaics(width: int, height: int, *, tile_size: int, scales: Sequence[int], max_tiles: int) -> list[Mosaic]:
    """
    Returns the mosaics of a `dynamic_s2` image, one per scale from small to large.

    All but the last are squares of their scale's size; the last has the shape closest to the image's, and at least as
    many tiles as the square of its scale.
    """
    edges = [scale // tile_size for scale in scales]
    last = closest_mosaic(width, height, mosaics(edges[-1] ** 2, max_tiles), tile_size)
    return [*((edge, edge) for edge in edges[:-1]), last]


def cut(image: Image.Image, mosaic: Mosaic, *, tile_size: int, resample: int) -> list[Image.Image]:
    """Resizes the image to the mosaic's size and cuts it into its tiles, row by row."""
    columns, rows = mosaic
    resized = image.resize((columns * tile_size, rows * tile_size), resample=resample)
    return [
        resized.crop((column * tile_size, row * tile_size, (column + 1) * tile_size, (row + 1) * tile_size))
        for row in range(rows)
        for column in range(columns)
    ]


def image_runs(grid: Sequence[int], tiling: str, tile_tokens: int) -> list[Run]:
    """Returns the block of an image with this grid of tokens (1, height, width)."""
    tokens = grid[1] * grid[2]
    if tiling != "dynamic":
        return [(tokens, 1)]
    tiles = tokens // tile_tokens**2
    tiles += tiles > 1  # the thumbnail
    # One separator from the vision side and one from the text, in which the last one stays.
    return [*[(tile_tokens**2, 2)] * (tiles - 1), (tile_tokens**2, 1)]


def video_runs(grids: Sequence[Sequence[int]]) -> list[Run]:
    """Returns the block of a video with these grids of tokens (frames, height, width), one for each pool size."""
    return [(h * w, 1) for t, h, w in grids for _ in range(t)]


def pooled_grids(frames: int, tile_tokens: int, pool_sizes: Sequence[Sequence[int]]) -> list[list[int]]:
    """
    Returns the grid (frames, height, width) of a video's tokens for each pool size.

    Raises:
        `ValueError`: if a pool size does not divide the frames, or the tokens of a frame.
    """
    grids = []
    for t, h, w in pool_sizes:
        pools = [list(pool) for pool in pool_sizes]
        if frames % t:
            raise ValueError(
                f"pool_sizes={pools} does not divide a video of {frames} frames: give a multiple of {t}, by "
                "`num_frames` or, with `do_sample_frames=False`, by the frames themselves"
            )
        if tile_tokens % h or tile_tokens % w:
            raise ValueError(f"pool_sizes={pools} must divide the {tile_tokens}x{tile_tokens} tokens of a frame")
        grids.append([frames // t, tile_tokens // h, tile_tokens // w])
    return grids
