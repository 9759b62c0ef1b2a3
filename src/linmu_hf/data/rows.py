"""Rows of a conversational vision dataset, turned into model inputs.

A row is `{"messages": [...], "images": [...], "videos": [...]}`, TRL's conversational vision format: every
`{"type": "image"}` or `{"type": "video"}` part of a message is the row's next image or video. An image is a
PIL image, a path, bytes or an array; a video is a file, a list of frames (two per second), or
`{"frames": [...], "fps": 0.5}`. [`read_row`] and [`read_video`] say what else is read.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import BatchFeature
from transformers.utils.chat_template_utils import render_jinja_template

from .formats import MEDIA, Row, name_row, read_row, texts_of
from .image import image_size, open_image
from .loading import raw_rows
from .video import Video, check_video, read_video


IGNORE_INDEX = -100


def encode_rows(processor, rows: Sequence[Row], numbers: Sequence[int] | None = None) -> BatchFeature:
    """
    Encodes rows as one right-padded training batch.

    Args:
        processor (`ProcessorMixin`):
            A processor with a chat template, of any family.
        rows (`Sequence[Mapping]`):
            Rows with `messages` and, where the messages ask for them, `images` and `videos`.
        numbers (`Sequence[int]`, *optional*):
            The rows' numbers in their dataset, for errors; by default 0, 1, ...

    Returns:
        `BatchFeature`: `input_ids`, `attention_mask`, `mm_token_type_ids` of shape [b, t], the pixels and grids, and
        `labels` of shape [b, t]: the ids of every assistant turn (its content and the closing token), -100 elsewhere.

    Raises:
        `ValueError`: if a row misses an image or a video or has one that cannot be read, has no assistant turn, or no
            token with a label.
    """
    numbers = range(len(rows)) if numbers is None else numbers
    rows = [check_row(row, number, processor) for row, number in zip(rows, numbers, strict=True)]
    turns = [_render_with_spans(processor, row["messages"]) for row in rows]
    batch = _call_processor(
        processor,
        [text for text, _ in turns],
        rows,
        numbers,
        padding_side="right",
        return_offsets_mapping=True,
        return_text_replacement_offsets=True,
    )
    offsets = batch.pop("offset_mapping")  # [b, t, 2]: characters of the text with its placeholders expanded
    replacements = batch.pop("text_replacement_offsets", None) or [[] for _ in rows]

    labels = torch.full_like(batch["input_ids"], IGNORE_INDEX)
    is_vision = torch.isin(batch["input_ids"], torch.tensor([processor.image_token_id, processor.video_token_id]))
    for index, (_, spans) in enumerate(turns):
        start, end = offsets[index].unbind(-1)
        trained = torch.zeros_like(is_vision[index])
        for span in spans:
            first, last = (_expanded(position, replacements[index]) for position in span)
            trained |= (start < end) & (first <= start) & (start < last)
        trained &= ~is_vision[index]
        if not trained.any():
            name = name_row(rows[index], numbers[index])
            raise ValueError(f"{name} has no token to learn from: its assistant turns are empty")
        labels[index, trained] = batch["input_ids"][index, trained]
    batch["labels"] = labels
    return batch


def encode_prompts(processor, rows: Sequence[Row], numbers: Sequence[int] | None = None) -> BatchFeature:
    """
    Encodes everything before each row's last assistant turn as one left-padded batch, ready for `generate`.

    Takes the same arguments as [`encode_rows`] and returns the same tensors without `labels`.
    """
    numbers = range(len(rows)) if numbers is None else numbers
    prompts = []
    for row, number in zip(rows, numbers, strict=True):
        row = check_row(row, number, processor)
        last = max(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        messages = row["messages"][:last]
        media = {column: row[column][: _count(messages, kind)] for kind, column in MEDIA.items()}
        prompts.append({**row, "messages": messages, **media})
    texts = [render(processor, row["messages"], add_generation_prompt=True) for row in prompts]
    return _call_processor(processor, texts, prompts, numbers, padding_side="left")


def check_dataset(dataset: Iterable[Row], processor=None) -> None:
    """
    Raises the `ValueError` of the first bad row: a test before long work starts.

    Args:
        dataset (`datasets.Dataset` or `Iterable[Mapping]`):
            The rows. Of pictures in files and bytes only the header is read.
        processor (`ProcessorMixin`, *optional*):
            The processor to encode them with: its placeholders must not be in a text, and a picture must be of a
            shape that it takes.
    """
    for _, error in bad_rows(dataset, processor):
        raise error


def bad_rows(
    dataset: Iterable[Row], processor=None, progress: bool = False, decode: bool = False
) -> Iterator[tuple[int, ValueError]]:
    """
    Yields number and error of every row that [`check_dataset`] would refuse, with `progress` beside a bar. With
    `decode` whole pictures and videos are read with the processor, not their headers.
    """
    total = len(dataset) if isinstance(dataset, Sized) else None
    hidden = not progress or (total or 0) < 1000
    rows = tqdm(raw_rows(dataset), "checking rows", total=total, unit="row", disable=hidden)
    for number, row in enumerate(rows):
        try:
            if isinstance(row, ValueError):
                raise row
            row = check_row(row, number, processor)
            _read_media(row, number, lambda image: _check_size(image_size(image), processor), check_video)
            if decode:
                _read_media(row, number, open_image, lambda video: read_video(video, processor))
        except ValueError as error:
            yield number, error


def row_size(row: Row) -> tuple[int, int]:
    """Returns pixels, then characters of a row: rows of about one size need about one number of tokens."""
    row = read_row(row)
    pixels = 0
    for medium in [*row["images"], *(frame for video in row["videos"] for frame in _frames_of(video))]:
        try:
            height, width = image_size(medium)
        except ValueError:
            continue  # reported where it is read
        pixels += height * width
    return pixels, sum(map(len, texts_of(row)))


def _frames_of(video: Any) -> Iterable[Any]:
    video = video.get("frames", []) if isinstance(video, Mapping) else video
    return video.frames if isinstance(video, Video) else video if isinstance(video, (list, np.ndarray)) else []


def check_row(row: Row, number: int, processor) -> dict[str, Any]:
    """Reads a row, and raises a `ValueError` if a text of it is no Unicode or holds a placeholder of the processor."""
    row = read_row(row, number)
    for text in (*texts_of(row), *(message["role"] for message in row["messages"])):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start : error.end]
            raise ValueError(
                f"{name_row(row, number)} has {half!r} in a text, half of a character: write the whole one, or none"
            ) from error
    for token in (getattr(processor, f"{kind}_token", None) for kind in MEDIA):
        if token and any(token in text for text in texts_of(row)):
            raise ValueError(
                f"{name_row(row, number)} has {token} in a text, which would stand for a picture: write it in another "
                'way, or give the picture as a {"type": ...} part'
            )
    return row


def _check_size(size: tuple[int, int], processor) -> None:
    # Only shapes that a processor may refuse: asking takes milliseconds.
    if max(size) > 100 * min(size) and hasattr(processor, "_get_num_multimodal_tokens"):
        processor._get_num_multimodal_tokens(image_sizes=[size])


def _read_media(row: Row, number: int, read_image, read_one_video) -> tuple[list[Any], list[Any]]:
    read: tuple[list[Any], list[Any]] = ([], [])
    for (kind, column), reader, out in zip(MEDIA.items(), (read_image, read_one_video), read):
        for position, medium in enumerate(row[column]):
            try:
                out.append(reader(medium))
            except (ValueError, TypeError, OSError) as error:
                raise ValueError(f"{name_row(row, number)}, {kind} {position}: {error}") from error
    return read


def _count(messages: Sequence[Mapping[str, Any]], kind: str) -> int:
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return sum(part["type"] == kind for content in contents for part in content)


def _call_processor(
    processor, texts: list[str], rows: Sequence[Row], numbers: Sequence[int], **kwargs
) -> BatchFeature:
    read = [
        _read_media(row, number, open_image, lambda video: read_video(video, processor))
        for row, number in zip(rows, numbers)
    ]
    images = [image for of_row, _ in read for image in of_row]
    videos = [video for _, of_row in read for video in of_row]
    media: dict[str, Any] = {}
    if images:
        media["images"] = images
    if videos:
        media["videos"] = [video.frames for video in videos]
        media["do_sample_frames"] = False
        media["video_metadata"] = [video.metadata for video in videos]
    try:
        return processor(text=texts, padding=True, return_tensors="pt", **media, **kwargs)
    except ValueError as error:
        if len(rows) == 1:
            raise ValueError(f"{name_row(rows[0], numbers[0])}: {error}") from error
        for text, row, number in zip(texts, rows, numbers):
            _call_processor(processor, [text], [row], [number], **kwargs)  # raises at the row it is
        raise


def _expanded(position: int, replacements: Sequence[Mapping[str, Any]]) -> int:
    """Where a character of the text is once the processor has expanded the placeholders before it."""
    before = [item["new_span"][1] - item["span"][1] for item in replacements if item["span"][1] <= position]
    return position + before[-1] if before else position


def render(processor, messages: list[dict[str, Any]], **kwargs) -> str:
    """Returns the conversation as the text that the processor takes."""
    return processor.apply_chat_template(messages, tokenize=False, **kwargs)


def _render_with_spans(processor, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the character spans of its assistant turns."""
    template = processor.chat_template
    if isinstance(template, Mapping):  # named ones: as `apply_chat_template` chooses
        template = template.get("default")
    if _has_generation_marks(template or ""):
        texts, spans = render_jinja_template(
            [messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **processor.tokenizer.special_tokens_map,
        )
        return texts[0], spans[0]
    text = render(processor, messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(processor, messages[:i], add_generation_prompt=True)
            after = render(processor, messages[: i + 1]).rstrip()
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"the chat template renders turn {i} differently inside a longer conversation: "
                    "mark assistant turns in the template with {% generation %}"
                )
            spans.append((len(before), len(after)))
    return text, spans


def _has_generation_marks(template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
