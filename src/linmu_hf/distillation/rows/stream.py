"""Rows of a stream as model features, in an order that depends on nothing but the seed."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ...data import Row
from ...data.lengths import count_tokens
from ...data.loading import iterate, undecoded
from ...data.skipping import RowError, SkippedRows
from .collator import EncodedDataset, EncodePseudo, Item, StoredTopK


class StreamedRow(NamedTuple):
    """A row of a stream that is not encoded yet: the collator does that, for the rows of its own batches alone."""

    stream: "EncodedStream"
    row: Row
    number: int

    def load(self) -> Item | None:
        """Encodes the row; `None` if it is left out."""
        stream = self.stream
        rows = EncodedDataset(
            stream.processor,
            {self.number: self.row},
            stream.encode_pseudo,
            stored_topk=stream.stored_topk,
            skipped=stream.skipped,
        )
        return rows[self.number]

    def count_tokens(self) -> int:
        """Returns the number of tokens that the row becomes; 1 if it cannot be read, which [`load`] reports."""
        try:
            return count_tokens(self.stream.processor, self.row, self.number)
        except ValueError:
            return 1


class EncodedStream(IterableDataset):
    """
    Rows of a stream without end: after the last row it begins anew, in another order.

    It yields [`StreamedRow`]s, which [`DistillCollator`] encodes. Every process and every worker reads all rows and
    encodes those of its own batches, so that two processes see what one with batches of twice the size sees, and any
    number of workers what none sees. `accelerate` must not dispatch batches (`dispatch_batches=False`), as pixels of
    several rows are one tensor.

    Args:
        processor (`ProcessorMixin`): The student's processor.
        rows (`Iterable[Mapping]`):
            A `datasets.IterableDataset`, a mixture or any other iterable of rows that can be iterated several times.
        encode_pseudo (`Callable[[Row, int], Features]`, *optional*):
            Encodes a row, given with its number, with the teacher's answers in place of the true ones.
        stored_topk (`Callable[[Row, Features, int], Features]`, *optional*):
            Returns the fields `topk_ids` and `topk_logprobs` [t, k] for a row and its features.
        buffer_size (`int`, *optional*, defaults to 0):
            Rows in memory among which the next one is drawn; 0 keeps the order.
        seed (`int`, *optional*, defaults to 0): Decides the draws.
        batch_size (`int`, *optional*, defaults to 1):
            Rows that all processes take for one micro-batch: how workers share the batches.
        skipped (`SkippedRows`, *optional*): How many unreadable rows are left out; by default none.

    Attributes:
        passed (`int`): Rows, or packs, that a run which goes on has learned from: nothing of them is encoded again.
    """

    passed = 0

    def __init__(
        self,
        processor,
        rows: Iterable[Row],
        encode_pseudo: EncodePseudo | None = None,
        stored_topk: StoredTopK | None = None,
        buffer_size: int = 0,
        seed: int = 0,
        batch_size: int = 1,
        skipped: SkippedRows | None = None,
    ):
        if buffer_size < 0:
            raise ValueError(f"shuffle_buffer_size={buffer_size} must not be negative: 0 keeps the order")
        self.processor, self.rows = processor, undecoded(rows)
        self.encode_pseudo, self.stored_topk = encode_pseudo, stored_topk
        self.buffer_size, self.seed, self.batch_size = buffer_size, seed, batch_size
        self.skipped = SkippedRows() if skipped is None else skipped

    def __iter__(self) -> Iterator[StreamedRow]:
        return own_batches(self.in_order(), self.batch_size, self.passed)

    def in_order(self) -> Iterator[StreamedRow]:
        """Yields the rows for all processes and workers, without end."""
        for epoch in itertools.count():
            count = 0
            for number, row in _shuffled(self._numbered(epoch), self.buffer_size, (self.seed, epoch)):
                count += 1
                yield StreamedRow(self, row, number)
            if count == 0:
                raise ValueError("the dataset has no rows")

    def once(self) -> Iterator[StreamedRow]:
        """Yields every row once, in the order of the stream."""
        return (StreamedRow(self, row, number) for number, row in self._numbered(0))

    def _numbered(self, epoch: int) -> Iterator[tuple[int, Row]]:
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)
        rows = iterate(self.rows)
        for number in itertools.count():
            try:
                row = next(rows, None)
            except Exception as error:
                raise RowError(f"row {number} cannot be read, and the stream ends there: {error}") from error
            if row is None:
                return
            yield number, row


def own_batches(items: Iterator, batch_size: int, passed: int = 0) -> Iterator:
    """
    Yields the items of the batches that the DataLoader asks this worker for: every one, if there are no workers. The
    first `passed` items, which the Trainer drops, are lists without a row.
    """
    worker = get_worker_info()
    for place, item in enumerate(items):
        if worker is None or place // batch_size % worker.num_workers == worker.id:
            yield [] if place < passed else item


def _shuffled(items: Iterator, buffer_size: int, seed: tuple[int, int]) -> Iterator:
    """Draws each item from the next `buffer_size` ones."""
    if buffer_size < 2:
        yield from items
        return
    random = np.random.default_rng(seed)
    buffer = list(itertools.islice(items, buffer_size))
    for item in items:
        place = int(random.integers(len(buffer)))
        yield buffer[place]
        buffer[place] = item
    random.shuffle(buffer)
    yield from buffer
