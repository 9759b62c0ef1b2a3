"""The NVILA vision side: SigLIP over tiles, scales joined on channels, a downsampling projector, temporal pooling.

Grids count tokens. A tile is `s` patches and `g` tokens wide and high; a separator, an ordinary text token, follows
every frame and tile of an image or video, so that their placeholders come in runs.
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, SiglipVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from ...modeling.checks import expect
from ...modeling.layout.positions import text_positions
from ...modeling.remote_code import InstalledCode
from ...modeling.vision_side import VisionSide, grid_coordinates
from .configuration import NVILAVisionConfig


TILES_AT_ONCE = 64  # bounds the activations of a long video


class Downsample(nn.Module):
    """The channels of k x k patches side by side, `[n, h, w, c]` to `[n, m, k * k * c]`; zeros after the last row."""

    def __init__(self, k: int):
        super().__init__()
        self.k = k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, h, w, c = x.shape
        k = self.k
        x = nn.functional.pad(x, (0, 0, 0, -w % k, 0, -h % k))
        return x.unflatten(2, (-1, k)).unflatten(1, (-1, k)).transpose(2, 3).reshape(n, -1, k * k * c)


class NVILAProjector(nn.Module):
    """The map from the patches of a tile `[n, s, s, c]` to its tokens in the width of the decoder, `[n, g * g, d]`."""

    def __init__(self, config: NVILAVisionConfig):
        super().__init__()
        k, c, d = config.downsample, config.mm_hidden_size, config.out_hidden_size
        narrowing: list[nn.Module] = []
        if k == 3:
            narrowing = [nn.Linear(k * k * c, k * c), nn.GELU(), nn.LayerNorm(k * c)]
        width = k * c if k == 3 else k * k * c
        # the places in this list are the names of the parameters in checkpoints
        self.layers = nn.Sequential(
            Downsample(k), nn.LayerNorm(k * k * c), *narrowing, nn.Linear(width, d), nn.GELU(), nn.Linear(d, d)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class NVILAVisionModel(InstalledCode, PreTrainedModel):
    """Tower and projector."""

    config: NVILAVisionConfig
    config_class = NVILAVisionConfig
    base_model_prefix = "visual"
    main_input_name = "pixel_values"
    input_modalities = ("image", "video")
    supports_gradient_checkpointing = True
    _no_split_modules = ["SiglipVisionEmbeddings", "SiglipEncoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: NVILAVisionConfig):
        super().__init__(config)
        self.vision_tower = SiglipVisionModel._from_config(config.tower_config)
        self.mm_projector = NVILAProjector(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_tower.get_input_embeddings()

    def forward(
        self, pixel_values: torch.Tensor, grid_thw: torch.Tensor, kind: str = "image"
    ) -> BaseModelOutputWithPooling:
        """
        Encodes images or videos: the tower over their tiles, then the projector.

        Args:
            pixel_values (`torch.Tensor` of shape `[tiles, 3, S, S]`): Tiles of the images or frames of the videos.
            grid_thw (`torch.LongTensor` of shape `[media, 3]`): Tokens of every image, or of every video and pooling.
            kind (`str`, *optional*, defaults to `"image"`): `"image"` or `"video"`.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` `[tiles, s, s, c]` of the tower, and in `pooler_output`
            for every row of the grids its tokens `[n, d]`.
        """
        features = self.tile_features(pixel_values)
        encode = self.image_tokens if kind == "image" else self.video_tokens
        return BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=encode(features, grid_thw.tolist())
        )

    def tile_features(self, tiles: torch.Tensor) -> torch.Tensor:
        """Returns the patches of tiles `[n, 3, S, S]` after the layers of the tower that count, `[n, s, s, c]`."""
        tower, features = self.vision_tower, []
        for chunk in tiles.split(TILES_AT_ONCE):
            hidden_states = tower.embeddings(chunk)
            for layer in islice(tower.encoder.layers, self.config.tower_layers):
                hidden_states = layer(hidden_states, None)
            features.append(hidden_states)
        return torch.cat(features).unflatten(1, (self.config.tile_patches,) * 2)

    def image_tokens(self, features: torch.Tensor, grids: list[list[int]]) -> tuple[torch.Tensor, ...]:
        """Returns tokens `[n, d]` of every image from the patches of its tiles `[tiles, s, s, c]`."""
        config = self.config
        blocks = [(height // config.tile_tokens, width // config.tile_tokens) for _, height, width in grids]
        if config.image_aspect_ratio != "dynamic_s2":
            tokens = self.mm_projector(features)
            return tuple(own.flatten(0, 1) for own in tokens.split([tiles_of(config, *size) for size in blocks]))
        images = features.split([tiles_of(config, *size) for size in blocks])
        tokens = self.mm_projector(torch.cat([join_scales(config, own, *size) for own, size in zip(images, blocks)]))
        tokens = tokens.unflatten(1, (config.tile_tokens, config.tile_tokens))
        images = tokens.split([rows * columns for rows, columns in blocks])
        return tuple(merge_tiles(own, *size).flatten(0, 1) for own, size in zip(images, blocks))

    def video_tokens(self, features: torch.Tensor, grids: list[list[int]]) -> tuple[torch.Tensor, ...]:
        """Returns tokens `[n, d]` of every video and pooling from the patches of its frames `[frames, s, s, c]`."""
        config, pools = self.config, self.config.pool_sizes
        frames = self.mm_projector(features.repeat(1, 1, 1, config.n_scales))
        frames = frames.unflatten(1, (config.tile_tokens, config.tile_tokens))
        videos = frames.split([grid[0] * pools[0][0] for grid in grids[:: len(pools)]])
        return tuple(pool(video, sizes).flatten(0, 2) for video in videos for sizes in pools)


def merge_tiles(tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Joins row-major tiles `[rows * columns, h, w, c]` as one map `[rows * h, columns * w, c]`."""
    return tiles.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def split_tiles(image: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Undoes [`merge_tiles`]."""
    return image.unflatten(1, (columns, -1)).unflatten(0, (rows, -1)).transpose(1, 2).flatten(0, 1)


def resize_area(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Returns a map `[h, w, c]` in another size, every cell the mean of the cells that it covers; in fp32 at least."""
    if image.shape[:2] == size:
        return image
    exact = image.to(torch.promote_types(image.dtype, torch.float32))
    resized = nn.functional.interpolate(exact.permute(2, 0, 1)[None], size=size, mode="area")
    return resized[0].permute(1, 2, 0).to(image.dtype)


def join_scales(config: NVILAVisionConfig, tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """
    Returns tiles of all scales `[tiles, s, s, c]` as those of the last, `[rows * columns, s, s, scales * c]`: every
    scale is resized to the last, and all are joined on channels, small to large. An image of one tile is every scale.
    """
    if len(tiles) == 1:
        return tiles.repeat(1, 1, 1, config.n_scales)
    *smaller, last = tiles.split([*scale_tiles(config), rows * columns])
    last = merge_tiles(last, rows, columns)
    edges = [int(len(own) ** 0.5) for own in smaller]
    maps = [resize_area(merge_tiles(own, edge, edge), last.shape[:2]) for own, edge in zip(smaller, edges)]
    return split_tiles(torch.cat([*maps, last], dim=-1), rows, columns)


def pool(x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Returns the means over groups of frames, rows and columns of `[t, h, w, d]`."""
    for axis, size in enumerate(sizes):
        x = x.unflatten(axis, (-1, size)).mean(axis + 1)
    return x


def scale_tiles(config: NVILAVisionConfig) -> list[int]:
    """Returns the number of tiles of every scale but the last."""
    return [(edge // config.tower_config.image_size) ** 2 for edge in config.s2_scales[:-1]]


def tiles_of(config: NVILAVisionConfig, rows: int, columns: int) -> int:
    """Returns the number of tiles of an image whose grid is that many tiles high and wide."""
    if rows * columns == 1:
        return 1
    return rows * columns + (sum(scale_tiles(config)) if config.image_aspect_ratio == "dynamic_s2" else 1)


class NVILAVision(VisionSide):
    """
    The vision side of NVILA. An image of `"dynamic_s2"` and a single tile are one run of placeholders; of several
    `"dynamic"` tiles each is a run, the thumbnail last; of a video every (pooled) frame. Positions are those of text.
    """

    tower_class = NVILAVisionModel

    @can_return_tuple
    def features(
        self, kind: str, pixels: torch.Tensor, grids: torch.Tensor | None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        if not torch.compiler.is_compiling():
            self.check_pixels(kind, pixels, grids)
        return self.visual(pixels, grids, kind)

    def runs(self, kind: str, grids: torch.Tensor) -> list[list[int]]:
        self._check_grids(kind, grids)
        tile = self.config.vision_config.tile_tokens**2
        return [
            [tile] * self._tiles(height, width)
            if kind == "image" and self._in_tiles
            else [height * width] * frames  # one, of an image
            for frames, height, width in grids.tolist()
        ]

    def coordinates(self, kind: str, grids: torch.Tensor) -> list[torch.Tensor]:
        g = self.config.vision_config.tile_tokens
        media = []
        for frames, height, width in grids.tolist():
            cells = grid_coordinates(frames, height, width, grids.device)
            if kind == "image" and self._in_tiles and height * width > g * g:
                by_tile = split_tiles(cells.view(height, width, 3), height // g, width // g).reshape(-1, 3)
                thumbnail = grid_coordinates(1, g, g, grids.device)
                thumbnail[:, 0] = 1
                cells = torch.cat([by_tile, thumbnail])
            media.append(cells)
        return media

    def positions(
        self, input_ids: torch.Tensor, types: torch.Tensor, attention_mask: torch.Tensor | None,
        grids: dict[str, torch.Tensor | None], second_per_grid_ts: torch.Tensor | Sequence[float] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        return text_positions(input_ids, attention_mask)

    @property
    def _in_tiles(self) -> bool:
        """Whether the tokens of an image come tile by tile."""
        return self.config.vision_config.image_aspect_ratio == "dynamic"

    def _tiles(self, height: int, width: int) -> int:
        vision: Any = self.config.vision_config
        return tiles_of(vision, height // vision.tile_tokens, width // vision.tile_tokens)

    def _check_grids(self, kind: str, grids: torch.Tensor) -> None:
        name, vision = f"{kind}_grid_thw", self.config.vision_config
        g, pools = vision.tile_tokens, vision.pool_sizes
        expect(name, grids, (None, 3), "[media, 3]")
        rows = grids.tolist()
        if kind == "image":
            one = vision.image_aspect_ratio == "resize"
            for frames, height, width in rows:
                if (
                    frames != 1
                    or height < 1
                    or width < 1
                    or height % g
                    or width % g
                    or (one and height * width > g * g)
                ):
                    raise ValueError(
                        f"{name} has the entry {[frames, height, width]}; it must be 1, and height and width in "
                        f"tokens, {f'{g} each' if one else f'positive multiples of {g}'}: pass what the processor "
                        "returned"
                    )
            return
        if len(rows) % len(pools):
            raise ValueError(f"{name} has {len(rows)} rows; it must have one per video and each of pool_sizes={pools}")
        for row, (frames, height, width) in enumerate(rows):
            sizes = pools[row % len(pools)]
            seen = rows[row - row % len(pools)][0] * pools[0][0]
            expected = [seen // sizes[0], g // sizes[1], g // sizes[2]]
            if frames < 1 or seen % sizes[0] or [frames, height, width] != expected:
                raise ValueError(
                    f"{name} has the entry {[frames, height, width]}; for a video of {seen} frames of {g} x {g} "
                    f"tokens and the pooling {sizes} it must be {expected}, without remainder: pass what the "
                    "processor returned"
                )

    def pixels(self, kind: str, grids: torch.Tensor) -> tuple[tuple[int, ...], str]:
        vision, rows = self.config.vision_config, grids.tolist()
        edge, channels = vision.tower_config.image_size, vision.tower_config.num_channels
        if kind == "image":
            tiles, what = sum(self._tiles(height, width) for _, height, width in rows), "tiles"
        else:
            first, pools = rows[:: len(vision.pool_sizes)], vision.pool_sizes
            tiles, what = sum(frames for frames, *_ in first) * pools[0][0], "frames"
        return (tiles, channels, edge, edge), f"[{what}, channels, height, width]"
