"""The rows of a distillation: opened as what they are, checked before work starts."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import Subset

from ...data import Row
from ...data.loading import iterate
from ...data.rows import bad_rows
from ...data.skipping import SkippedRows
from .collator import EncodedDataset
from .stream import EncodedStream


TrainingRows = EncodedDataset | EncodedStream
GROUPED = "group_by_length"


def open_rows(config, processor, dataset) -> TrainingRows:
    """
    Returns rows as features: of a dataset with a length at random access, of another one as a stream.

    Args:
        config (`DistillConfig`): The arguments.
        processor (`ProcessorMixin`): The student's processor.
        dataset (`datasets.Dataset`, `Sequence[Mapping]`, `datasets.IterableDataset` or `Iterable[Mapping]`): The rows.

    Raises:
        `ValueError`: An argument that has no effect on a stream.
    """
    skipped = SkippedRows(config.max_bad_rows)
    if hasattr(dataset, "__len__"):
        cache_bytes = int(config.feature_cache_gb * 2**30)
        return EncodedDataset(processor, dataset, cache_bytes=cache_bytes, skipped=skipped)
    if config.train_sampling_strategy == GROUPED:
        raise ValueError(
            f"train_sampling_strategy={GROUPED!r} needs rows that have a length, and these are streamed: use "
            "packing=True, or load them without streaming"
        )
    buffer_size = 0 if config.train_sampling_strategy == "sequential" else config.shuffle_buffer_size
    return EncodedStream(processor, dataset, buffer_size=buffer_size, skipped=skipped)


def open_held_out(config, processor, dataset) -> EncodedDataset | None:
    """
    Returns held-out rows as features, after a look at all of them; `None` where there are none.

    Raises:
        `ValueError`: A stream, or a bad row.
    """
    if dataset is None:
        return None
    if not hasattr(dataset, "__len__"):
        raise ValueError("eval_dataset has no length: take some rows of the stream, `list(stream.take(500))`")
    features = open_rows(config, processor, dataset)
    try:
        check_rows(features)
    except ValueError as error:
        raise ValueError(f"eval_dataset: {error}") from error
    assert isinstance(features, EncodedDataset)
    return features


def check_rows(features: TrainingRows) -> None:
    """
    Raises the `ValueError` of the first row that is one bad row too many; of a stream only the first rows are read.
    What is bad in all rows, such as a template that does not fit the processor, is found in the first one.
    """
    if isinstance(features, EncodedStream):
        if not any(row.load() is not None for row in features.once()):
            raise ValueError("no row of the dataset can be read")
        return
    if len(features) == 0:
        raise ValueError("the dataset has no rows")
    for number, error in bad_rows(features.rows, features.processor, progress=True):
        features.skipped.skip(number, error)
    if not any(features[index] is not None for index in range(len(features))):
        raise ValueError("no row of the dataset can be read")


def readable_rows(features: TrainingRows):
    """Returns the rows of the dataset; where some may be bad, those that can be encoded."""
    if features.skipped.limit == 0:
        return features.rows
    if isinstance(features, EncodedStream):
        return ReadableStream(features)
    return Subset(features.rows, [index for index in range(len(features)) if features[index] is not None])


class ReadableStream:
    """The rows of a stream that can be encoded, once and in order."""

    def __init__(self, stream: EncodedStream):
        self.stream = stream

    def __iter__(self) -> Iterator[Row]:
        return (row.row for row in self.stream.once() if row.load() is not None)


def first_row(features: TrainingRows) -> Row | Mapping[str, Any]:
    """Returns the first row of the dataset as it is stored."""
    return next(iterate(features.rows))
