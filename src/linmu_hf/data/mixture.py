"""Several datasets as one, in shares that a file gives."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .formats import Row, fetch
from .loading import iterate, load_rows, undecoded


STOPPING = ("first_exhausted", "all_exhausted")
SOURCE_KEYS = ("path", "weight", "split", "config_name", "layout", "media_folder")
EXAMPLE = """
    datasets:
      - {path: llava.json, weight: 0.7}
      - {path: clips, weight: 0.3, split: train, media_folder: /data/videos}
"""


class Mixture:
    """
    Rows of several datasets in shares, at random access.

    Each dataset is shuffled once, by `seed`. The order is that in which the dataset furthest behind its share
    gives the next row: every prefix holds the shares to within a row of each dataset.

    Args:
        datasets (`Sequence[Sequence[Mapping]]`): The datasets.
        weights (`Sequence[float]`): Share of each in the rows, before they are divided by their sum.
        seed (`int`, *optional*, defaults to 0): Decides which rows come when.
        stopping (`str`, *optional*, defaults to `"first_exhausted"`):
            `"first_exhausted"` ends where a dataset would have to give a row twice. `"all_exhausted"` goes on until
            every row of every dataset has come; the smaller ones begin anew meanwhile.
        names (`Sequence[str]`, *optional*): What the datasets are called in errors.

    Raises:
        `ValueError`: Weights that are not positive or not one for each dataset, another `stopping`.
    """

    def __init__(
        self,
        datasets: Sequence[Sequence[Row]],
        weights: Sequence[float],
        seed: int = 0,
        stopping: str = "first_exhausted",
        names: Sequence[str] | None = None,
    ):
        shares = normalize(weights, len(datasets), stopping)
        self.datasets = [undecoded(dataset) for dataset in datasets]
        self.names = list(names or (f"dataset {index}" for index in range(len(datasets))))
        whole = [len(dataset) / share for dataset, share in zip(datasets, shares)]
        ends = [math.floor(min(whole) + 1e-9), math.ceil(max(whole) - 1e-9)]
        total = max(ends[STOPPING.index(stopping)], 1)
        self.sources = np.fromiter(furthest_behind(shares), dtype=np.int64, count=total)  # [total], datasets
        self.indices = np.empty(total, dtype=np.int64)  # [total], rows of their datasets
        random = np.random.default_rng(seed)
        for source, dataset in enumerate(self.datasets):
            places = np.flatnonzero(self.sources == source)
            rounds = -(-len(places) // len(dataset))
            orders = [random.permutation(len(dataset)) for _ in range(rounds)]
            self.indices[places] = np.concatenate([*orders, np.empty(0, np.int64)])[: len(places)]

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a mixture of {len(self)}")
        source, row = int(self.sources[index]), int(self.indices[index])
        try:
            return fetch(self.datasets[source], row)
        except ValueError as error:
            raise ValueError(f"{self.names[source]}, {error}") from error


class StreamMixture:
    """
    Rows of several streams in shares; iterating again gives the same rows.

    `datasets.interleave_datasets` draws at random among streams whose columns have one type. Here columns may differ,
    and the stream furthest behind its share gives the next row, so that every prefix holds the shares.

    Args:
        streams (`Sequence[Iterable[Mapping]]`): The streams, each of which can be iterated several times.
        weights (`Sequence[float]`): Share of each in the rows, before they are divided by their sum.
        stopping (`str`, *optional*, defaults to `"first_exhausted"`):
            `"first_exhausted"` ends with the first stream that has no row left when it has to give one.
            `"all_exhausted"` goes on until all have ended; those that end earlier begin anew meanwhile.
        names (`Sequence[str]`, *optional*): What the streams are called in errors.
    """

    def __init__(self, streams, weights: Sequence[float], stopping=STOPPING[0], names: Sequence[str] | None = None):
        self.streams, self.shares = list(streams), normalize(weights, len(streams), stopping)
        self.stopping = stopping
        self.names = list(names or (f"dataset {index}" for index in range(len(self.streams))))

    def __iter__(self) -> Iterator[Row]:
        iterators = [iterate(stream) for stream in self.streams]
        ended: set[int] = set()
        for source in furthest_behind(self.shares):
            row = next(iterators[source], None)
            if row is None:
                ended.add(source)
                if self.stopping == STOPPING[0] or len(ended) == len(self.streams):
                    return
                iterators[source] = iterate(self.streams[source])
                row = next(iterators[source], None)
                if row is None:
                    raise ValueError(f"{self.names[source]} has no rows: leave it out")
            yield row

    def set_epoch(self, epoch: int) -> None:
        """Tells streams that shuffle themselves which pass it is."""
        for stream in self.streams:
            if hasattr(stream, "set_epoch"):
                stream.set_epoch(epoch)


def furthest_behind(shares: Sequence[float]) -> Iterator[int]:
    """Yields, without end, which dataset gives the next row: the one that is furthest behind its share."""
    given = [0] * len(shares)
    for place in itertools.count(1):
        lags = [share * place - count for share, count in zip(shares, given)]
        source = lags.index(max(lags))
        given[source] += 1
        yield source


def load_mixture(file: str, split: str = "train", *, streaming: bool = False, seed: int = 0):
    """
    Loads the datasets that a YAML file lists, as one.

    ```yaml
    datasets:
      - {path: llava.json, weight: 0.7}
      - {path: lmms-lab/LLaVA-OneVision-Data, config_name: chartqa, weight: 0.3}
    stopping: first_exhausted
    ```

    Args:
        file (`str`):
            The file. Every entry of `datasets` has a `path` and may have a `weight` (by default its rows: then all
            datasets are joined in proportion to their sizes), `split`, `config_name`, `layout` and `media_folder`, as
            [`load_rows`] takes them. Relative paths are looked up beside the file, too.
        split (`str`, *optional*, defaults to `"train"`): Which split, where an entry names none.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to stream: rows then come in the order of their datasets.
        seed (`int`, *optional*, defaults to 0): Decides the order of the rows, unless they are streamed.

    Returns:
        [`Mixture`] or [`StreamMixture`].

    Raises:
        `ValueError`: An entry that cannot be understood; shows one that would work.
    """
    entries, stopping = _read_file(Path(file).expanduser())
    names = [entry["path"] for entry in entries]
    options = [
        {"split": split, **{key: value for key, value in entry.items() if key not in ("path", "weight")}}
        for entry in entries
    ]
    datasets = [load_rows(name, streaming=streaming, **kwargs) for name, kwargs in zip(names, options)]
    weights: list[Any] = [entry.get("weight") for entry in entries]
    if all(weight is None for weight in weights):
        if streaming:
            raise ValueError(f"{file} gives no weights, and streams have no length to take them from: give `weight`")
        weights = [len(dataset) for dataset in datasets]
    if None in weights:
        missing = names[weights.index(None)]
        raise ValueError(f"{file} gives some weights and none for {missing}: give all or none")
    if streaming:
        return StreamMixture(datasets, weights, stopping, names)
    return Mixture(datasets, weights, seed, stopping, names)


def load_training_rows(path: str, split: str = "train", *, streaming: bool = False, seed: int = 0):
    """Loads a mixture if `path` ends in `.yaml` or `.yml`, else one dataset: [`load_mixture`], [`load_rows`]."""
    if Path(path).suffix in (".yaml", ".yml"):
        return load_mixture(path, split, streaming=streaming, seed=seed)
    return load_rows(path, split, streaming=streaming)


def normalize(weights: Sequence[float], n: int, stopping: str = STOPPING[0]) -> list[float]:
    """Returns weights that sum to 1, or raises the `ValueError` of the first that is not a positive number."""
    if stopping not in STOPPING:
        raise ValueError(f"stopping={stopping!r} must be one of {', '.join(STOPPING)}")
    if len(weights) != n or n == 0:
        raise ValueError(f"{len(weights)} weights for {n} datasets: give one for each")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ValueError(f"weight={weight!r} must be a positive number: leave the dataset out if it is 0")
    return [weight / math.fsum(weights) for weight in weights]


def _read_file(file: Path) -> tuple[list[dict[str, Any]], str]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    entries = content.get("datasets") if isinstance(content, Mapping) else None
    if not isinstance(entries, list) or not entries or not set(content) <= {"datasets", "stopping"}:
        raise ValueError(f"{file} is no mixture: it has `datasets` and, at most, `stopping`, as in{EXAMPLE}")
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or "path" not in entry or not set(entry) <= set(SOURCE_KEYS):
            raise ValueError(f"{file}, entry {number} is {entry!r:.120}: its keys are `path` and {SOURCE_KEYS[1:]}")
    return [_beside_file(dict(entry), file.parent) for entry in entries], content.get("stopping", STOPPING[0])


def _beside_file(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    for key in ("path", "media_folder"):
        value = entry.get(key)
        if value is not None and not Path(value).expanduser().exists() and (folder / value).exists():
            entry[key] = str(folder / value)
    return entry
