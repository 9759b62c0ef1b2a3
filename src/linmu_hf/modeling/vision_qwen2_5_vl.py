"""The Qwen2.5-VL vision side: tower, placeholders, M-RoPE positions (Transformers' own) and the merged token grid."""

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLModel,
)

from .inputs import check_pixels


class Qwen2_5_VLVision:
    """The vision methods of [`LinMUModel`], taken over from Transformers' model as they are."""

    tower_class = Qwen2_5_VisionTransformerPretrainedModel

    get_rope_index = Qwen2_5_VLModel.get_rope_index
    get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids
    get_placeholder_mask = Qwen2_5_VLModel.get_placeholder_mask

    def get_image_features(self, pixel_values, image_grid_thw=None, **kwargs):
        if not torch.compiler.is_compiling():
            check_pixels("pixel_values", pixel_values, "image_grid_thw", image_grid_thw, self.config.vision_config)
        return Qwen2_5_VLModel.get_image_features(self, pixel_values, image_grid_thw, **kwargs)

    def get_video_features(self, pixel_values_videos, video_grid_thw=None, **kwargs):
        if not torch.compiler.is_compiling():
            vision = self.config.vision_config
            check_pixels("pixel_values_videos", pixel_values_videos, "video_grid_thw", video_grid_thw, vision)
        return Qwen2_5_VLModel.get_video_features(self, pixel_values_videos, video_grid_thw, **kwargs)


def merged_grid_layout(
    mm_token_type_ids, image_grid_thw, video_grid_thw, merge_size: int, max_span_frames: int | None = None
) -> torch.Tensor:
    """
    Span and (T, H, W) coordinate of every token after the 2x2 merge.

    Args:
        mm_token_type_ids (`torch.Tensor` of shape `[b, t]`): 0 text, 1 image, 2 video.
        image_grid_thw, video_grid_thw (`torch.LongTensor` of shape `[media, 3]`, *optional*): Patch grids, in
            the order in which the media occur in the batch.
        merge_size (`int`): Patches per token along height and width.
        max_span_frames (`int`, *optional*): Longest span of a video in merged frames; longer videos are several spans.

    Returns:
        `torch.LongTensor` of shape `[b, t, 4]`, -1 for text and padding.

    Raises:
        `ValueError`: The placeholders do not match the grids.
    """
    layout = torch.full((*mm_token_type_ids.shape, 4), -1, dtype=torch.long, device=mm_token_type_ids.device)
    first_span = 0
    for kind, name, grids in ((1, "image", image_grid_thw), (2, "video", video_grid_thw)):
        places = mm_token_type_ids == kind
        n_tokens = int(places.sum())
        grids = layout.new_zeros(0, 3) if grids is None else grids.to(layout.device).long()
        grids = torch.stack([grids[:, 0], grids[:, 1] // merge_size, grids[:, 2] // merge_size], dim=1)
        sizes = grids.prod(1)
        if n_tokens != int(sizes.sum()):
            raise ValueError(
                f"the prompt has {n_tokens} {name} tokens but {name}_grid_thw describes {int(sizes.sum())} "
                f"({len(grids)} {name}s); pass the grids that the processor returned with these input_ids"
            )
        if not n_tokens:
            continue
        medium = torch.arange(len(grids), device=layout.device).repeat_interleave(sizes)
        rank = torch.arange(n_tokens, device=layout.device) - (sizes.cumsum(0) - sizes)[medium]
        _, height, width = grids[medium].unbind(1)
        frame = rank // (height * width)
        part = torch.zeros_like(frame) if max_span_frames is None else frame // max_span_frames
        frame = frame if max_span_frames is None else frame % max_span_frames
        span = (medium * (part.max() + 1) + part).unique(return_inverse=True)[1] + first_span
        layout[places] = torch.stack([span, frame, rank // width % height, rank % width], dim=1)
        first_span = int(span.max()) + 1
    return layout
