"""
NVILA's processor: a conversation with images and videos to the model's inputs.

Every medium is one placeholder in the text and becomes a block in the ids: its placeholder, repeated, with literal line
breaks as separators. The ids are expanded and not the text, in which a tokenizer would merge two line breaks into one
token.
"""

import itertools
from typing import Any

from transformers import BatchEncoding, BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ProcessorMixin

from .image_processing_nvila import NVILAImageProcessor
from .remote_code import InstalledCode
from .video_processing_nvila import NVILAVideoProcessor


SENTINEL_TOKEN, IMAGE_TOKEN, VIDEO_TOKEN = "<vila/sentinel>", "<image>", "<vila/video>"
SEPARATOR = "\n"
# What the processor does itself, after the tokenizer.
OWN_OPTIONS = (
    "padding",
    "padding_side",
    "pad_to_multiple_of",
    "truncation",
    "max_length",
    "return_attention_mask",
    "return_tensors",
    "return_mm_token_type_ids",
    "return_text_replacement_offsets",
)
CHAT_TEMPLATE = """\
{%- if not messages or messages[0].role != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- set content = namespace(text='') -%}
{%- if message.content is string -%}
{%- set content.text = message.content -%}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{%- set content.text = content.text + '<image>' -%}
{%- elif part.type == 'video' -%}{%- set content.text = content.text + '<vila/video>' -%}
{%- else -%}{%- set content.text = content.text + part.text -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- content.text | trim + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- content.text | trim + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


class NVILAProcessor(InstalledCode, ProcessorMixin):
    """
    NVILA's tokenizer, image processor and video processor as one.

    A text's only image is tiled; the images of a text with several are one tile each. Offsets
    (`return_offsets_mapping=True`) refer to the text that was given: all tokens of a medium have its placeholder's.
    """

    def __init__(self, image_processor=None, tokenizer=None, video_processor=None, chat_template=None):
        self.image_token, self.video_token = IMAGE_TOKEN, VIDEO_TOKEN
        self.image_token_id = _single_id(tokenizer, IMAGE_TOKEN)
        self.video_token_id = _single_id(tokenizer, VIDEO_TOKEN)
        self.separator_id = _single_id(tokenizer, SEPARATOR)
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs) -> BatchFeature:
        """
        Prepares texts, images and videos for the model.

        Args:
            images (*optional*):
                Images in the order of their `<image>` placeholders: a flat list, or a list for each text.
            text (`str` or `list[str]`, *optional*):
                One text or several, with a placeholder for each image and video.
            videos (*optional*):
                Videos in the order of their `<vila/video>` placeholders.

        Returns:
            `BatchFeature`: `input_ids`, `attention_mask` and `mm_token_type_ids` (0 text and separators, 1 image, 2
            video) of shape [b, t], and what the image and video processors return.

        Raises:
            `ValueError`: if the text does not have one placeholder for each image and video.
        """
        if images is None and text is None and videos is None:
            raise ValueError("give `text`, `images` or `videos`: there is nothing to process")
        images, text, videos, _ = self.prepare_inputs_layout(images=images, text=text, videos=videos)
        merged = self._merge_kwargs(
            self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        encoded = None
        if text is not None:
            options = {name: value for name, value in merged["text_kwargs"].items() if name not in OWN_OPTIONS}
            encoded = self.tokenizer(text, **options)

        data: dict[str, Any] = {}
        image_blocks: list[list[int]] = []
        video_blocks: list[list[int]] = []
        if images is not None:
            samples = self._samples(images, encoded)
            data |= self.image_processor(samples, **merged["images_kwargs"] | {"return_tensors": "np"})
            tiling = merged["images_kwargs"].get("image_aspect_ratio", self.image_processor.image_aspect_ratio)
            tilings = [tiling if len(sample) == 1 else "resize" for sample in samples for _ in sample]
            image_blocks = [
                self._image_block(grid, tiling) for grid, tiling in zip(data["image_grid_thw"].tolist(), tilings)
            ]
        if videos is not None:
            data |= self.video_processor(videos, **merged["videos_kwargs"] | {"return_tensors": "np"})
            pools = merged["videos_kwargs"].get("pool_sizes", self.video_processor.pool_sizes)
            video_blocks = [
                self._video_block(grids) for grids in data["video_grid_thw"].reshape(-1, len(pools), 3).tolist()
            ]
        if encoded is not None:
            expanded = self._expand(encoded, image_blocks, video_blocks)
            return_types = kwargs.get("return_mm_token_type_ids", True)
            data = self._pad(expanded, return_types, **merged["text_kwargs"]) | data
        if not kwargs.get("return_metadata"):
            data.pop("video_metadata", None)
        return BatchFeature(
            data,
            tensor_type=merged["text_kwargs"].get("return_tensors"),
            skip_tensor_conversion=self.skip_tensor_conversion,
        )

    @property
    def model_input_names(self) -> list[str]:
        """Names of all tensors that the model takes."""
        return [*super().model_input_names, "mm_token_type_ids"]

    def _samples(self, images: Any, encoded: BatchEncoding | None) -> list[list[Any]]:
        """The images of each text that has any or, without texts, of each sample."""
        if encoded is None:
            nested = isinstance(images, (list, tuple)) and any(isinstance(sample, (list, tuple)) for sample in images)
            samples = images if nested else make_flat_list_of_images(images)
            return [list(sample) if isinstance(sample, (list, tuple)) else [sample] for sample in samples]
        flat = make_flat_list_of_images(images)
        counts = [ids.count(self.image_token_id) for ids in encoded["input_ids"]]
        _check_counts(IMAGE_TOKEN, sum(counts), "images", len(flat))
        remaining = iter(flat)
        return [list(itertools.islice(remaining, count)) for count in counts if count]

    def _image_block(self, grid: list[int], tiling: str) -> list[int]:
        _, h, w = grid
        if tiling != "dynamic":
            return [self.image_token_id] * (h * w) + [self.separator_id]
        tile = self.image_processor.tile_tokens**2
        tiles = h * w // tile
        tiles += tiles > 1  # the thumbnail
        # one separator from the encoder, one from the text
        return ([self.image_token_id] * tile + [self.separator_id] * 2) * tiles

    def _video_block(self, grids: list[list[int]]) -> list[int]:
        frames = [h * w for t, h, w in grids for _ in range(t)]
        return [id for tokens in frames for id in [self.video_token_id] * tokens + [self.separator_id]]

    def _expand(
        self, encoded: BatchEncoding, image_blocks: list[list[int]], video_blocks: list[list[int]]
    ) -> dict[str, list[list[Any]]]:
        """Puts each medium's block in its placeholder's place; what else the tokenizer returned is repeated along."""
        ids = encoded["input_ids"]
        _check_counts(IMAGE_TOKEN, sum(row.count(self.image_token_id) for row in ids), "images", len(image_blocks))
        _check_counts(VIDEO_TOKEN, sum(row.count(self.video_token_id) for row in ids), "videos", len(video_blocks))
        blocks = {self.image_token_id: iter(image_blocks), self.video_token_id: iter(video_blocks)}
        parts = [[next(blocks[id]) if id in blocks else [id] for id in row] for row in ids]
        expanded = {
            name: [[value for value, part in zip(row, row_parts) for _ in part] for row, row_parts in zip(rows, parts)]
            for name, rows in encoded.items()
        }
        expanded["input_ids"] = [[id for part in row_parts for id in part] for row_parts in parts]
        return expanded

    def _pad(
        self,
        expanded: dict[str, list[list[Any]]],
        return_mm_token_type_ids: bool = True,
        padding: Any = False,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        truncation: Any = False,
        max_length: int | None = None,
        return_attention_mask: bool | None = None,
        **kwargs,
    ) -> dict[str, list[list[Any]]]:
        """Truncates and pads the expanded rows, and says which of their tokens are placeholders."""
        if truncation and truncation != "do_not_truncate":
            expanded = self._truncate(expanded, max_length or self.tokenizer.model_max_length)
        padded = self.tokenizer.pad(
            {"input_ids": expanded["input_ids"], "attention_mask": [[1] * len(row) for row in expanded["input_ids"]]},
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
        )
        data = {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}
        for name, rows in expanded.items():
            if name not in data:
                fill = (0, 0) if name == "offset_mapping" else 0
                values = [iter(row) for row in rows]
                data[name] = [
                    [next(row) if real else fill for real in mask] for row, mask in zip(values, data["attention_mask"])
                ]
        if return_mm_token_type_ids:
            kinds = {self.image_token_id: 1, self.video_token_id: 2}
            data["mm_token_type_ids"] = [[kinds.get(id, 0) for id in row] for row in data["input_ids"]]
        if return_attention_mask is False:
            del data["attention_mask"]
        return data

    def _truncate(self, expanded: dict[str, list[list[Any]]], max_length: int) -> dict[str, list[list[Any]]]:
        part = slice(-max_length, None) if self.tokenizer.truncation_side == "left" else slice(max_length)
        truncated = {name: [row[part] for row in rows] for name, rows in expanded.items()}
        for whole, row in zip(expanded["input_ids"], truncated["input_ids"]):
            for id in (self.image_token_id, self.video_token_id):
                if row.count(id) < whole.count(id):
                    raise ValueError(
                        f"a text of {len(whole)} tokens truncated to max_length={max_length} would lose part of an "
                        "image or video: raise max_length or leave truncation off"
                    )
        return truncated


def build_processor(
    vision_config: Any,
    tokenizer: Any,
    *,
    num_video_frames: int = 8,
    image_mean: Any = None,
    image_std: Any = None,
    chat_template: str | None = None,
) -> NVILAProcessor:
    """
    The processor of a model with this vision side.

    Args:
        vision_config (`NVILAVisionConfig`):
            The model's vision side: size of a tile, tiling, scales and pool sizes.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer. It gets NVILA's three tokens, in NVILA's order, unless it has them.
        num_video_frames (`int`, *optional*, defaults to 8):
            Frames sampled from a video.
        image_mean, image_std (`list[float]`, *optional*, defaults to 0.5 for each channel):
            Mean and standard deviation of the pixels, for images and frames.
        chat_template (`str`, *optional*):
            A template other than NVILA's ChatML.
    """
    tokenizer.add_tokens([SENTINEL_TOKEN, IMAGE_TOKEN, VIDEO_TOKEN], special_tokens=True)
    edge = vision_config.tower_config.image_size
    shared = {
        "size": {"height": edge, "width": edge},
        "tile_tokens": vision_config.tile_tokens,
        **({} if image_mean is None else {"image_mean": image_mean}),
        **({} if image_std is None else {"image_std": image_std}),
    }
    return NVILAProcessor(
        image_processor=NVILAImageProcessor(
            **shared,
            image_aspect_ratio=vision_config.image_aspect_ratio,
            s2_scales=vision_config.s2_scales,
            min_tiles=vision_config.min_tiles,
            max_tiles=vision_config.max_tiles,
        ),
        tokenizer=tokenizer,
        video_processor=NVILAVideoProcessor(
            **shared, num_frames=num_video_frames, pool_sizes=vision_config.pool_sizes
        ),
        chat_template=chat_template or CHAT_TEMPLATE,
    )


def _single_id(tokenizer: Any, text: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"the tokenizer encodes {text!r} as {len(ids)} tokens, NVILA needs one: "
            "build the processor with `build_processor`, which adds NVILA's tokens to a Qwen2 tokenizer"
        )
    return ids[0]


def _check_counts(token: str, placeholders: int, kind: str, media: int) -> None:
    if placeholders != media:
        raise ValueError(f"the text has {placeholders} {token} placeholders for {media} {kind}: give one for each")
