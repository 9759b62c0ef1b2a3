"""The images and videos of a batch: what their inputs are called, and all of them as values."""

from typing import Any, NamedTuple

import torch


KINDS = {"image": 1, "video": 2}  # values of mm_token_type_ids
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
GRIDS = {kind: f"{kind}_grid_thw" for kind in KINDS}


class Medium(NamedTuple):
    """
    The images, or the videos, of a batch.

    Args:
        pixels (`torch.Tensor`, *optional*), grids (`torch.LongTensor` of shape `[media, 3]`, *optional*): As the
            processor returns them.
        encoded (`ModelOutput`, *optional*): What the vision side returned for them before.
    """

    pixels: torch.Tensor | None = None
    grids: torch.Tensor | None = None
    encoded: Any = None

    @property
    def is_given(self) -> bool:
        return self.pixels is not None or self.encoded is not None


def read_media(
    pixel_values: torch.Tensor | None = None, pixel_values_videos: torch.Tensor | None = None,
    image_grid_thw: torch.Tensor | None = None, video_grid_thw: torch.Tensor | None = None,
    mm_encoder_outputs: dict[str, Any] | None = None,
) -> dict[str, Medium]:  # fmt: skip
    """Returns images and videos by their names; arguments as [`LinMUModel`] takes them."""
    encoded = mm_encoder_outputs or {}
    return {
        "image": Medium(pixel_values, image_grid_thw, encoded.get("image")),
        "video": Medium(pixel_values_videos, video_grid_thw, encoded.get("video")),
    }
