"""NVILA's image processor: images to tiles and grids, with PIL, as the released checkpoints were trained."""

from typing import Any, ClassVar

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import normalize, rescale, to_pil_image
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ChannelDimension,
    PILImageResampling,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs

from ...modeling.remote_code import RemoteCode
from .tiling import Mosaic, cut, dynamic_mosaics, s2_mosaics


class NVILAImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    r"""
    image_aspect_ratio (`str`, *optional*, defaults to `"dynamic_s2"`):
        How a sample's only image is tiled: `"dynamic_s2"` (at every scale), `"dynamic"` (once, with a thumbnail) or
        `"resize"` (one tile). Of several images, each is always one tile.
    s2_scales (`list[int]`, *optional*, defaults to `[448, 896, 1344]`):
        Scales of `"dynamic_s2"` in pixels, the first one the size of a tile.
    min_tiles (`int`, *optional*, defaults to 1):
        Fewest tiles of `"dynamic"`.
    max_tiles (`int`, *optional*, defaults to 12):
        Most tiles, not counting thumbnail and smaller scales.
    tile_tokens (`int`, *optional*, defaults to 16):
        Tokens per edge of a tile after the projector.
    """

    image_aspect_ratio: str
    s2_scales: list[int] | None
    min_tiles: int
    max_tiles: int
    tile_tokens: int


class Tiles(RemoteCode):
    """A mixin for processors that make square tiles of pictures."""

    valid_kwargs: Any
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    size = {"height": 448, "width": 448}
    do_resize = True
    do_rescale = True
    do_normalize = True
    tile_tokens = 16

    def settings(self, **kwargs: Any) -> dict[str, Any]:
        """Returns what each option is: as passed, or else as the processor has it."""
        return {name: kwargs.get(name, getattr(self, name, None)) for name in self.valid_kwargs.__annotations__}


class NVILAImageProcessor(Tiles, PilBackend):
    """
    An image processor that cuts images into tiles as NVILA does.

    A list of images means one image per sample; a list of lists gives each sample's images. A sample's only image
    is tiled by `image_aspect_ratio`; the images of a sample that has several are one tile each.

    Returns `pixel_values` of shape [tiles, 3, size, size], all images' tiles in order (`"dynamic_s2"`: scale by scale,
    small to large; `"dynamic"`: the thumbnail last), and `image_grid_thw` of shape [images, 3]: the grid of tokens of
    each image, which for `"dynamic"` leaves out the thumbnail's. Transparency is dropped, not blended.
    """

    remote_classes: ClassVar[dict[str, str]] = {"AutoImageProcessor": "NVILAImageProcessor"}
    do_convert_rgb = True
    image_aspect_ratio = "dynamic_s2"
    s2_scales = [448, 896, 1344]
    min_tiles = 1
    max_tiles = 12
    valid_kwargs = NVILAImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Preprocesses one image, a list of images, or a list with a list of images per sample."""
        if isinstance(images, (list, tuple)) and any(isinstance(sample, (list, tuple)) for sample in images):
            counts = [len(sample) if isinstance(sample, (list, tuple)) else 1 for sample in images]
            images = [
                image for sample in images for image in (sample if isinstance(sample, (list, tuple)) else [sample])
            ]
            alone = [count == 1 for count in counts for _ in range(count)]
        else:
            alone = None
        return super().preprocess(images, alone, **kwargs)

    def process_image(self, image: Any, input_data_format: Any = None, **kwargs: Any) -> Image.Image:
        """Returns one image of any kind as an RGB picture of PIL."""
        return as_rgb(image, input_data_format)

    def plan(self, width: int, height: int, *, alone: bool = True, **kwargs: Any) -> tuple[list[Mosaic], list[int]]:
        """
        Returns into which mosaics (columns, rows) of tiles an image is cut, and the grid of its tokens.

        Args:
            width, height (`int`): Pixels of the image.
            alone (`bool`, *optional*, defaults to `True`): Whether it is its sample's only image.
        """
        settings = self.settings(**kwargs)
        size, tile_tokens = settings["size"]["height"], settings["tile_tokens"]
        tiling = settings["image_aspect_ratio"] if alone else "resize"
        if tiling == "resize":
            mosaics = [(1, 1)]
        elif tiling == "dynamic":
            limits = {"min_tiles": settings["min_tiles"], "max_tiles": settings["max_tiles"]}
            mosaics = dynamic_mosaics(width, height, tile_size=size, **limits)
        elif tiling == "dynamic_s2":
            limits = {"scales": settings["s2_scales"], "max_tiles": settings["max_tiles"]}
            mosaics = s2_mosaics(width, height, tile_size=size, **limits)
        else:
            raise ValueError(f'image_aspect_ratio={tiling!r} must be "dynamic_s2", "dynamic" or "resize"')
        columns, rows = mosaics[-1] if tiling == "dynamic_s2" else mosaics[0]
        return mosaics, [1, rows * tile_tokens, columns * tile_tokens]

    def _preprocess(self, images: list[Image.Image], alone: list[bool] | None = None, **kwargs: Any) -> BatchFeature:
        tiles, grids = [], []
        for i, image in enumerate(images):
            mosaics, grid = self.plan(*image.size, alone=alone is None or alone[i], **kwargs)
            grids.append(grid)
            for mosaic in mosaics:
                tiles += cut(image, mosaic, tile_size=kwargs["size"]["height"], resample=kwargs["resample"])
        return BatchFeature(
            {"pixel_values": to_pixels(tiles, **kwargs), "image_grid_thw": np.array(grids, dtype=np.int64)},
            tensor_type=kwargs.get("return_tensors"),
        )


def as_rgb(image: Any, input_data_format: Any = None) -> Image.Image:
    """Returns an image, or an array or tensor [h, w, c] or [c, h, w], as an RGB picture, transparency dropped."""
    if not isinstance(image, Image.Image):
        image = np.asarray(image)
        layout = input_data_format or infer_channel_dimension_format(image, num_channels=(1, 3, 4))
        image = to_pil_image(image, input_data_format=ChannelDimension(layout))
    return image.convert("RGB")


def to_pixels(
    tiles: list[Image.Image],
    *,
    do_rescale: bool,
    rescale_factor: float,
    do_normalize: bool,
    image_mean: Any,
    image_std: Any,
    **kwargs: Any,
) -> np.ndarray:
    """Turns RGB tiles of one size into float32 pixels of shape [tiles, 3, size, size], rescaled and normalized."""
    width, height = tiles[0].size
    pixels = np.empty((len(tiles), 3, height, width), dtype=np.float32)
    for i, tile in enumerate(tiles):
        array = np.asarray(tile).transpose(2, 0, 1)
        if do_rescale:
            array = rescale(array, rescale_factor)
        if do_normalize:
            array = normalize(array, image_mean, image_std, input_data_format=ChannelDimension.FIRST)
        pixels[i] = array
    return pixels
