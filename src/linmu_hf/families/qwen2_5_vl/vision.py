"""The Qwen2.5-VL vision side: Transformers' own tower and M-RoPE positions; grids count patches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLModel,
)
from transformers.utils import ModelOutput

from ...modeling.checks import expect
from ...modeling.vision_side import VisionSide, grid_coordinates


class Qwen2_5_VLVision(VisionSide):
    """The vision side of Qwen2.5-VL. Patches are merged into tokens; a medium is one run of placeholders."""

    tower_class = Qwen2_5_VisionTransformerPretrainedModel

    @property
    def upstream(self) -> Qwen2_5_VLModel:
        """Returns Transformers' own model around our tower and configuration, without a decoder."""
        model = Qwen2_5_VLModel.__new__(Qwen2_5_VLModel)
        nn.Module.__init__(model)
        model.config, model.visual = self.config, self.visual
        return model

    @property
    def merge(self) -> int:
        return self.config.vision_config.spatial_merge_size

    def features(self, kind: str, pixels: torch.Tensor, grids: torch.Tensor | None, **kwargs: Any) -> ModelOutput:
        if not torch.compiler.is_compiling():
            self.check_pixels(kind, pixels, grids)
        model = self.upstream
        return (model.get_image_features if kind == "image" else model.get_video_features)(pixels, grids, **kwargs)

    def runs(self, kind: str, grids: torch.Tensor) -> list[list[int]]:
        name, merge = f"{kind}_grid_thw", self.merge
        expect(name, grids, (None, 3), "[media, 3]")
        sizes = grids.tolist()
        for frames, height, width in sizes:
            if frames < 1 or height < 1 or width < 1 or height % merge or width % merge:
                raise ValueError(
                    f"{name} has the entry {[frames, height, width]}; frames, height and width in patches must be "
                    f"positive, height and width multiples of {merge}: pass what the processor returned"
                )
        return [[frames * height * width // merge**2] for frames, height, width in sizes]

    def coordinates(self, kind: str, grids: torch.Tensor) -> list[torch.Tensor]:
        return [grid_coordinates(t, h // self.merge, w // self.merge, grids.device) for t, h, w in grids.tolist()]

    def positions(
        self, input_ids: torch.Tensor, types: torch.Tensor, attention_mask: torch.Tensor | None,
        grids: dict[str, torch.Tensor | None], second_per_grid_ts: torch.Tensor | Sequence[float] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        return self.upstream.get_rope_index(
            input_ids,
            mm_token_type_ids=types,
            image_grid_thw=grids["image"],
            video_grid_thw=grids["video"],
            second_per_grid_ts=second_per_grid_ts,
            attention_mask=attention_mask,
        )[0]

    def grids(self, sizes: torch.Tensor) -> torch.Tensor:
        return sizes * sizes.new_tensor([1, self.merge, self.merge])

    def pixels(self, kind: str, grids: torch.Tensor) -> tuple[tuple[int, ...], str]:
        vision = self.config.vision_config
        channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
        return (int(grids.prod(1).sum()), channels * vision.temporal_patch_size * vision.patch_size**2), (
            "[patches, channels * frames * height * width of a patch]"
        )
