"""Rows that cannot be read: counted, logged and left out, up to a limit."""

import logging
from collections.abc import Iterable

import torch
from torch.utils.data import get_worker_info


logger = logging.getLogger(__name__)

WRITERS = 64  # workers with a column of their own, so that none overwrites what another counted


class RowError(ValueError):
    """A row that cannot be read. Raised in a worker of a DataLoader it arrives with its message alone."""

    def __init__(self, message: str):
        # The DataLoader makes a new error of the worker's whole traceback, which ends with the message.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class SkippedRows:
    """
    A count of the rows that are left out, each once, over a process and its workers; [`merge`] adds other processes'.

    Args:
        limit (`int`, *optional*, defaults to 0): How many may be left out. With 0 the first one is an error.
    """

    def __init__(self, limit: int = 0):
        if limit < 0:
            raise ValueError(f"max_bad_rows={limit} must not be negative")
        self.limit = limit
        self.numbers = torch.full((WRITERS, limit + 1), -1, dtype=torch.int64).share_memory_()

    def skip(self, number: int, error: Exception) -> None:
        """
        Notes and logs that row `number` is left out.

        Raises:
            `RowError`: It is one too many.
        """
        if self.limit == 0:
            raise RowError(str(error)) from error
        known = self.skipped()
        if number in known:
            return
        if len(known) >= self.limit:
            raise RowError(f"{self._too_many(len(known) + 1, known)}, and now {error}") from error
        worker = get_worker_info()
        self._note(number, 0 if worker is None else 1 + worker.id % (WRITERS - 1))
        logger.warning("Left out: %s (%d of at most %d)", error, len(known) + 1, self.limit)

    def merge(self, numbers: Iterable[int]) -> None:
        """
        Counts rows that other processes left out, too.

        Raises:
            `RowError`: They are too many together.
        """
        known = self.skipped()
        everyone = known | set(numbers)
        if len(everyone) > self.limit:
            raise RowError(self._too_many(len(everyone), everyone))
        for number in everyone - known:
            self._note(number, 0)

    def _note(self, number: int, writer: int) -> None:
        own = self.numbers[writer]
        own[int((own >= 0).sum())] = number

    def _too_many(self, count: int, known: set[int]) -> str:
        named = ", ".join(map(str, sorted(known)[:20])) + (", ..." if len(known) > 20 else "")
        return f"{count} rows cannot be read, and max_bad_rows={self.limit}: rows {named}"

    def skipped(self) -> set[int]:
        """Returns the numbers of the rows that were left out."""
        return set(self.numbers[self.numbers >= 0].tolist())
