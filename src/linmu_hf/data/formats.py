"""Where rows come from, and the shapes they come in: each becomes `messages` with its `images` and `videos`."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


Row = Mapping[str, Any]

MEDIA = {"image": "images", "video": "videos"}
FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool"}  # of ShareGPT
PART_TYPES = {"image_url": "image", "video_url": "video", "input_image": "image", "input_text": "text"}
EXAMPLE = '{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]}'


def load_rows(path: str, split: str = "train"):
    """
    Loads one split of a dataset, with pictures and videos undecoded.

    Args:
        path (`str`):
            A folder written by `save_to_disk`, a JSON Lines or Parquet file, or anything that `datasets.load_dataset`
            opens. Relative paths of media are looked up beside the file or in the folder, too.
        split (`str`, *optional*, defaults to `"train"`):
            Which split; a single file is taken for any.

    Raises:
        `FileNotFoundError`: No such dataset.
        `ValueError`: No such split, an empty one, or files that cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("reading a dataset needs `datasets`: pip install 'linmu-hf[train]'") from error
    folder = Path(path).expanduser()
    if folder.is_file() and folder.suffix not in FILES:
        raise ValueError(f"{path} is no dataset: give a folder, or a file that ends in {', '.join(FILES)}")
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            dataset = datasets.load_from_disk(str(folder))
        elif folder.is_file():
            dataset = datasets.load_dataset(FILES[folder.suffix], data_files={split: str(folder)})
        else:
            dataset = datasets.load_dataset(str(folder) if folder.exists() else str(path))
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        if folder.exists():
            raise FileNotFoundError(f"{path} holds nothing that `datasets` can read: {_first_line(error)}") from error
        raise FileNotFoundError(f"there is no folder {path}, and no dataset of that name on the Hub") from error
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(f"{path} cannot be read: {_first_line(error.__cause__ or error)}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise ValueError(f"dataset {path} has no split {split!r}: it has {list(dataset)}")
        dataset = dataset[split]
    if len(dataset) == 0:
        raise ValueError(f"dataset {path} has no rows in split {split!r}")
    if "messages" not in dataset.column_names and "conversations" in dataset.column_names:
        dataset = dataset.rename_column("conversations", "messages")
    if folder.exists():
        dataset = _find_files(dataset, str((folder if folder.is_dir() else folder.parent).absolute()))
    return undecoded(dataset)


def undecoded(dataset):
    """Returns the dataset with pictures and videos as paths or bytes, so that a damaged one fails where it is read."""
    if not hasattr(dataset, "features") or not hasattr(dataset, "data") or dataset.format["type"] is not None:
        return dataset  # a list, a stream, or a dataset with a transform
    info = dataset.info.copy()
    info.features = type(dataset.features)({name: _undecoded(kind) for name, kind in dataset.features.items()})
    if info.features == dataset.features:
        return dataset
    # `cast` would copy all bytes.
    return type(dataset)(dataset.data, info, dataset.split, dataset._indices, dataset._fingerprint)


def raw_rows(dataset) -> Iterator[Row | ValueError]:
    """Yields each row without decoding it, or the error that reading it raises; no picture's bytes are copied."""
    dataset = undecoded(dataset)
    if not hasattr(dataset, "with_format") or not hasattr(dataset, "data") or dataset.format["type"] is not None:
        if not hasattr(dataset, "__len__"):
            yield from dataset
            return
        for index in range(len(dataset)):
            try:
                yield fetch(dataset, index)
            except ValueError as error:
                yield error
        return
    columns = ("messages", "conversations", "system", *MEDIA, *MEDIA.values())
    dataset = dataset.select_columns(
        [name for name in columns if name in dataset.column_names] or dataset.column_names
    )
    for table in dataset.with_format("arrow").iter(256):
        for i in range(table.num_rows):
            yield dataset.features.decode_example(
                {name: _to_python(table[name].slice(i, 1)) for name in table.column_names}
            )


def fetch(rows: Sequence[Row], index: int) -> Row:
    """Returns row number `index`; the `ValueError` names it if the dataset cannot make it."""
    try:
        return rows[index]
    except Exception as error:
        raise ValueError(f"row {index} cannot be read: {_first_line(error)}") from error


def read_row(row: Row, index: int = 0) -> dict[str, Any]:
    """
    Reads a row of any known shape.

    Args:
        row (`Mapping`):
            A row with `messages` (or `conversations`, ShareGPT's `from` and `value` with `<image>` and `<video>`), as
            such or as JSON. A picture or video is in its part of a message or, if the part names none, the next one
            of the column `images` or `videos` (or `image`, `video`).
        index (`int`, *optional*, defaults to 0):
            The row's number, for errors.

    Returns:
        `dict`: the row with `messages` whose content is a string or a list of `{"type": "text", "text": ...}`,
        `{"type": "image"}` and `{"type": "video"}`, and all its `images` and `videos` in the order of their parts.

    Raises:
        `ValueError`: names the row, and says what to do.
    """
    try:
        messages = _read_messages(row)
        columns = {kind: _read_column(row, kind) for kind in MEDIA}
        media: dict[str, list[Any]] = {column: [] for column in MEDIA.values()}
        wanted = dict.fromkeys(MEDIA, 0)
        for message in messages:
            for part in message["content"] if isinstance(message["content"], list) else []:
                kind = part["type"]
                if kind in MEDIA:
                    medium = part.pop("medium")
                    wanted[kind] += medium is None
                    if medium is None and columns[kind]:
                        medium = columns[kind].pop(0)
                    media[MEDIA[kind]].append(medium)
    except ValueError as error:
        raise ValueError(f"row {index}: {error}") from None
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
    """Returns the row's number and the beginning of its first text."""
    return f"row {index} ({next(filter(None, texts_of(row)), '')[:60]!r})"


def texts_of(row: Row) -> Iterator[str]:
    """Yields all texts of a row that was read."""
    for message in row["messages"]:
        content = message["content"]
        yield from [content] if isinstance(content, str) else (part["text"] for part in content if "text" in part)


def _read_messages(row: Row) -> list[dict[str, Any]]:
    messages = row.get("messages") or row.get("conversations")
    if isinstance(messages, str):
        messages = _from_json(messages)
    if isinstance(messages, Mapping):  # columns, as old versions of datasets store lists of dicts
        messages = [dict(zip(messages, values)) for values in zip(*messages.values())]
    if not messages:
        raise ValueError(f"it has no `messages`; its columns are {sorted(row)}: give messages such as {EXAMPLE}")
    messages = [_read_message(message, number) for number, message in enumerate(messages)]
    if isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(
            f"it has no assistant turn to learn from: its roles are {[message['role'] for message in messages]}"
        )
    return messages


def _read_message(message: Any, number: int) -> dict[str, Any]:
    if isinstance(message, str):
        message = _from_json(message)
    if not isinstance(message, Mapping):
        raise ValueError(f"message {number} is {message!r:.60}: give {EXAMPLE}")
    tagged = message.get("role") is None and message.get("from") is not None
    role = SPEAKERS.get(message["from"], message["from"]) if tagged else message.get("role")
    content = message.get("value" if tagged else "content")
    name = f"message {number} ({role})"
    if role is None:
        raise ValueError(f"{name} has no `role`; its keys are {sorted(message)}: give {EXAMPLE}")
    if message.get("tool_calls") or message.get("function_call") or role == "function_call":
        raise ValueError(f"{name} calls a tool, which the model's chat template leaves out: write the call as text")
    if content is None:
        raise ValueError(f"{name} has no content: give it a text, or leave the message out")
    if tagged and isinstance(content, str) and role != "assistant":
        parts = re.split("<(image|video)>", content)  # texts and kinds in turn
        content = [{"type": kind} if i % 2 else kind.strip() for i, kind in enumerate(parts) if i % 2 or kind.strip()]
    if isinstance(content, (bool, int, float)):  # JSON's way with a text that is a number
        content = json.dumps(content)
    if not isinstance(content, str):
        content = [_read_part(part, name) for part in ([content] if isinstance(content, Mapping) else content)]
        if role == "assistant" and any(part["type"] in MEDIA for part in content):
            raise ValueError(f"{name} holds a picture, and answers are text: move it into a user's message")
    return {"role": role, "content": content}


def _read_part(part: Any, name: str) -> dict[str, Any]:
    if isinstance(part, str):
        part = {"type": "text", "text": part}
    # Arrow gives every part all keys of its siblings; templates take an `image` key, even of None, for an image.
    part = {key: value for key, value in part.items() if value is not None}
    kind: Any = part.get("type") or next((key for key in ("text", *MEDIA) if key in part), None)
    kind = PART_TYPES.get(kind, kind)
    if kind == "text" and "text" in part:
        return {"type": "text", "text": str(part["text"])}
    if kind not in MEDIA:
        raise ValueError(f"{name} has a part {part!r:.80}: parts are texts, images and videos, as in {EXAMPLE}")
    medium = next((part[key] for key in (kind, f"{kind}_url", "url", "path") if key in part), None)
    if "fps" in part and medium is not None:
        medium = {"video": medium, "fps": part["fps"]}
    return {"type": kind, "medium": medium}


def _read_column(row: Row, kind: str) -> list[Any]:
    media: Any = next((row[name] for name in (MEDIA[kind], kind) if row.get(name) is not None), [])
    if isinstance(media, str) and media.startswith("["):
        media = _from_json(media)
    return [medium for medium in (media if isinstance(media, (list, tuple)) else [media]) if medium is not None]


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"{text[:60]!r} is neither a message nor JSON: give messages such as {EXAMPLE}") from None


def _undecoded(kind: Any) -> Any:
    if isinstance(kind, dict):
        return {name: _undecoded(inner) for name, inner in kind.items()}
    if isinstance(kind, list):
        return [_undecoded(inner) for inner in kind]
    if type(kind).__name__ in ("Image", "Video"):
        return dataclasses.replace(kind, decode=False)
    return dataclasses.replace(kind, feature=_undecoded(kind.feature)) if hasattr(kind, "feature") else kind


def _to_python(column) -> Any:
    """The value of an Arrow column of one row; bytes as a file over the memory where they are, as scalars copy."""
    import pyarrow

    values = next(chunk for chunk in column.chunks if len(chunk)) if hasattr(column, "chunks") else column
    if values.null_count:
        return None
    if pyarrow.types.is_struct(values.type):
        return {field.name: _to_python(values.field(i)) for i, field in enumerate(values.type)}
    if pyarrow.types.is_list(values.type) or pyarrow.types.is_large_list(values.type):
        items = values.flatten()
        return [_to_python(items.slice(i, 1)) for i in range(len(items))]
    if pyarrow.types.is_binary(values.type):
        _, offsets, data = values.buffers()
        start, end = np.frombuffer(offsets, np.int32)[values.offset : values.offset + 2].tolist()
        return pyarrow.BufferReader(data.slice(start, end - start)) if data is not None else b""
    return values[0].as_py()


def _find_files(dataset, folder: str):
    """Makes relative paths of media absolute where they are files of the dataset's folder."""
    columns = [
        name
        for name in (*MEDIA, *MEDIA.values())
        if name in dataset.column_names and re.fullmatch(r"(List\()*Value\('string'\)\)*", str(dataset.features[name]))
    ]
    first = next((row for row in dataset.select_columns(columns) if any(row.values())), None) if columns else None
    if first is None or first == _beside(first, folder):
        return dataset
    return dataset.map(_beside, fn_kwargs={"folder": folder, "columns": columns})


def _beside(value: Any, folder: str, columns: Sequence[str] | None = None) -> Any:
    if isinstance(value, Mapping):
        return {key: _beside(value[key], folder) for key in columns or value}
    if isinstance(value, list):
        return [_beside(item, folder) for item in value]
    if isinstance(value, str) and value and not Path(value).exists() and Path(folder, value).exists():
        return str(Path(folder, value))
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
