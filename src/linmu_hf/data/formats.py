"""The shapes that rows come in: each becomes `messages` with its `images` and `videos`."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .layouts import WORKING_ROW, find_messages
from .video import CLIP, TIMING


Row = Mapping[str, Any]

MEDIA = {"image": "images", "video": "videos"}
MEDIUM_KEYS = (*MEDIA, *(f"{kind}_url" for kind in MEDIA), "url", "path")  # of a part: where its picture or video is
SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool"}  # of ShareGPT
PART_TYPES = {"image_url": "image", "video_url": "video", "input_image": "image", "input_text": "text"}
EXAMPLE = '{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]}'


def fetch(rows: Sequence[Row], index: int) -> Row:
    """Returns row number `index`; the `ValueError` names it if the dataset cannot make it."""
    try:
        return rows[index]
    except Exception as error:
        raise ValueError(f"row {index} cannot be read: {first_line(error)}") from error


def read_row(row: Row, index: int = 0) -> dict[str, Any]:
    """
    Reads a row of any known layout.

    Args:
        row (`Mapping`):
            A row of one of the layouts in `layouts.py`, such as `messages`, or ShareGPT's `conversations` with `from`
            and `value`, as such or as JSON. A picture or video is in its part of a message or, if the part names none,
            the next one of the column `images` or `videos` (or `image`, `video`). In plain texts `<image>` and
            `<video>` mark the places; where none is marked, the row's media come first. In a row with videos and
            no image, `<image>` is a video, as in LLaVA-Video-178K. Columns `fps` (one number, or one for each video)
            and `timestamps` (seconds of every frame) are those of videos that come as frames.
        index (`int`, *optional*, defaults to 0):
            The row's number, for errors.

    Returns:
        `dict`: the row with `messages` whose content is a string or a list of `{"type": "text", "text": ...}`,
        `{"type": "image"}` and `{"type": "video"}`, and all its `images` and `videos` in the order of their parts.

    Raises:
        `ValueError`: names the row, and says what to do.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"row {index} is {row!r:.60}: give {WORKING_ROW}")
    try:
        columns = {kind: _read_column(row, kind) for kind in MEDIA}
        messages = _read_messages(row, columns)
        columns["video"] = _timed(row, columns["video"])
        media: dict[str, list[Any]] = {column: [] for column in MEDIA.values()}
        wanted = dict.fromkeys(MEDIA, 0)
        for part in _parts(messages):
            kind = part["type"]
            if kind in MEDIA:
                medium = part.pop("medium", None)
                wanted[kind] += medium is None
                if medium is None and columns[kind]:
                    medium = columns[kind].pop(0)
                media[MEDIA[kind]].append(medium)
    except ValueError as error:
        raise ValueError(f"row {index}{_id_of(row)}: {error}") from None
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"row {index}{_id_of(row)} cannot be read ({reason}): give {WORKING_ROW}") from error
    messages_of_row = {**row, "messages": messages, **media}
    for kind, column in MEDIA.items():
        missing = sum(medium is None for medium in media[column])
        if missing or columns[kind]:
            have = wanted[kind] - missing + len(columns[kind])
            raise ValueError(
                f"{name_row(messages_of_row, index)} asks for {wanted[kind]} {column} in its messages but has {have} "
                f'in `{column}`: give one {kind} for each {{"type": "{kind}"}} part'
            )
    return messages_of_row


def name_row(row: Row, index: int) -> str:
    """Returns the row's number, its `id` if it has one, and the beginning of its first text."""
    return f"row {index}{_id_of(row)} ({next(filter(None, texts_of(row)), '')[:60]!r})"


def texts_of(row: Row) -> Iterator[str]:
    """Yields all texts of a row that was read."""
    for message in row["messages"]:
        content = message["content"]
        yield from [content] if isinstance(content, str) else (part["text"] for part in content if "text" in part)


def question_text(row: Row) -> str:
    """Returns the texts before the row's last answer, a line each. Its media may be missing."""
    messages, last = _read_texts(row)
    return "\n".join(texts_of({"messages": messages[:last]}))


def answer_text(row: Row) -> str:
    """Returns the text of the row's last assistant turn. Its media may be missing."""
    messages, last = _read_texts(row)
    return "".join(texts_of({"messages": messages[last : last + 1]}))


def _read_texts(row: Row) -> tuple[list[dict[str, Any]], int]:
    """The messages of a row, whatever media it has, and which one is the last answer."""
    messages = _read_messages(row, {kind: [] for kind in MEDIA})
    return messages, max(i for i, message in enumerate(messages) if message["role"] == "assistant")


def _id_of(row: Row) -> str:
    return f", id {row['id']!r:.80}" if row.get("id") is not None else ""


def _parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the parts of all messages whose content is a list."""
    for message in messages:
        yield from message["content"] if isinstance(message["content"], list) else []


def _read_messages(row: Row, columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    messages = find_messages(row)
    if isinstance(messages, str):
        messages = _from_json(messages)
    if isinstance(messages, Mapping):  # columns, as old versions of datasets store lists of dicts
        if not all(isinstance(values, (list, tuple)) for values in messages.values()):
            raise ValueError(f"its messages are {messages!r:.60}: give a list, as in {WORKING_ROW}")
        messages = [dict(zip(messages, values)) for values in zip(*messages.values())]
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"its messages are {messages!r:.60}: give a list, as in {WORKING_ROW}")
    messages = [_read_message(message, number) for number, message in enumerate(messages)]
    if isinstance(row.get("system"), str) and row["system"] and messages[:1] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"], "tagged": False})
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(
            f"it has no assistant turn to learn from: its roles are {[message['role'] for message in messages]}"
        )
    if not any(part["type"] in MEDIA for part in _parts(messages)):
        _place_media(messages, columns)
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _place_media(messages: list[dict[str, Any]], columns: Mapping[str, list[Any]]) -> None:
    """Makes parts of the marks in plain texts, or puts the row's media first if there are none."""
    has_media = any(columns.values())
    asking = [message for message in messages if message["role"] != "assistant"]
    marked = False
    for message in asking:
        # Without media, only ShareGPT's texts hold marks: elsewhere `<image>` may be a tag that someone asks about.
        if isinstance(message["content"], str) and (has_media or message["tagged"]):
            pieces = re.split("<(image|video)>", message["content"])  # texts and kinds in turn
            if len(pieces) > 1:
                marked = True
                message["content"] = [
                    {"type": piece} if i % 2 else {"type": "text", "text": piece.strip()}
                    for i, piece in enumerate(pieces)
                    if i % 2 or piece.strip()
                ]
    if marked and columns["video"] and not columns["image"]:
        if not any(part["type"] == "video" for part in _parts(messages)):
            for part in _parts(messages):
                part["type"] = part["type"].replace("image", "video")
    user = next((message for message in asking if message["role"] == "user"), None)
    if has_media and not marked and user and all(isinstance(message["content"], str) for message in messages):
        media = [{"type": kind} for kind, values in columns.items() for _ in values]
        user["content"] = [*media, {"type": "text", "text": user["content"]}]


def _read_message(message: Any, number: int) -> dict[str, Any]:
    """Returns role, content and whether it is `tagged`: ShareGPT's `from` and `value`."""
    if isinstance(message, str):
        message = _from_json(message)
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is {message!r:.60}: give {EXAMPLE}")
    tagged = message.get("role") is None and message.get("from") is not None
    role = message["from"] if tagged else message.get("role")
    if not isinstance(role, str):
        given = "no `role`" if role is None else f"the role {role!r:.60}, which is no text"
        raise ValueError(f"message {number} has {given}; its keys are {sorted(message)}: give {EXAMPLE}")
    role = SPEAKERS.get(role, role) if tagged else role
    content = message.get("value" if tagged else "content")
    name = f"message {number} ({role})"
    if message.get("tool_calls") or message.get("function_call") or role == "function_call":
        raise ValueError(f"{name} calls a tool, which the model's chat template leaves out: write the call as text")
    if content is None:
        raise ValueError(f"{name} has no content: give it a text, or leave the message out")
    if isinstance(content, (bool, int, float)):  # JSON's way with a text that is a number
        content = json.dumps(content)
    if not isinstance(content, str):
        content = [_read_part(part, name) for part in ([content] if isinstance(content, Mapping) else content)]
        if role == "assistant" and any(part["type"] in MEDIA for part in content):
            raise ValueError(f"{name} holds a picture, and answers are text: move it into a user's message")
    return {"role": role, "content": content, "tagged": tagged}


def _read_part(part: Any, name: str) -> dict[str, Any]:
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise _unknown_part(part, name)
    # Arrow gives every part all keys of its siblings; templates take an `image` key, even of None, for an image.
    part = {key: value for key, value in part.items() if value is not None}
    kind = str(part.get("type") or next((key for key in ("text", *MEDIA) if key in part), None))
    kind = PART_TYPES.get(kind, kind)
    if kind == "text" and "text" in part:
        return {"type": "text", "text": str(part["text"])}
    if kind not in MEDIA:
        raise _unknown_part(part, name)
    medium = next((part[key] for key in (kind, f"{kind}_url", "url", "path") if key in part), None)
    timing = {key: part[key] for key in (*TIMING, *CLIP) if key in part}
    return {"type": kind, "medium": {"video": medium, **timing} if timing and medium is not None else medium}


def _unknown_part(part: Any, name: str) -> ValueError:
    return ValueError(f"{name} has a part {part!r:.80}: parts are texts, images and videos, as in {EXAMPLE}")


def _read_column(row: Row, kind: str) -> list[Any]:
    media: Any = next((row[name] for name in (MEDIA[kind], kind) if row.get(name) is not None), [])
    if isinstance(media, str) and media.startswith("["):
        media = _from_json(media)
    return [medium for medium in (media if isinstance(media, (list, tuple)) else [media]) if medium is not None]


def _timed(row: Row, videos: list[Any]) -> list[Any]:
    """Videos of a row with its columns `fps` and `timestamps`, which are not meant for files: these know their own."""
    for key in TIMING:
        values = row.get(key)
        if values is None or not videos:
            continue
        shared = not isinstance(values, (list, tuple)) or (
            key == "timestamps" and len(videos) == 1 and not isinstance(next(iter(values), None), (list, tuple))
        )
        values = [values] * len(videos) if shared else values
        if len(values) != len(videos):
            raise ValueError(f"it has {len(values)} `{key}` for {len(videos)} videos: give one for each")
        videos = [
            {"video": video, key: value} if value is not None and _is_frames(video) else video
            for video, value in zip(videos, values)
        ]
    return videos


def _is_frames(video: Any) -> bool:
    if isinstance(video, Mapping):
        return video.get("frames") is not None and not any(key in video for key in TIMING)
    if isinstance(video, (str, Path)):
        return not str(video).startswith("data:") and os.path.isdir(str(video).removeprefix("file://"))
    return not isinstance(video, bytes)


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"{text[:60]!r} is neither a message nor JSON: give messages such as {EXAMPLE}") from None


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
