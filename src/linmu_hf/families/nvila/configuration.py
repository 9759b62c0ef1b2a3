"""Configuration of NVILA's vision side: a SigLIP tower over tiles, a downsampling projector, temporal pooling."""

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.siglip import SiglipVisionConfig


PROJECTORS = {"mlp_downsample": 2, "mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3}
IMAGE_MODES = ("dynamic_s2", "dynamic", "resize")
VIDEO_ENCODERS = ("basic", "tsp")


@strict
class NVILAVisionConfig(PreTrainedConfig):
    r"""
    The vision side of NVILA.

    Args:
        tower_config (`SiglipVisionConfig` or `dict`, *optional*):
            The SigLIP tower; its `image_size` is the edge of a tile in pixels. The head is never built.
        projector_type (`str`, *optional*, defaults to `"mlp_downsample_2x2_fix"`):
            `"mlp_downsample_2x2_fix"` (also `"mlp_downsample"`) or `"mlp_downsample_3x3_fix"`: the patches that become
            one token.
        feature_layer (`int`, *optional*, defaults to -2):
            Index into the hidden states of the tower, whose first is the embedding.
        image_aspect_ratio (`str`, *optional*, defaults to `"resize"`):
            How a single image becomes tiles: `"dynamic_s2"` (several scales, joined on channels), `"dynamic"` (tiles
            and a thumbnail) or `"resize"` (one tile).
        s2_scales (`list[int]` or `str`, *optional*):
            For `"dynamic_s2"`: edges of the scales in pixels, the first that of a tile, small to large.
        min_tiles, max_tiles (`int`, *optional*, defaults to 1 and 12):
            Fewest and most tiles of an image (for `"dynamic_s2"`: of its last scale).
        video_encoder (`str`, *optional*, defaults to `"basic"`):
            `"basic"`, or `"tsp"` for means over groups of frames, rows and columns of tokens.
        pool_sizes (`list[list[int]]`, *optional*, defaults to `[[1, 1, 1]]`):
            For `"tsp"`: these groups (frames, rows, columns); with several, a video is read once for each.
        out_hidden_size (`int`, *optional*, defaults to 3584):
            Width of the decoder.
    """

    model_type = "nvila_vision"
    base_config_key = "vision_config"
    sub_configs: ClassVar[dict[str, Any]] = {"tower_config": SiglipVisionConfig}

    tower_config: dict | PreTrainedConfig | None = None
    projector_type: str = "mlp_downsample_2x2_fix"
    feature_layer: int = -2
    image_aspect_ratio: str = "resize"
    s2_scales: list[int] | tuple[int, ...] | str | None = None
    min_tiles: int = 1
    max_tiles: int = 12
    video_encoder: str = "basic"
    pool_sizes: list | tuple = ((1, 1, 1),)
    out_hidden_size: int = 3584

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.tower_config, PreTrainedConfig):
            self.tower_config = SiglipVisionConfig(**(self.tower_config or {}))
        self.tower_config.vision_use_head = False
        if self.projector_type == "mlp_downsample":
            self.projector_type = "mlp_downsample_2x2_fix"
        if isinstance(self.s2_scales, str):
            self.s2_scales = [int(edge) for edge in self.s2_scales.split(",")]
        elif self.s2_scales is not None:
            self.s2_scales = list(self.s2_scales)
        self.pool_sizes = [list(sizes) for sizes in self.pool_sizes]
        self._check_tower()
        self._check_images()
        self._check_videos()
        super().__post_init__(**kwargs)

    @classmethod
    def default_config_fields(cls) -> dict[str, Any]:
        """Returns fields with defaults; naming the sub-configuration keeps its unset fields out of `config.json`."""
        return {**super().default_config_fields(), "tower_config": {}}

    def _check_tower(self) -> None:
        edge, patch = self.tower_config.image_size, self.tower_config.patch_size
        if not isinstance(edge, int) or not isinstance(patch, int) or edge % patch:
            raise ValueError(f"tower_config: image_size={edge} must be one number, a multiple of patch_size={patch}")
        if self.projector_type not in PROJECTORS:
            raise ValueError(f"projector_type={self.projector_type!r} is unknown; choose one of {list(PROJECTORS)}")
        layers = self.tower_config.num_hidden_layers
        if not -layers - 1 <= self.feature_layer <= layers:
            raise ValueError(
                f"feature_layer={self.feature_layer} is none of the {layers + 1} hidden states of the tower; choose "
                f"one from {-layers - 1} to {layers}"
            )

    def _check_images(self) -> None:
        edge = self.tower_config.image_size
        if self.image_aspect_ratio not in IMAGE_MODES:
            raise ValueError(f"image_aspect_ratio={self.image_aspect_ratio!r}; choose one of {list(IMAGE_MODES)}")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ValueError(
                f"min_tiles={self.min_tiles} and max_tiles={self.max_tiles} must be at least 1 and in that order"
            )
        if self.image_aspect_ratio != "dynamic_s2":
            if self.s2_scales is not None:
                raise ValueError(
                    f"s2_scales={self.s2_scales} belong to image_aspect_ratio='dynamic_s2', which is "
                    f"{self.image_aspect_ratio!r}; leave them out"
                )
            return
        scales: Any = self.s2_scales or []
        if not scales or scales[0] != edge or scales != sorted(set(scales)) or any(one % edge for one in scales):
            raise ValueError(
                f"s2_scales={self.s2_scales} must begin with the tower's image_size={edge} and rise in multiples of it"
            )
        if (scales[-1] // edge) ** 2 > self.max_tiles:
            raise ValueError(
                f"max_tiles={self.max_tiles} is less than the {(scales[-1] // edge) ** 2} tiles of the last of "
                f"s2_scales={scales}; raise it"
            )

    def _check_videos(self) -> None:
        if self.video_encoder not in VIDEO_ENCODERS:
            raise ValueError(f"video_encoder={self.video_encoder!r}; choose one of {list(VIDEO_ENCODERS)}")
        if self.video_encoder == "basic" and self.pool_sizes != [[1, 1, 1]]:
            raise ValueError(
                f"pool_sizes={self.pool_sizes} belong to video_encoder='tsp'; set that, or leave them out"
            )
        for sizes in self.pool_sizes or [[]]:
            if len(sizes) != 3 or not all(isinstance(size, int) and size >= 1 for size in sizes):
                raise ValueError(
                    f"pool_sizes={self.pool_sizes} must be a list of [frames, rows, columns], each at least 1"
                )
            if any(self.tile_tokens % size for size in sizes[1:]):
                raise ValueError(
                    f"pool_sizes={self.pool_sizes}: rows and columns must divide the {self.tile_tokens} tokens per "
                    "edge of a frame"
                )

    @property
    def downsample(self) -> int:
        """Returns the patches per edge of a token: 2 or 3."""
        return PROJECTORS[self.projector_type]

    @property
    def tile_patches(self) -> int:
        """Returns the patches per edge of a tile."""
        return self.tower_config.image_size // self.tower_config.patch_size

    @property
    def tile_tokens(self) -> int:
        """Returns the tokens per edge of a tile; the last may cover fewer patches."""
        return math.ceil(self.tile_patches / self.downsample)

    @property
    def n_scales(self) -> int:
        """Returns the number of scales whose features are joined on channels."""
        return 1 if self.s2_scales is None else len(self.s2_scales)

    @property
    def mm_hidden_size(self) -> int:
        """Returns the channels of a patch that the projector reads."""
        return self.tower_config.hidden_size * self.n_scales

    @property
    def tower_layers(self) -> int:
        """Returns the number of layers of the tower that the features go through."""
        return self.feature_layer % (self.tower_config.num_hidden_layers + 1)


@strict
class NVILAConfig(PreTrainedConfig):
    r"""
    The configuration of an NVILA checkpoint, the same for all of its layouts.

    Args:
        text_config (`Qwen2Config` or `dict`): The decoder.
        vision_config (`NVILAVisionConfig` or `dict`): The vision side.
        image_token_id, video_token_id (`int`): Placeholders, which may be outside the vocabulary of the decoder.
        num_video_frames (`int`, *optional*, defaults to 8): Frames that are taken from a video.
    """

    model_type = "linmu_nvila_teacher"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": Qwen2Config, "vision_config": NVILAVisionConfig}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 151649
    video_token_id: int = 151650
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None
    tie_word_embeddings: bool = False
    num_video_frames: int = 8

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = Qwen2Config(**(self.text_config or {}))
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = NVILAVisionConfig(**(self.vision_config or {}))
        super().__post_init__(**kwargs)
