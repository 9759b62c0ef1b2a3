"""Streams give the batches of map-style data, whatever the number of workers and processes; bad rows are left out."""

import itertools
import json
import logging

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from datasets import IterableDataset
from distillation_fixtures import Rows
from torch.utils.data import DataLoader

from linmu_hf.data import load_rows
from linmu_hf.data.mixture import StreamMixture
from linmu_hf.data.skipping import RowError, SkippedRows
from linmu_hf.distillation.model import DistillationModel
from linmu_hf.distillation.rows.collator import DistillCollator, EncodedDataset
from linmu_hf.distillation.rows.packing import PackedDataset, PackedStream
from linmu_hf.distillation.rows.stream import EncodedStream, StreamedRow
from linmu_hf.distillation.stages import FLEX, Stage
from linmu_hf.distillation.teacher import SeparateTeacher


pytestmark = pytest.mark.core_training


@pytest.fixture(scope="module")
def collator(processor):
    return DistillCollator(processor.tokenizer.pad_token_id)


def take(loader, n):
    return list(itertools.islice(loader, n))


def equal(one, other):
    assert len(one) == len(other)
    for batch, expected in zip(one, other):
        assert batch.keys() == expected.keys()
        for key in expected:
            assert torch.equal(batch[key], expected[key]), key


def numbers(stream, n):
    return [row.number for row in itertools.islice(stream, n)]


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_equals_map_style(processor, rows, collator, workers):
    stream = EncodedStream(processor, Rows(rows), batch_size=2)
    streamed = take(DataLoader(stream, batch_size=2, num_workers=workers, collate_fn=collator), 10)
    loaded = list(DataLoader(EncodedDataset(processor, rows), 2, num_workers=workers, collate_fn=collator))
    equal(streamed, loaded * 2)  # and begins anew


@pytest.mark.parametrize("workers", [0, 2])
def test_two_processes_see_what_one_sees(processor, rows, collator, workers):
    whole = take(DataLoader(EncodedStream(processor, Rows(rows), buffer_size=4), 4, collate_fn=collator), 6)
    parts = []
    for process in range(2):
        shard = IterableDatasetShard(
            EncodedStream(processor, Rows(rows), buffer_size=4, batch_size=4),
            2,
            num_processes=2,
            process_index=process,
        )
        parts.append(take(DataLoader(shard, 2, num_workers=workers, collate_fn=collator), 6))
    for batch, *halves in zip(whole, *parts, strict=True):
        ids = [row[row != collator.pad_token_id].tolist() for half in halves for row in half["input_ids"]]
        assert ids == [row[row != collator.pad_token_id].tolist() for row in batch["input_ids"]]
        pixels = torch.cat([half["pixel_values"] for half in halves if "pixel_values" in half])
        assert torch.equal(pixels, batch["pixel_values"])


def test_each_process_encodes_its_own_rows_alone(processor, rows, collator, monkeypatch):
    encoded = []
    monkeypatch.setattr(
        "linmu_hf.distillation.rows.stream.EncodedDataset.__getitem__",
        lambda self, index: encoded.append(index) or None,
    )
    shard = IterableDatasetShard(EncodedStream(processor, Rows(rows)), 2, num_processes=2, process_index=1)
    take(DataLoader(shard, 2, collate_fn=collator), 3)
    assert encoded == [2, 3, 6, 7, 0, 1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packs", [False, True])
def test_rows_that_were_passed_are_not_encoded(processor, rows, collator, workers, packs, monkeypatch):
    """After two batches the same ones follow."""
    stream = EncodedStream(processor, Rows(rows), buffer_size=4, batch_size=2)
    dataset = PackedStream(stream, 150) if packs else stream
    loader = DataLoader(dataset, 2, num_workers=workers, collate_fn=collator)
    whole, items = take(loader, 6), take(iter(dataset), 12)
    encoded, load = [], StreamedRow.load
    monkeypatch.setattr(StreamedRow, "load", lambda self: encoded.append(self.number) or load(self))
    stream.passed = 4
    equal(take(loader, 6)[2:], whole[2:])
    if not workers:
        assert encoded == [row.number for item in items[4:] for row in (item if packs else [item])]


def test_streams_of_files_in_workers(processor, tmp_path, collator):
    """`datasets` would give each worker files of its own."""
    for part in range(2):
        texts = [f"row {i} of {part}" for i in range(4)]
        turns = [[{"role": "user", "content": t}, {"role": "assistant", "content": "7"}] for t in texts]
        (tmp_path / f"train-{part}.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    rows = load_rows(str(tmp_path), streaming=True)
    assert isinstance(rows, IterableDataset) and rows.num_shards == 2
    for source in (rows, StreamMixture([rows, rows], [1, 1])):
        alone, shared = (
            take(DataLoader(EncodedStream(processor, source, batch_size=2), 2, num_workers=n, collate_fn=collator), 5)
            for n in (0, 2)
        )
        equal(shared, alone)


def test_the_order_depends_on_the_seed_alone(processor, rows):
    first, again, other = (numbers(EncodedStream(processor, Rows(rows), buffer_size=4, seed=s), 40) for s in (0, 0, 1))
    assert first == again != other
    epochs = [first[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]
    assert numbers(EncodedStream(processor, Rows(rows)), 12) == [*range(10), 0, 1]
    assert numbers(EncodedStream(processor, Rows(rows), buffer_size=100), 10) != list(range(10))


def test_streams_that_give_nothing(processor):
    with pytest.raises(ValueError, match="the dataset has no rows"):
        next(iter(EncodedStream(processor, Rows([]))))
    with pytest.raises(ValueError, match="shuffle_buffer_size=-1 must not be negative"):
        EncodedStream(processor, Rows([]), buffer_size=-1)

    def broken():
        yield {"messages": []}
        raise OSError("connection lost")

    stream = iter(EncodedStream(processor, broken()))
    next(stream)
    with pytest.raises(RowError, match="row 1 cannot be read, and the stream ends there: connection lost"):
        next(stream)


# ---- Rows that cannot be read


@pytest.fixture
def some_bad(rows, tmp_path):
    """Rows 3 and 6 name a picture that is not there, and one that is damaged."""
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG none")
    bad = {3: "none.png", 6: str(tmp_path / "damaged.png")}
    return [
        {**row, "id": f"r{i}", "images": [bad[i]] * len(row["images"])} if i in bad else row
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_left_out(processor, some_bad, collator, workers, streaming, caplog):
    skipped = SkippedRows(2)
    good = [row for i, row in enumerate(some_bad) if i not in (3, 6)]
    plain = EncodedDataset(processor, good)
    kept = [[0, 1], [2], [3, 4], [5], [6, 7]]  # the others stay where they are
    expected = [collator([plain[i] for i in batch]) for batch in kept]
    if streaming:
        data = EncodedStream(processor, Rows(some_bad), batch_size=2, skipped=skipped)
    else:
        data = EncodedDataset(processor, some_bad, skipped=skipped)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # once more: rows count once
            equal(take(DataLoader(data, 2, num_workers=workers, collate_fn=collator), 5), expected)
    assert skipped.skipped() == {3, 6}
    if workers == 0:
        assert len(caplog.messages) == 2 and "Left out: row 3, id 'r3' (" in caplog.messages[0]
        assert "none.png does not exist" in caplog.messages[0] and "(1 of at most 2)" in caplog.messages[0]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_one_too_many_is_one_error(processor, some_bad, collator, workers, streaming):
    messages = {
        0: r"^row 3, id 'r3' \('row 0 column 3\?'\), image 0: none\.png does not exist: [^\n]*$",
        1: r"^2 rows cannot be read, and max_bad_rows=1: rows 3, and now row 6, id 'r6' [^\n]*damaged\.png[^\n]*$",
    }
    for limit, message in messages.items():
        if streaming:
            data = EncodedStream(processor, Rows(some_bad), batch_size=2, skipped=SkippedRows(limit))
        else:
            data = EncodedDataset(processor, some_bad, skipped=SkippedRows(limit))
        with pytest.raises(RowError, match=message):
            take(DataLoader(data, 2, num_workers=workers, collate_fn=collator), 5)


def test_a_batch_of_bad_rows_teaches_nothing(processor, some_bad, make_student):
    dataset = EncodedDataset(processor, some_bad, skipped=SkippedRows(2))
    for packing in (False, True):
        batch = DistillCollator(processor.tokenizer.pad_token_id, pseudo=True, packing=packing)(
            [dataset[3], dataset[6]]
        )
        assert batch["input_ids"].shape == (1, 1)
        assert (batch["labels"] == -100).all() and (batch["pseudo_labels"] == -100).all()
        batch.pop("labels"), batch.pop("pseudo_labels")
        assert make_student()(**batch, use_cache=False).logits.isfinite().all()


def test_a_batch_of_bad_rows_asks_for_the_teacher_no_more_than_others(processor, make_student, make_teacher):
    """Where log-probabilities are stored: other processes would wait for this one, or it for them."""
    stage = Stage("topk", trains=(FLEX,), max_steps=1, learning_rate=1e-3, tok=1.0)
    student = make_student()
    model = DistillationModel(student, SeparateTeacher(make_teacher()), stage)
    seen = []
    model.teacher.register_forward_hook(lambda *_: seen.append(1))
    for packing in (False, True):
        for topk in (False, True):
            batch = DistillCollator(processor.tokenizer.pad_token_id, packing=packing, topk=topk)([None])
            seen.clear()
            loss, sums = model(batch, torch.ones(3), compare=True)
            assert len(seen) == (not topk) and ("errors" in sums) == (not topk)
            assert loss == 0


def test_other_processes_rows_count(some_bad):
    skipped = SkippedRows(2)
    skipped.skip(3, ValueError("row 3"))
    skipped.merge({3, 6})
    skipped.skip(6, ValueError("row 6"))  # known from another process: no third one
    assert skipped.skipped() == {3, 6}
    with pytest.raises(RowError, match=r"^3 rows cannot be read, and max_bad_rows=2: rows 3, 6, and now row 8$"):
        skipped.skip(8, ValueError("row 8"))
    with pytest.raises(RowError, match=r"^3 rows cannot be read, and max_bad_rows=2: rows 3, 6, 7$"):
        skipped.merge({7})


def test_packs_leave_bad_rows_out(processor, some_bad):
    skipped = SkippedRows(2)
    packs = PackedDataset(EncodedDataset(processor, some_bad, skipped=skipped), 10_000)
    assert len(DistillCollator(0, packing=True)([packs[0]])["cu_seq_lens_q"]) == 9
    stream = PackedStream(EncodedStream(processor, Rows(some_bad), skipped=SkippedRows(2)), 200)
    assert DistillCollator(0, packing=True)([next(iter(stream))])["input_ids"].shape[0] == 1
    with pytest.raises(ValueError, match="max_bad_rows=-1 must not be negative"):
        SkippedRows(-1)
