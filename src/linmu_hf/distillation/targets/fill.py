"""A dataset's teacher answers, decoded once: any number of processes, each with a share of the rows."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...data import Row, row_key
from ...data.formats import fetch
from ...data.loading import undecoded
from ...data.skipping import SkippedRows
from ..fingerprint import fingerprint_processor, fingerprint_teacher
from .decode import decode_rows, generation_settings
from .store import PseudoTargets, open_shard, write_header


@dataclass
class Counts:
    """The result of one call of [`decode_pseudo_targets`]: its share of the rows, and those that were there before."""

    rows: int = 0
    found: int = 0
    bad_rows: int = 0
    answers: int = 0
    answers_cut: int = 0


def decode_pseudo_targets(
    teacher,
    processor,
    rows: Iterable[Mapping],
    output_dir: str | Path,
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    top_k: int = 0,
    shard: tuple[int, int] = (0, 1),
    max_bad_rows: int = 0,
    about: Mapping[str, Any] | None = None,
) -> Counts:
    """
    Decodes what the teacher says in every assistant turn of `rows` into a store, which [`PseudoTargets`] reads.

    Rows whose answers are there already are skipped, so a call that was killed continues, also with another number of
    processes. Answers are found by what a row says, see [`row_key`], and a store may hold those to several datasets.

    Args:
        teacher (`LinMUForConditionalGeneration`): the teacher.
        processor (`ProcessorMixin`): its processor.
        rows (`Iterable[Mapping]`): conversational rows, see [`encode_rows`]: a dataset, a list or a stream.
        output_dir (`str` or `Path`): the store.
        max_new_tokens (`int`, *optional*, defaults to 128):
            Longest answer that is decoded, in tokens. One that is cut there has not `stopped`, and its target no end.
        batch_size (`int`, *optional*, defaults to 8): rows at a time.
        top_k (`int`, *optional*, defaults to 0):
            Likeliest tokens whose log-probabilities are stored, at every token of the *true* answers, which is where
            L_tok is taken; 0 for none.
        shard (`tuple[int, int]`, *optional*, defaults to `(0, 1)`):
            i and n: this call decodes every n-th row from row i on, and writes shard i.
        max_bad_rows (`int`, *optional*, defaults to 0): rows of this share that may be unreadable; they are left out.
        about (`Mapping`, *optional*): what the header says besides: the teacher's name and revision, for example.

    Returns:
        `Counts`: of this call.

    Raises:
        `ValueError`: a bad row, or a store with the answers of another teacher, processor or limit.
        `BlockingIOError`: another process is writing the same shard.
    """
    number, count = shard
    if not 0 <= number < count:
        raise ValueError(f"shard {number}/{count}: the first number goes from 0 to {count - 1}")
    if top_k > len(processor.tokenizer):
        raise ValueError(f"top_k={top_k} must be at most the tokenizer's {len(processor.tokenizer)} tokens")
    folder = Path(output_dir)
    rows = undecoded(rows)
    write_header(folder, describe(teacher, processor, max_new_tokens) | {"top_k": top_k}, about or {}, number)
    counts, pending, mine = Counts(), {}, count_rows(rows)
    skipped = SkippedRows(max_bad_rows)
    total = None if mine is None else len(range(number, mine, count))

    def decode(batch: Mapping[str, tuple[int, Row]]) -> None:
        numbered = dict(batch.values())
        try:
            decoded = decode_rows(teacher, processor, numbered, max_new_tokens=max_new_tokens, top_k=top_k)
        except (ValueError, OSError) as error:
            if len(batch) > 1 and max_bad_rows:  # which of them it was
                for key, each in batch.items():
                    decode({key: each})
                return
            skipped.skip(next(iter(numbered)), error)
            return
        writer.write(dict(zip(batch, decoded, strict=True)))
        answers = [answer for each in decoded for answer in each.answers]
        counts.answers += len(answers)
        counts.answers_cut += sum(not answer.stopped for answer in answers)

    name = "teacher's answers" if count == 1 else f"teacher's answers, share {number}/{count}"
    bar = tqdm(desc=name, unit="row", total=total, position=number if count > 1 else None)
    with open_shard(folder, number) as writer, bar:
        known = set(PseudoTargets(folder).places)
        for index, row in _share(rows, number, count):
            counts.rows += 1
            try:
                if isinstance(row, ValueError):
                    raise row
                key = row_key(row, index)
            except ValueError as error:
                skipped.skip(index, error)
                bar.update()
                continue
            if key in known:
                counts.found += 1
                if not bar.disable:
                    bar.initial += 1  # no part of the rate
                bar.update()
                continue
            known.add(key)
            pending[key] = (index, row)
            if len(pending) == batch_size:
                decode(pending)
                bar.update(len(pending))
                pending.clear()
        if pending:
            decode(pending)
            bar.update(len(pending))
    counts.bad_rows = len(skipped.skipped())
    return counts


def describe(teacher, processor, max_new_tokens: int) -> dict[str, Any]:
    """Returns what decides the teacher's answers, as a store's header has it beside `top_k`."""
    return {
        "teacher": fingerprint_teacher(teacher),
        "processor": fingerprint_processor(processor),
        "max_new_tokens": max_new_tokens,
        "generation": generation_settings(teacher, processor),
    }


def count_rows(rows: Any) -> int | None:
    """Returns the number of rows; for a stream what its description says, if anything."""
    if hasattr(rows, "__len__"):
        return len(rows)
    splits = getattr(getattr(rows, "info", None), "splits", None) or {}
    split = splits.get(str(getattr(rows, "split", None)))
    return split.num_examples if split is not None else None


def _share(rows: Any, number: int, count: int) -> Iterator[tuple[int, Row | ValueError]]:
    """Every `count`-th row from row `number` on, or the error that reading it raises, with its number."""
    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        for index in range(number, len(rows), count):
            try:
                yield index, fetch(rows, index)
            except ValueError as error:
                yield index, error
        return
    for index, row in enumerate(rows):
        if index % count == number:
            yield index, row
