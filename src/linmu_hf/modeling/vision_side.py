"""What the model asks of its vision side: one set of methods, whichever tower and projector do the work."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.utils import ModelOutput

from .checks import check_values, expect
from .configuration_linmu import LinMUConfig
from .layout.media import KINDS, PIXELS
from .layout.token_layout import span_layout


class VisionSide:
    """
    A view of a model's vision tower together with what its placeholders and grids mean. It holds no weights.

    Args:
        config (`LinMUConfig`): Of the model.
        visual (`nn.Module`): The tower, of `tower_class`.
    """

    tower_class: ClassVar[Any]
    all_cells: ClassVar[bool] = True  # whether every placeholder is a cell of a grid
    argument_names: ClassVar[dict[str, str]] = {}  # how the family's processor calls an argument, and its name here

    def __init__(self, config: LinMUConfig, visual: nn.Module):
        self.config, self.visual = config, visual

    def features(self, kind: str, pixels: torch.Tensor, grids: torch.Tensor | None, **kwargs: Any) -> ModelOutput:
        """
        Encodes the images or videos of a batch.

        Args:
            kind (`str`): `"image"` or `"video"`.
            pixels (`torch.Tensor`), grids (`torch.LongTensor` of shape `[media, 3]`): As the processor returns them.

        Returns:
            `ModelOutput`: Its `pooler_output` holds for every row of the grids `[n, d]`, in the order of its tokens.

        Raises:
            `ValueError`, `TypeError`: Pixels are not valid, or do not fit the grids.
        """
        raise NotImplementedError

    def runs(self, kind: str, grids: torch.Tensor) -> list[list[int]]:
        """
        Returns the lengths of the runs of placeholders for each row of the grids `[media, 3]`.

        Raises:
            `ValueError`, `TypeError`: These are not valid grids.
        """
        raise NotImplementedError

    def coordinates(self, kind: str, grids: torch.Tensor) -> list[torch.Tensor]:
        """
        Returns for every row of the grids the (T, H, W) coordinate of each of its tokens, `[n, 3]`: -1 for one that
        takes a feature but is not a cell of the grid, such as a learned line break; it is scanned as text is.
        """
        raise NotImplementedError

    def grids(self, sizes: torch.Tensor) -> torch.Tensor:
        """Returns the grids of media of so many tokens, frames, rows and columns, `[media, 3]`."""
        return sizes

    def pixels(self, kind: str, grids: torch.Tensor) -> tuple[tuple[int, ...], str]:
        """Returns the shape of the pixels that belong to these grids, and what its axes are."""
        raise NotImplementedError

    def check_pixels(self, kind: str, pixels: torch.Tensor, grids: torch.Tensor | None) -> None:
        """Raises a `ValueError` or `TypeError` if grids are not valid, or pixels do not fit them."""
        name = PIXELS[kind]
        if grids is None:
            raise ValueError(f"{name} came without {kind}_grid_thw; pass both as the processor returned them")
        self.runs(kind, grids)
        shape, axes = self.pixels(kind, grids)
        expect(name, pixels, shape, f"{axes}, as {kind}_grid_thw says", True)
        check_values(name, pixels)

    def positions(
        self, input_ids: torch.Tensor, types: torch.Tensor, attention_mask: torch.Tensor | None,
        grids: dict[str, torch.Tensor | None], second_per_grid_ts: torch.Tensor | Sequence[float] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Returns rotary positions `[3, b, t]` of a prompt with images or videos; no row is padding alone."""
        raise NotImplementedError

    def layout(self, types: torch.Tensor, grids: dict[str, torch.Tensor | None]) -> torch.Tensor:
        """
        Returns span and coordinate of every token.

        Args:
            types (`torch.Tensor` of shape `[b, t]`): 0 text and padding, 1 image, 2 video.
            grids (`dict[str, torch.LongTensor]`): For `"image"` and `"video"` the grids `[media, 3]`, or `None`.
        """
        media = {
            code: [] if grids.get(kind) is None else self.coordinates(kind, grids[kind].to(types.device))
            for kind, code in KINDS.items()
        }
        return span_layout(types, media, self.config.text_config.max_span_frames)


VISION_SIDES: dict[str, type[VisionSide]] = {}  # by model type of the vision configuration; linmu_hf.families fills it


def grid_coordinates(frames: int, height: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """Returns (T, H, W) of every cell of a grid, frame by frame and row by row, `[n, 3]`."""
    axes = (torch.arange(size, device=device) for size in (frames, height, width))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
