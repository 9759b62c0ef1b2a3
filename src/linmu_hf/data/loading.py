"""Where rows come from: files, folders and the Hub, at random access or as a stream, with media left undecoded."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .formats import MEDIA, MEDIUM_KEYS, Row, fetch, first_line
from .json_stream import AS_UTF8, read_json_rows
from .layouts import COLUMNS, IN_PARTS, OPTIONAL, check_layout, other_columns


FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
QUESTIONS, ANSWERS = "_q.json", "_a.json"  # how ActivityNet-QA names its two lists
VIDEO_NAMES = [f"{prefix}{{}}{suffix}" for prefix in ("v_", "") for suffix in (".mp4", ".mkv", ".webm")]
VIDEO_FOLDERS = ("", "videos", "all_test")


def load_rows(
    path: str,
    split: str = "train",
    *,
    streaming: bool = False,
    config_name: str | None = None,
    layout: str | None = None,
    media_folder: str | None = None,
):
    """
    Loads one split of a dataset, with pictures and videos undecoded.

    Args:
        path (`str`):
            A folder written by `save_to_disk`, a JSON (one list, or JSON Lines) or Parquet file, or anything that
            `datasets.load_dataset` opens. Relative paths of media are looked up beside the file or in the folder, too.
            Of ActivityNet-QA's two lists give the questions, such as `val_q.json`: the answers are read beside it.
        split (`str`, *optional*, defaults to `"train"`):
            Which split; a single file is taken for any.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to return a `datasets.IterableDataset`, which reads rows as they are needed.
        config_name (`str`, *optional*): Which configuration of a dataset that has several.
        layout (`str`, *optional*):
            Which layout the rows have, by its name in `layouts.py`; by default every row shows it by its columns.
        media_folder (`str`, *optional*): Where else relative paths of media are looked up.

    Raises:
        `FileNotFoundError`: No such dataset.
        `ValueError`: No such split, an empty one, or files that cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("reading a dataset needs `datasets`: pip install 'linmu-hf[train]'") from error
    check_layout(layout)
    if not str(path).strip():
        raise ValueError("the dataset's path is empty: give a folder, a file, or a name on the Hub")
    folder = Path(path).expanduser()
    if folder.is_file() and folder.suffix not in FILES:
        raise ValueError(f"{path} is no dataset: give a folder, or a file that ends in {', '.join(FILES)}")
    if media_folder is not None and not Path(media_folder).expanduser().is_dir():
        raise FileNotFoundError(f"media_folder={media_folder} is no folder: leave it out, or name one that is there")
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            dataset = datasets.load_from_disk(str(folder))
        elif folder.is_file() and folder.name.endswith(QUESTIONS):
            dataset = datasets.Dataset.from_list(_join_answers(folder))
        else:
            dataset = _open(folder, path, split, streaming, config_name)
        if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
            if split not in dataset:
                raise ValueError(f"dataset {path} has no split {split!r}: it has {list(dataset)}")
            dataset = dataset[split]
        if streaming and isinstance(dataset, datasets.Dataset):
            dataset = dataset.to_iterable_dataset()
        dataset = undecoded(dataset)
        empty = next(iter(dataset), None) is None if streaming else len(dataset) == 0
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        if folder.exists():
            raise FileNotFoundError(f"{path} holds nothing that `datasets` can read: {first_line(error)}") from error
        raise FileNotFoundError(f"there is no folder {path}, and no dataset of that name on the Hub") from error
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(f"{path} cannot be read: {first_line(error.__cause__ or error)}") from error
    if empty:
        raise ValueError(f"dataset {path} has no rows in split {split!r}")
    if layout is not None:
        others = other_columns(layout)
        dataset = dataset.remove_columns(
            [c for c in others if dataset.column_names is None or c in dataset.column_names]
        )
    folders = [folder if folder.is_dir() else folder.parent] if folder.exists() else []
    folders += [Path(media_folder).expanduser()] if media_folder else []
    try:
        return _find_files(dataset, [str(place.absolute()) for place in folders])
    except UnicodeDecodeError as error:  # Arrow takes any bytes for a text until it is read
        raise ValueError(f"{path} cannot be read: {error}: {AS_UTF8}") from error


def choose_split(path: str, split: str | None, default: str, option: str = "--split") -> str:
    """
    Returns the split to read: `split`, or `default` where none is named.

    Raises:
        `ValueError`: One is named of a single file, which is read whole.
    """
    if split is not None and is_single_file(path):
        raise ValueError(f"{option} {split} has no effect: {path} is a single file, which is read whole. Leave it out")
    return split or default


def is_single_file(path: str) -> bool:
    """Returns whether a dataset is one file of rows, which has no splits."""
    file = Path(path).expanduser()
    return file.suffix in FILES and file.is_file()


def _open(folder: Path, path: str, split: str, streaming: bool, config_name: str | None):
    """Opens a file, a folder or a dataset of the Hub with `datasets`, whose errors often name no file."""
    import datasets

    files = {split: str(folder)} if folder.is_file() else None
    kind = FILES[folder.suffix] if files else str(folder.resolve() if folder.exists() else path)
    if kind == "json" and files and next(read_json_rows([str(folder)]), None) is None:
        raise ValueError(f"dataset {path} has no rows")
    try:
        return (_stream if streaming else datasets.load_dataset)(kind, config_name, data_files=files)
    except StopIteration:  # a folder of empty files
        raise ValueError(f"dataset {path} has no rows") from None
    except ValueError as error:
        remedy = f": {AS_UTF8}" if isinstance(error, UnicodeDecodeError) else ""
        reason = "it has no rows" if "corresponds to no data" in str(error) else " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read: {reason}{remedy}") from error


def _stream(kind: str, config_name: str | None, data_files: dict[str, str] | None):
    """Opens the splits of a dataset as streams, those of JSON files by our own reader."""
    import datasets
    from datasets.packaged_modules.json.json import Json

    builder = datasets.load_dataset_builder(kind, config_name, data_files=data_files)
    if not isinstance(builder, Json):
        return builder.as_streaming_dataset()
    return datasets.IterableDatasetDict(
        {
            str(split): datasets.IterableDataset.from_generator(read_json_rows, gen_kwargs={"files": list(files)})
            for split, files in builder.config.data_files.items()
        }
    )


def undecoded(dataset):
    """Returns the dataset with pictures and videos as paths or bytes, so that a damaged one fails where it is read."""
    if hasattr(dataset, "features") and hasattr(dataset, "decode"):  # a stream
        return dataset.decode(False) if dataset.features else dataset
    if not hasattr(dataset, "features") or not hasattr(dataset, "data") or dataset.format["type"] is not None:
        return dataset  # a list, or a dataset with a transform
    info = dataset.info.copy()
    info.features = type(dataset.features)({name: _undecoded(kind) for name, kind in dataset.features.items()})
    if info.features == dataset.features:
        return dataset
    # `cast` would copy all bytes.
    return type(dataset)(dataset.data, info, dataset.split, dataset._indices, dataset._fingerprint)


def iterate(dataset) -> Iterator[Row]:
    """
    Yields the rows of a stream or sequence, all of them also in a worker of a DataLoader, where `datasets` would give
    each worker the files of its own.
    """
    if hasattr(dataset, "iter") and not hasattr(dataset, "data"):
        for batch in dataset.iter(1):
            yield {name: values[0] for name, values in batch.items()}
    else:
        yield from dataset


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
    columns = ("id", *COLUMNS, *OPTIONAL, "fps", "timestamps", *MEDIA, *MEDIA.values())
    dataset = dataset.select_columns(
        [name for name in columns if name in dataset.column_names] or dataset.column_names
    )
    tables = dataset.with_format("arrow").iter(256)
    for number, (table, i) in enumerate((part, i) for part in tables for i in range(part.num_rows)):
        try:
            yield dataset.features.decode_example(
                {name: _to_python(table[name].slice(i, 1)) for name in table.column_names}
            )
        except UnicodeDecodeError as error:
            yield ValueError(f"row {number} cannot be read: {error}: {AS_UTF8}")


def _join_answers(questions: Path) -> list[dict[str, Any]]:
    """The questions of ActivityNet-QA with their answers, which a second list holds."""
    answers = questions.with_name(questions.name.removesuffix(QUESTIONS) + ANSWERS)
    if not answers.is_file():
        raise ValueError(f"{questions} holds questions, and there is no {answers.name} beside it that answers them")
    try:
        by_id = {row["question_id"]: row for row in json.loads(answers.read_text())}
        rows = [{"id": row["question_id"], **row} for row in json.loads(questions.read_text())]
        return [{**row, **by_id[row["question_id"]]} for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{questions} and {answers.name} cannot be joined ({type(error).__name__}: {first_line(error)}): both are "
            "JSON lists whose entries have a `question_id`"
        ) from error


# ---- Media on disk


def _find_files(dataset, folders: Sequence[str]):
    """Makes relative paths of media absolute where they are files of one of the folders."""
    names = ("video_name", *MEDIA, *MEDIA.values(), *IN_PARTS)
    if not hasattr(dataset, "data"):
        columns = [name for name in names if dataset.column_names is None or name in dataset.column_names]
        return dataset.map(partial(_found, folders=folders, columns=columns)) if folders and columns else dataset
    columns = [name for name in names if name in dataset.column_names and _holds_paths(name, dataset.features[name])]
    if not columns or not folders:
        return dataset
    features = dataset.features.copy()
    if "video_name" in columns and ("video" not in features or getattr(features["video"], "dtype", "") == "null"):
        features["video"] = type(features["video_name"])("string")
    extra = [name for name in ("data_source",) if name in dataset.column_names]
    hashed, changed, start = hashlib.sha256(dataset._fingerprint.encode()), False, 0
    for batch in dataset.select_columns([*columns, *extra]).iter(1000):
        rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
        for number, row in enumerate(rows, start):
            found = _found(row, folders, columns)
            if any(row.get(name) != value for name, value in found.items()):
                changed = True
                hashed.update(f"{number}{found}".encode(errors="surrogatepass"))
        start += len(rows)
    if not changed:
        return dataset
    # Named by the files that are there, so that what was stored before one came is not taken again.
    return dataset.map(
        partial(_found, folders=folders, columns=columns), features=features, new_fingerprint=hashed.hexdigest()[:32]
    )


def _found(row: Row, folders: Sequence[str], columns: Sequence[str]) -> dict[str, Any]:
    """The columns of a row with the whole paths of its files; `video` for a `video_name` of ActivityNet-QA."""
    source = row.get("data_source")  # LLaVA-Video-178K: the folder in which `video` is
    inner = [str(Path(folder, source)) for folder in folders if source] if isinstance(source, str) else []
    places = [*folders, *inner]
    found = {name: _beside(row[name], places, name not in IN_PARTS) for name in columns if name in row}
    found.pop("video_name", None)
    name = row.get("video_name") if "video_name" in columns else None
    if name is not None and all(row.get(column) is None for column in ("video", "videos")):
        files = (Path(p, f, form.format(name)) for p in places for f in VIDEO_FOLDERS for form in VIDEO_NAMES)
        found["video"] = next((str(file) for file in files if os.path.exists(file)), None)
    return found


def _beside(value: Any, folders: Sequence[str], is_medium: bool) -> Any:
    def whole(path: str) -> str:
        if not 0 < len(path) < 4096 or os.path.isabs(path) or os.path.exists(path):
            return path
        return next(
            (str(Path(folder, path)) for folder in folders if os.path.exists(os.path.join(folder, path))), path
        )

    return _each_path(value, whole, is_medium)


def _each_path(value: Any, change: Callable[[str], str], is_medium: bool) -> Any:
    """Returns the value with its paths changed: all texts of a medium, those of the parts in a conversation."""
    if isinstance(value, Mapping):
        return {key: _each_path(inner, change, is_medium or key in MEDIUM_KEYS) for key, inner in value.items()}
    if isinstance(value, list):
        return [_each_path(item, change, is_medium) for item in value]
    return change(value) if is_medium and isinstance(value, str) else value


def _holds_paths(column: str, kind: Any) -> bool:
    text = str(kind)
    if column in IN_PARTS and "Json" not in text and not any(f"'{key}'" in text for key in MEDIUM_KEYS):
        return False
    return (
        ("string" in text or "Json" in text) and "binary" not in text and "Image" not in text and "Video" not in text
    )


# ---- Arrow


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
