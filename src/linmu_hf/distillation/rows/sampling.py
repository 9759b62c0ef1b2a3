"""The order of the rows: one sequence for a whole stage, which any number of processes cut in the same way."""

from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice

import torch
from torch.utils.data import Sampler


# Gets the number of a pass over the dataset and returns the order of its rows.
Order = Callable[[int], Iterable[int]]


class StageSampler(Sampler[int]):
    """
    The rows of a whole stage, pass after pass over the dataset without a gap: every step then has its full number of
    rows, and the same ones however many processes share it.

    Args:
        order (`Callable`): See [`shuffled`].
        total (`int`): Rows of all steps.
    """

    def __init__(self, order: Order, total: int):
        self.order, self.total = order, total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        return islice((row for number in count() for row in self.order(number)), self.total)


def shuffled(rows: int, seed: int) -> Order:
    """Returns what shuffles this many rows anew for every pass."""

    def order(number: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed + 1_000_003 * number)
        return torch.randperm(rows, generator=generator).tolist()

    return order


def in_order(rows: int) -> Order:
    """Returns what gives this many rows in their own order in every pass."""
    return lambda number: range(rows)
