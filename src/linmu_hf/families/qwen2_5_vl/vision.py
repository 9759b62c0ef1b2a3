"""The Qwen2.5-VL vision side: Transformers' own tower and M-RoPE positions; grids count patches."""

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLModel,
)

from ...modeling.checks import check_values, expect
from ...modeling.vision_side import VisionSide, grid_coordinates


class Qwen2_5_VLVision(VisionSide):
    """Patches are merged into tokens; a medium is one run of placeholders."""

    tower_class = Qwen2_5_VisionTransformerPretrainedModel

    get_rope_index = Qwen2_5_VLModel.get_rope_index
    get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids

    @property
    def merge(self) -> int:
        return self.config.vision_config.spatial_merge_size

    def features(self, kind, pixels, grids, **kwargs):
        if not torch.compiler.is_compiling():
            self._check_pixels(kind, pixels, grids)
        encode = Qwen2_5_VLModel.get_image_features if kind == "image" else Qwen2_5_VLModel.get_video_features
        return encode(self, pixels, grids, **kwargs)

    def runs(self, kind, grids):
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

    def coordinates(self, kind, grids):
        return [grid_coordinates(t, h // self.merge, w // self.merge, grids.device) for t, h, w in grids.tolist()]

    def positions(self, input_ids, types, attention_mask, grids, second_per_grid_ts=None):
        return self.get_rope_index(
            input_ids,
            mm_token_type_ids=types,
            image_grid_thw=grids["image"],
            video_grid_thw=grids["video"],
            second_per_grid_ts=second_per_grid_ts,
            attention_mask=attention_mask,
        )[0]

    def _check_pixels(self, kind, pixels, grids):
        """Pixels are `[patches, channels * frames * height * width]` of a patch."""
        name = "pixel_values" if kind == "image" else "pixel_values_videos"
        if grids is None:
            raise ValueError(f"{name} came without {kind}_grid_thw; pass both as the processor returned them")
        self.runs(kind, grids)  # refuses what are no grids
        vision, patches = self.config.vision_config, int(grids.prod(1).sum())
        channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
        width = channels * vision.temporal_patch_size * vision.patch_size**2
        expect(name, pixels, (patches, width), f"[patches, pixels], as {kind}_grid_thw says", True)
        check_values(name, pixels)
