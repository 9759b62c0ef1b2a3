"""Rows of a conversational vision dataset, turned into model inputs.

A row is `{"messages": [...], "images": [PIL.Image, ...], "videos": [[frame, ...], ...]}`, TRL's conversational vision
format: every `{"type": "image"}` or `{"type": "video"}` part of a message stands for the row's next image or video.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.utils.chat_template_utils import render_jinja_template
from transformers.video_utils import VideoMetadata


IGNORE_INDEX = -100
VIDEO_FPS = 2.0  # rows carry frames that are already sampled, two per second
MEDIA = {"image": "images", "video": "videos"}

Row = Mapping[str, Any]


def encode_rows(processor, rows: Sequence[Row]) -> BatchFeature:
    """
    Encodes rows as one right-padded training batch.

    Args:
        processor (`ProcessorMixin`):
            A processor with a chat template: a `Qwen2_5_VLProcessor` or an `NVILAProcessor`.
        rows (`Sequence[Mapping]`):
            Rows with `messages` and, where the messages ask for them, `images` and `videos`.

    Returns:
        `BatchFeature`: `input_ids`, `attention_mask`, `mm_token_type_ids` of shape [b, t], the pixels and grids, and
        `labels` of shape [b, t]: the ids of every assistant turn (its content and the closing token), -100 elsewhere.

    Raises:
        `ValueError`: if a row misses an image or a video, has no assistant turn, or no token with a label.
    """
    rows = [_checked(row, index) for index, row in enumerate(rows)]
    turns = [_render_with_spans(processor, row["messages"]) for row in rows]
    batch = _call_processor(
        processor,
        [text for text, _ in turns],
        rows,
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
            raise ValueError(f"{_name(rows[index], index)} has no token to learn from: its assistant turns are empty")
        labels[index, trained] = batch["input_ids"][index, trained]
    batch["labels"] = labels
    return batch


def encode_prompts(processor, rows: Sequence[Row]) -> BatchFeature:
    """
    Encodes everything before each row's last assistant turn as one left-padded batch, ready for `generate`.

    Takes the same arguments as [`encode_rows`] and returns the same tensors without `labels`.
    """
    prompts = []
    for index, row in enumerate(rows):
        row = _checked(row, index)
        last = max(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        prompts.append({**row, "messages": row["messages"][:last]})
    texts = [_render(processor, row["messages"], add_generation_prompt=True) for row in prompts]
    return _call_processor(processor, texts, prompts, padding_side="left")


def answer_text(row: Row) -> str:
    """The text of the row's last assistant turn: what a model has to say after [`encode_prompts`]."""
    content = next(message["content"] for message in reversed(row["messages"]) if message["role"] == "assistant")
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def load_rows(path: str, split: str = "train"):
    """
    One split of a dataset: a folder written by `save_to_disk`, or anything that `datasets.load_dataset` opens.

    Raises:
        `FileNotFoundError`: No such dataset.
        `ValueError`: No such split, or an empty one.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("reading a dataset needs `datasets`: pip install 'linmu-hf[train]'") from error
    folder = Path(path).expanduser()
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        dataset = datasets.load_from_disk(str(folder))
    else:
        try:
            dataset = datasets.load_dataset(str(folder) if folder.exists() else str(path))
        except (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
            raise FileNotFoundError(f"there is no folder {path}, and no dataset of that name on the Hub") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise ValueError(f"dataset {path} has no split {split!r}: it has {list(dataset)}")
        dataset = dataset[split]
    if len(dataset) == 0:
        raise ValueError(f"dataset {path} has no rows in split {split!r}")
    return dataset


def check_dataset(dataset: Iterable[Row]) -> None:
    """Raises the `ValueError` of the first bad row, decoding no image: a cheap test before long work starts."""
    for index, row in enumerate(_undecoded_rows(dataset)):
        _checked(row, index)


def _checked(row: Row, index: int) -> dict[str, Any]:
    if not row.get("messages"):
        raise ValueError(f"row {index} has no `messages`; its columns are {sorted(row)}")
    row = {**row, "messages": [_clean_message(message) for message in row["messages"]]}
    parts = [
        part for message in row["messages"] if not isinstance(message["content"], str) for part in message["content"]
    ]
    for kind, column in MEDIA.items():
        wanted = sum(part.get("type") == kind for part in parts)
        media = [item for item in row.get(column) or [] if item is not None]
        if wanted != len(media):
            raise ValueError(
                f"{_name(row, index)} asks for {wanted} {column} in its messages but has {len(media)} in `{column}`: "
                f'give one {kind} for each {{"type": "{kind}"}} part'
            )
        row[column] = media
    if not any(message["role"] == "assistant" for message in row["messages"]):
        roles = [message["role"] for message in row["messages"]]
        raise ValueError(f"{_name(row, index)} has no assistant turn to learn from: its roles are {roles}")
    return row


def _clean_message(message: Mapping[str, Any]) -> dict[str, Any]:
    # Arrow gives every part all keys of its siblings; templates take an `image` key, even of None, for an image.
    content = message["content"]
    if not isinstance(content, str):
        content = [{key: value for key, value in part.items() if value is not None} for part in content]
    return {"role": message["role"], "content": content}


def _name(row: Row, index: int) -> str:
    text = next(
        (
            part["text"]
            for message in row["messages"]
            for part in ([{"text": message["content"]}] if isinstance(message["content"], str) else message["content"])
            if part.get("text")
        ),
        "",
    )
    return f"row {index} ({text[:60]!r})"


def _call_processor(processor, texts: list[str], rows: Sequence[Row], **kwargs) -> BatchFeature:
    images = [image for row in rows for image in row["images"]]
    videos = [_frames(video) for row in rows for video in row["videos"]]
    media: dict[str, Any] = {}
    if images:
        media["images"] = images
    if videos:
        media["videos"] = videos
        media["do_sample_frames"] = False
        media["video_metadata"] = [
            VideoMetadata(total_num_frames=len(video), fps=VIDEO_FPS, frames_indices=list(range(len(video))))
            for video in videos
        ]
    return processor(text=texts, padding=True, return_tensors="pt", **media, **kwargs)


def _expanded(position: int, replacements: Sequence[Mapping[str, Any]]) -> int:
    """Where a character of the text is once the processor has expanded the placeholders before it."""
    before = [item["new_span"][1] - item["span"][1] for item in replacements if item["span"][1] <= position]
    return position + before[-1] if before else position


def _frames(video: Sequence[Any]) -> np.ndarray:
    return np.stack([np.asarray(frame.convert("RGB") if hasattr(frame, "convert") else frame) for frame in video])


def _render(processor, messages: list[dict[str, Any]], **kwargs) -> str:
    return processor.apply_chat_template(messages, tokenize=False, **kwargs)


def _render_with_spans(processor, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the character spans of its assistant turns."""
    if _has_generation_marks(processor.chat_template):
        texts, spans = render_jinja_template(
            [messages],
            chat_template=processor.chat_template,
            return_assistant_tokens_mask=True,
            **processor.tokenizer.special_tokens_map,
        )
        return texts[0], spans[0]
    text = _render(processor, messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _render(processor, messages[:i], add_generation_prompt=True)
            after = _render(processor, messages[: i + 1]).rstrip()
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"the chat template renders turn {i} differently inside a longer conversation: "
                    "mark assistant turns in the template with {% generation %}"
                )
            spans.append((len(before), len(after)))
    return text, spans


def _has_generation_marks(template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def _undecoded_rows(dataset: Iterable[Row]) -> Iterator[Row]:
    if not hasattr(dataset, "with_format"):
        yield from dataset
        return
    for table in dataset.with_format("arrow").iter(256):
        lengths = {column: table[column].combine_chunks() for column in MEDIA.values() if column in table.column_names}
        for i, messages in enumerate(table["messages"].to_pylist()):
            media = {
                column: [True] * (len(values[i]) if values[i].is_valid else 0) for column, values in lengths.items()
            }
            yield {"messages": messages, **media}
