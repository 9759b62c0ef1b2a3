"""
NVILA's processor: a conversation with images and videos to the model's inputs.

Every medium is one placeholder in the text and becomes a block in the ids: its placeholder, repeated, with literal
line breaks as separators. The ids are expanded and not the text, in which a tokenizer would merge two line breaks into
one token; only the line break after the last tile belongs to the text.
"""

import itertools
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from transformers import BatchEncoding, BatchFeature, PreTrainedTokenizerBase
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin

from ...modeling.remote_code import RemoteCode, add_remote_code, name_remote_classes
from .image_processing import NVILAImageProcessor
from .tiling import Run, image_runs, pooled_grids, video_runs
from .video_processing import NVILAVideoProcessor


SENTINEL_TOKEN, IMAGE_TOKEN, VIDEO_TOKEN = "<vila/sentinel>", "<image>", "<vila/video>"
SEPARATOR, END_OF_MESSAGE = "\n", "<|im_end|>"
# Options of a tokenizer that apply to the expanded ids
AFTER_EXPANSION = (
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


class NVILAProcessor(RemoteCode, ProcessorMixin):
    """
    NVILA's tokenizer, image processor and video processor as one.

    A text's only image is tiled; the images of a text with several are one tile each. Offsets
    (`return_offsets_mapping=True`) refer to the text that was given: placeholders have those of the one they
    replace, separators have no width.

    Args:
        image_processor (`NVILAImageProcessor`): It makes the tiles.
        tokenizer (`PreTrainedTokenizerBase`): `<image>`, `<vila/video>` and a line break must be one token each.
        video_processor (`NVILAVideoProcessor`): It samples the frames.
        chat_template (`str`, *optional*): The conversation's form.
    """

    remote_classes: ClassVar[dict[str, str]] = {"AutoProcessor": "NVILAProcessor"}

    def __init__(
        self, image_processor: NVILAImageProcessor | None = None, tokenizer: PreTrainedTokenizerBase | None = None,
        video_processor: NVILAVideoProcessor | None = None, chat_template: str | None = None,
    ):  # fmt: skip
        self.image_token, self.video_token = IMAGE_TOKEN, VIDEO_TOKEN
        self.image_token_id = _single_id(tokenizer, IMAGE_TOKEN)
        self.video_token_id = _single_id(tokenizer, VIDEO_TOKEN)
        self.separator_id = _single_id(tokenizer, SEPARATOR)
        name_remote_classes(self)  # loading a processor drops these names
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
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
            options = {name: value for name, value in merged["text_kwargs"].items() if name not in AFTER_EXPANSION}
            settings = self.image_processor.settings(**merged["images_kwargs"])
            encoded = self._tokenize(text, settings["image_aspect_ratio"] == "dynamic", **options)

        data: dict[str, Any] = {}
        media: dict[int, list[list[Run]]] = {self.image_token_id: [], self.video_token_id: []}
        if images is not None:
            options = merged["images_kwargs"] | {"return_tensors": "np"}
            samples = self._samples(images, encoded)
            data |= self.image_processor(samples, **options)
            media[self.image_token_id] = self._image_runs(data["image_grid_thw"], samples, **options)
        if videos is not None:
            options = merged["videos_kwargs"] | {"return_tensors": "np"}
            data |= self.video_processor(videos, **options)
            media[self.video_token_id] = self._video_runs(data["video_grid_thw"], **options)
        if encoded is not None:
            data = self._pad(self._expand(encoded, media), **merged["text_kwargs"]) | data
        if not kwargs.get("return_metadata"):
            data.pop("video_metadata", None)
        return BatchFeature(
            data,
            tensor_type=merged["text_kwargs"].get("return_tensors"),
            skip_tensor_conversion=self.skip_tensor_conversion,
        )

    @property
    def model_input_names(self) -> list[str]:
        """Returns the names of all tensors that the model takes."""
        return [*super().model_input_names, "mm_token_type_ids"]

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str] | None:
        """Saves as Transformers does, with `auto_map` for the processor and its parts, and the remote-code file."""
        add_remote_code(self.image_processor, save_directory)
        add_remote_code(self.video_processor, save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    # The next two go around Transformers' Auto classes, which know no video processor where torchvision is missing.

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Returns the class that a part of the processor must have; a `TypeError` if it has another."""
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)
        if not isinstance(argument, NVILAVideoProcessor):
            raise TypeError(f"video_processor is a {type(argument).__name__}; give an NVILAVideoProcessor")
        return NVILAVideoProcessor

    @classmethod
    def _get_arguments_from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        processor_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        return [
            NVILAImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs),
            cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **kwargs),
            NVILAVideoProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs),
        ]

    def _tokenize(self, texts: list[str], tiled: bool, **options: Any) -> BatchEncoding:
        """
        The texts as ids. After every tile of an only image NVILA's text has a line break: the last one goes through
        the tokenizer with what follows, and at the end of a message it is stripped.
        """
        ends = [_end_of_only_image(text) if tiled else None for text in texts]
        encoded = self.tokenizer(
            [text if end is None else text[:end] + SEPARATOR + text[end:] for text, end in zip(texts, ends)], **options
        )
        for row, end in enumerate(ends) if "offset_mapping" in encoded else ():
            if end is not None:
                offsets = encoded["offset_mapping"][row]
                encoded["offset_mapping"][row] = [tuple(at - (at > end) for at in span) for span in offsets]
        return encoded

    def _samples(self, images: Any, encoded: BatchEncoding | None) -> list[list[Any]]:
        """The images of each text that has any or, without texts, of each sample."""
        if encoded is None:
            nested = isinstance(images, (list, tuple)) and any(isinstance(sample, (list, tuple)) for sample in images)
            samples = images if nested else make_flat_list_of_images(images)
            return [list(sample) if isinstance(sample, (list, tuple)) else [sample] for sample in samples]
        flat = make_flat_list_of_images(images)
        counts = [row.count(self.image_token_id) for row in encoded["input_ids"]]
        _check_counts(IMAGE_TOKEN, sum(counts), "images", len(flat))
        remaining = iter(flat)
        return [list(itertools.islice(remaining, count)) for count in counts if count]

    def _image_runs(self, grids: np.ndarray, samples: list[list[Any]], **options: Any) -> list[list[Run]]:
        settings = self.image_processor.settings(**options)
        alone = [len(sample) == 1 for sample in samples for _ in sample]
        return [
            image_runs(grid, settings["image_aspect_ratio"] if single else "resize", settings["tile_tokens"])
            for grid, single in zip(grids.tolist(), alone)
        ]

    def _video_runs(self, grids: np.ndarray, **options: Any) -> list[list[Run]]:
        pools = len(options.get("pool_sizes", self.video_processor.pool_sizes))
        return [video_runs(video) for video in grids.reshape(-1, pools, 3).tolist()]

    def _expand(self, encoded: BatchEncoding, media: dict[int, list[list[Run]]]) -> dict[str, list[list[Any]]]:
        """Puts each medium's block in its placeholder's place; what else the tokenizer returned is repeated along."""
        rows = encoded["input_ids"]
        for token, id, kind in (
            (IMAGE_TOKEN, self.image_token_id, "images"),
            (VIDEO_TOKEN, self.video_token_id, "videos"),
        ):
            _check_counts(token, sum(row.count(id) for row in rows), kind, len(media[id]))
        remaining = {id: iter(of_kind) for id, of_kind in media.items()}
        expanded: dict[str, list[list[Any]]] = {name: [] for name in encoded}
        for index, row in enumerate(rows):
            runs = [next(remaining[id]) if id in remaining else [(1, 0)] for id in row]
            for name in encoded:
                expanded[name].append(
                    [
                        value
                        for given, block in zip(encoded[name][index], runs)
                        for repeats, separators in block
                        for value in [given] * repeats + [self._of_separator(name, given)] * separators
                    ]
                )
        return expanded

    def _of_separator(self, name: str, of_placeholder: Any) -> Any:
        if name == "input_ids":
            return self.separator_id
        return (of_placeholder[0],) * 2 if name == "offset_mapping" else of_placeholder

    def _pad(
        self,
        expanded: dict[str, list[list[Any]]],
        padding: Any = False,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
        truncation: Any = False,
        max_length: int | None = None,
        return_attention_mask: bool | None = None,
        return_mm_token_type_ids: bool = True,
        **kwargs: Any,
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
        for name in expanded:
            if name in data:
                continue
            fill = (0, 0) if name == "offset_mapping" else 0
            values = [iter(row) for row in expanded[name]]
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
            if any(row.count(id) < whole.count(id) for id in (self.image_token_id, self.video_token_id)):
                raise ValueError(
                    f"a text of {len(whole)} tokens, cut to max_length={max_length}, would lose part of an image or "
                    "video: raise max_length or leave truncation off"
                )
        return truncated

    def _get_num_multimodal_tokens(
        self,
        image_sizes: Sequence[Sequence[int]] | None = None,
        video_sizes: Sequence[Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """
        How many placeholders media of these sizes become, the images each alone in its text.

        Args:
            image_sizes (`list[list[int]]`, *optional*): Height and width of each image.
            video_sizes (`list[list[int]]`, *optional*): Frames, height and width of each video, already sampled.
        """
        merged = self._merge_kwargs(self.valid_processor_kwargs, **kwargs)
        counts: dict[str, list[int]] = {}
        if image_sizes is not None:
            options = merged["images_kwargs"]
            plans = [self.image_processor.plan(width, height, **options) for height, width in image_sizes]
            grids = np.array([grid for _, grid in plans])
            counts["num_image_patches"] = [sum(columns * rows for columns, rows in mosaics) for mosaics, _ in plans]
            counts["num_image_tokens"] = [
                sum(repeats for repeats, _ in runs)
                for runs in self._image_runs(grids, [[None]] * len(grids), **options)
            ]
        if video_sizes is not None:
            settings = self.video_processor.settings(**merged["videos_kwargs"])
            counts["num_video_tokens"] = [
                sum(t * h * w for t, h, w in pooled_grids(frames, settings["tile_tokens"], settings["pool_sizes"]))
                for frames, _, _ in video_sizes
            ]
        return MultiModalData(**counts)


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
    Builds the processor of a model with this vision side.

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


def _end_of_only_image(text: str) -> int | None:
    """Where the placeholder of a text's only image ends, unless its message ends there too."""
    before, token, after = text.partition(IMAGE_TOKEN)
    if not token or IMAGE_TOKEN in after or after.startswith(END_OF_MESSAGE):
        return None
    return len(before) + len(token)


def _check_counts(token: str, placeholders: int, kind: str, media: int) -> None:
    if placeholders != media:
        raise ValueError(f"the text has {placeholders} {token} placeholders for {media} {kind}: give one for each")
