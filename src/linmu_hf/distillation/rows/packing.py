"""Rows of unequal lengths in few tokens of padding: packs of several rows, and batches of rows of like lengths."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, Sampler

from .collator import DistillCollator, EncodedDataset, Item
from .stream import EncodedStream, StreamedRow, own_batches


logger = logging.getLogger(__name__)

OPEN_PACKS = 16  # in which a row may still find room
BATCHES_AT_A_TIME = 50  # whose rows are sorted by length


class PackedDataset(Dataset):
    """
    Packs of rows of at most `max_length` tokens in all; a longer row is a pack of its own, for no row is cut.

    Rows are shuffled once, by `seed`, and each goes into the first of a few open packs that has room.

    Args:
        features (`EncodedDataset`): The rows.
        max_length (`int`): Tokens of a pack.
        seed (`int`, *optional*, defaults to 0): Decides which rows share a pack.
    """

    def __init__(self, features: EncodedDataset, max_length: int, seed: int = 0):
        self.features = features
        lengths = features.lengths()
        longer = sum(length > max_length for length in lengths)
        if longer:
            logger.warning("%d rows are longer than max_length=%d: each is packed alone", longer, max_length)
        order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
        self.packs = list(_fill(((row, lengths[row]) for row in order), max_length))

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[Item | None]:
        return [self.features[row] for row in self.packs[index]]


class PackedStream(IterableDataset):
    """Packs of a stream's rows, as [`PackedDataset`] has them; `stream.batch_size` counts packs."""

    def __init__(self, stream: EncodedStream, max_length: int):
        self.stream, self.max_length = stream, max_length

    def __iter__(self) -> Iterator[list[StreamedRow]]:
        rows = ((row, row.count_tokens()) for row in self.stream.in_order())
        return own_batches(_fill(rows, self.max_length), self.stream.batch_size, self.stream.passed)


class LengthBuckets(Sampler[int]):
    """
    Rows in a random order in which neighbours have about the same length, so that batches need little padding.

    Args:
        lengths (`Sequence[int]`): Tokens of every row.
        batch_size (`int`): Rows that are taken at a time, over all processes.
        seed (`int`, *optional*, defaults to 0): Decides the order, together with the epoch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0):
        self.lengths, self.batch_size, self.seed, self.epoch = np.asarray(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __call__(self, epoch: int) -> Iterator[int]:
        self.set_epoch(epoch)
        return iter(self)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.lengths))
        size = self.batch_size * BATCHES_AT_A_TIME
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        batches: list[np.ndarray] = []
        for part in parts:
            part = part[np.argsort(-self.lengths[part], kind="stable")]
            batches += [part[start : start + self.batch_size] for start in range(0, len(part), self.batch_size)]
        # One that is not full stays the last.
        full = len(batches) - (len(batches[-1]) < self.batch_size if batches else 0)
        for index in [*random.permutation(full).tolist(), *range(full, len(batches))]:
            yield from batches[index].tolist()


def arrange(
    dataset: EncodedDataset | EncodedStream,
    pad_token_id: int,
    *,
    pseudo: bool = False,
    packing: bool = False,
    max_length: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> tuple[Dataset, DistillCollator]:
    """
    Returns what a trainer takes its batches from, and the collator that makes them.

    Args:
        dataset (`EncodedDataset` or `EncodedStream`): The rows.
        pad_token_id (`int`): Id to pad with.
        pseudo (`bool`, *optional*, defaults to `False`): Whether batches have `pseudo_labels`.
        packing (`bool`, *optional*, defaults to `False`): Whether batches are packed instead of padded.
        max_length (`int`, *optional*): Tokens of a pack; by default the rows of a batch are packed.
        batch_size (`int`, *optional*, defaults to 1): Rows, or packs, of a micro-batch of all processes.
        seed (`int`, *optional*, defaults to 0): Decides the order of a stream, and which rows share a pack.
    """
    collator = DistillCollator(pad_token_id, pseudo, packing, topk=dataset.stored_topk is not None)
    if isinstance(dataset, EncodedStream):
        dataset.batch_size, dataset.seed = batch_size, seed
        return (PackedStream(dataset, max_length) if packing and max_length else dataset), collator
    return (PackedDataset(dataset, max_length, seed) if packing and max_length else dataset), collator


def _fill(rows: Iterable[tuple[Any, int]], max_length: int) -> Iterator[list[Any]]:
    """Yields packs of rows that come with their lengths, and at last those that are not full."""
    packs: list[tuple[list[Any], int]] = []
    for row, length in rows:
        place = next((i for i, (_, used) in enumerate(packs) if used + length <= max_length), None)
        if place is not None:
            pack, used = packs[place]
            pack.append(row)
            packs[place] = pack, used + length
            continue
        packs.append(([row], length))
        if len(packs) > OPEN_PACKS:  # the oldest is closed, so that no row of a stream waits for ever
            yield packs.pop(0)[0]
    yield from (pack for pack, _ in packs)
