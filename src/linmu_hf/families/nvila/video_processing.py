"""NVILA's video processor: a fixed number of frames, one tile each, and the grids of their pooled tokens."""

from typing import Any, ClassVar

import numpy as np
import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ChannelDimension
from transformers.processing_utils import VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor

from .image_processing import Tiles, as_rgb, to_pixels
from .tiling import pooled_grids


class NVILAVideoProcessorKwargs(VideosKwargs, total=False):  # type: ignore[call-arg]
    r"""
    pool_sizes (`list[list[int]]`, *optional*, defaults to `[[1, 1, 1]]`):
        Frames, rows and columns of tokens that are averaged into one; each entry gives the video's tokens once.
    tile_tokens (`int`, *optional*, defaults to 16):
        Tokens per edge of a frame after the projector, before pooling.
    """

    pool_sizes: list[list[int]]
    tile_tokens: int


class NVILAVideoProcessor(Tiles, BaseVideoProcessor):
    """
    A video processor that samples frames evenly, the first and the last one included, and resizes each to one tile.

    `num_frames` are sampled from every video, with repeats from one that has fewer; `fps` is not used. With
    `do_sample_frames=False` a video keeps the frames it has.

    Returns `pixel_values_videos` of shape [frames, 3, size, size], all videos' frames in order, and `video_grid_thw`
    of shape [videos * len(pool_sizes), 3]: the grid of tokens of each video and pool size.
    """

    remote_classes: ClassVar[dict[str, str]] = {"AutoVideoProcessor": "NVILAVideoProcessor"}
    do_sample_frames = True
    num_frames = 8
    pool_sizes = [[1, 1, 1]]
    valid_kwargs = NVILAVideoProcessorKwargs
    model_input_names = ["pixel_values_videos", "video_grid_thw"]

    # Frames on disk are read with PIL: Transformers' own video processors read them with torchvision.
    fetch_images = BaseImageProcessor.fetch_images

    def process_image(self, image: Any, input_data_format: Any = None, **kwargs: Any) -> torch.Tensor:
        """Returns one frame of any kind as a tensor [3, h, w]."""
        return torch.from_numpy(np.array(as_rgb(image, input_data_format))).permute(2, 0, 1)

    def sample_frames(self, metadata: Any, num_frames: int | None = None, **kwargs: Any) -> np.ndarray:
        """Returns the indices of the frames to keep: `num_frames` evenly from the first to the last."""
        count = num_frames or self.num_frames
        return np.round(np.linspace(0, metadata.total_num_frames - 1, count)).astype(int)

    def _preprocess(self, videos: list[Any], **kwargs: Any) -> BatchFeature:
        grids = [
            grid for video in videos for grid in pooled_grids(len(video), kwargs["tile_tokens"], kwargs["pool_sizes"])
        ]
        frames = [as_rgb(frame, ChannelDimension.FIRST) for video in videos for frame in video]
        edge = kwargs["size"]["height"]
        tiles = [frame.resize((edge, edge), resample=kwargs["resample"]) for frame in frames]
        return BatchFeature(
            {"pixel_values_videos": to_pixels(tiles, **kwargs), "video_grid_thw": np.array(grids, dtype=np.int64)},
            tensor_type=kwargs.get("return_tensors"),
        )
