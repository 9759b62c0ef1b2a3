"""Decoding a dataset into a store: resumed, shared by processes, streamed, and read by the trainer's side."""

import copy
import json
import time
from functools import partial

import fill_worker
import pytest
import torch
from distillation_fixtures import as_stored
from forked import start_forked
from tqdm.auto import tqdm

from linmu_hf.data import row_key
from linmu_hf.distillation.losses import IGNORE_INDEX, next_token_targets, output_losses
from linmu_hf.distillation.rows.collator import DistillCollator, EncodedDataset
from linmu_hf.distillation.targets import fill as module
from linmu_hf.distillation.targets.decode import decode_rows
from linmu_hf.distillation.targets.encode import encode_stored, stored_topk
from linmu_hf.distillation.targets.fill import decode_pseudo_targets, describe
from linmu_hf.distillation.targets.store import HEADER, PseudoTargets


pytestmark = pytest.mark.core_training

OPTIONS = {"max_new_tokens": 2, "batch_size": 3}


@pytest.fixture(scope="module")
def teacher(make_teacher):
    return make_teacher()


@pytest.fixture(scope="module")
def stored(rows):
    return as_stored(rows)


@pytest.fixture(scope="module")
def decoded(teacher, processor, rows):
    return {row_key(row): decode_rows(teacher, processor, {0: row}, max_new_tokens=2, top_k=3)[0] for row in rows}


def assert_holds(folder, decoded, top_k=0):
    store = PseudoTargets(folder)
    assert set(store.places) == set(decoded)
    for key, row in decoded.items():
        assert store.answers(key) == row.answers
        if top_k:
            ids, logprobs = store.topk(key)
            assert torch.equal(ids, row.topk.ids)
            torch.testing.assert_close(logprobs, row.topk.logprobs, rtol=1e-4, atol=1e-4)


def test_every_row_is_answered_once(teacher, processor, rows, decoded, tmp_path):
    twice = [*rows, *rows[:3]]
    counts = decode_pseudo_targets(teacher, processor, twice, tmp_path / "s", **OPTIONS, top_k=3)
    answers = [answer for row in decoded.values() for answer in row.answers]
    assert (counts.rows, counts.found, counts.answers) == (13, 3, len(answers))
    assert counts.answers_cut == sum(not answer.stopped for answer in answers) > 0
    assert_holds(tmp_path / "s", decoded, 3)
    again = decode_pseudo_targets(teacher, processor, rows[::-1], tmp_path / "s", **OPTIONS, top_k=3)
    assert (again.rows, again.found, again.answers) == (10, 10, 0)


def test_known_answers_without_progress(teacher, processor, rows, tmp_path, monkeypatch):
    """As with TQDM_DISABLE=1."""
    monkeypatch.setattr(module, "tqdm", partial(tqdm, disable=True))
    for found in (0, 3):
        counts = decode_pseudo_targets(teacher, processor, rows[:3], tmp_path / "s", **OPTIONS)
        assert counts.found == found


def test_shares_and_another_number_of_them(teacher, processor, rows, decoded, tmp_path):
    for shard in ((1, 3), (0, 3)):
        decode_pseudo_targets(teacher, processor, rows, tmp_path / "s", **OPTIONS, shard=shard)
    assert len(PseudoTargets(tmp_path / "s")) == 7
    counts = [
        decode_pseudo_targets(teacher, processor, rows, tmp_path / "s", **OPTIONS, shard=(number, 2))
        for number in (0, 1)
    ]
    assert [each.rows for each in counts] == [5, 5] and sum(each.found for each in counts) == 7
    assert_holds(tmp_path / "s", decoded)


@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
def test_a_stream_gives_what_its_dataset_gives(teacher, processor, stored, tmp_path, shard):
    forms = {"dataset": stored, "stream": stored.to_iterable_dataset(num_shards=3)}
    for name, form in forms.items():
        decode_pseudo_targets(teacher, processor, form, tmp_path / name, **OPTIONS, shard=shard)
    one, other = (PseudoTargets(tmp_path / name) for name in forms)
    assert one.places.keys() == other.places.keys() and len(one) == 10 // shard[1]
    assert all(one.answers(key) == other.answers(key) for key in one.places)
    if shard == (0, 1):
        one.check_rows(forms["stream"])


def test_rows_that_were_decoded_are_not_decoded_again(teacher, processor, rows, decoded, tmp_path, monkeypatch):
    batches = []

    def stop_in_the_second_batch(teacher, processor, batch, **options):
        batches.append(list(batch))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return decode_rows(teacher, processor, batch, **options)

    monkeypatch.setattr(module, "decode_rows", stop_in_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        decode_pseudo_targets(teacher, processor, rows, tmp_path / "s", **OPTIONS)
    decode_pseudo_targets(teacher, processor, rows, tmp_path / "s", **OPTIONS)
    assert batches == [[0, 1, 2], [3, 4, 5], [3, 4, 5], [6, 7, 8], [9]]
    assert_holds(tmp_path / "s", decoded)


def test_unreadable_rows_are_left_out_up_to_a_limit(teacher, processor, rows, decoded, tmp_path):
    bad = [{**rows[0], "images": ["/nowhere/a.png"]}, {"messages": []}]
    mixed = [rows[0], bad[0], rows[1], rows[2], bad[1], *rows[3:]]
    with pytest.raises(ValueError, match=r"row 1 .*/nowhere/a\.png does not exist"):
        decode_pseudo_targets(teacher, processor, mixed, tmp_path / "s", **OPTIONS)
    with pytest.raises(ValueError, match=r"2 rows cannot be read, and max_bad_rows=1: rows 1, and now row 4"):
        decode_pseudo_targets(teacher, processor, mixed, tmp_path / "s", **OPTIONS, max_bad_rows=1)
    counts = decode_pseudo_targets(teacher, processor, mixed, tmp_path / "s", **OPTIONS, max_bad_rows=2)
    assert (counts.rows, counts.bad_rows) == (12, 2)
    assert_holds(tmp_path / "s", decoded)
    store = PseudoTargets(tmp_path / "s")
    store.check_rows(mixed, max_bad_rows=2)
    with pytest.raises(ValueError, match="has no answers to 2 rows, row 1 first"):
        store.check_rows(mixed, max_bad_rows=1)


def test_what_it_was_made_of(teacher, make_teacher, processor, rows, tmp_path):
    decode_pseudo_targets(teacher, processor, rows[:1], tmp_path / "s", **OPTIONS)
    made_of = describe(teacher, processor, 2)
    PseudoTargets(tmp_path / "s", made_of)
    half = make_teacher().bfloat16()
    assert describe(half.float(), processor, 2) == describe(make_teacher().bfloat16(), processor, 2)  # values count
    for other, limit, name in ((make_teacher(seed=1), 2, "teacher"), (teacher, 3, "max_new_tokens")):
        with pytest.raises(ValueError, match=f"holds other answers .*{name} is"):
            decode_pseudo_targets(other, processor, rows[:1], tmp_path / "s", max_new_tokens=limit)
    with pytest.raises(ValueError, match="shard 2/2: the first number goes from 0 to 1"):
        decode_pseudo_targets(teacher, processor, rows, tmp_path / "s", shard=(2, 2))
    with pytest.raises(ValueError, match="top_k=99999 must be at most the tokenizer"):
        decode_pseudo_targets(teacher, processor, rows, tmp_path / "t", top_k=99999)


def test_settings_that_were_used_are_part_of_it(teacher, processor, rows, tmp_path):
    """A penalty is never used; what else decides an answer is noted, and a store that does not say so is refused."""
    plain = describe(teacher, processor, 2)
    own = copy.deepcopy(teacher.generation_config)
    try:
        teacher.generation_config.update(repetition_penalty=1.5, temperature=0.1, top_k=1, max_length=9)
        assert describe(teacher, processor, 2) == plain and plain["generation"]["repetition_penalty"] == 1.0
        teacher.generation_config.no_repeat_ngram_size = 2
        assert describe(teacher, processor, 2)["generation"] == plain["generation"] | {"no_repeat_ngram_size": 2}
    finally:
        teacher.generation_config = own
    decode_pseudo_targets(teacher, processor, rows[:1], tmp_path, **OPTIONS)
    header = json.loads((tmp_path / HEADER).read_text())
    del header["made_of"]["generation"]["repetition_penalty"]  # written before penalties were left out
    (tmp_path / HEADER).write_text(json.dumps(header))
    with pytest.raises(ValueError, match=r"repetition_penalty is not noted there and 1\.0 here: decode into another"):
        decode_pseudo_targets(teacher, processor, rows[:1], tmp_path, **OPTIONS)


def test_batches_hold_the_teacher_s_distribution(teacher, processor, rows, tmp_path):
    """L_tok from the store, with all tokens stored, is L_tok with the teacher at hand."""
    folder, k = tmp_path / "s", len(processor.tokenizer)
    decode_pseudo_targets(teacher, processor, rows[:4], folder, **OPTIONS, top_k=k)
    store = PseudoTargets(folder)
    dataset = EncodedDataset(
        processor,
        rows[:4],
        lambda row, index: encode_stored(store, processor, row, index),
        stored_topk=lambda row, features, index: stored_topk(store, row, features, index),
    )
    items = [dataset[index] for index in range(4)]
    assert any("pseudo" in item for item in items)
    batch = DistillCollator(processor.tokenizer.pad_token_id, pseudo=True)(items)
    ids, logprobs = batch.pop("topk_ids"), batch.pop("topk_logprobs")
    b, t = batch["input_ids"].shape
    assert ids.shape == logprobs.shape == (b, t, k) and b > 4
    labels, pseudo = next_token_targets(batch.pop("labels")), next_token_targets(batch.pop("pseudo_labels"))
    assert (logprobs[labels == IGNORE_INDEX] == 0).all()
    counted = (labels != IGNORE_INDEX) | (pseudo != IGNORE_INDEX)
    hidden = teacher.model(**batch).last_hidden_state.detach()[counted]
    student = (torch.randn_like(hidden), teacher.lm_head, {"tok": labels[counted], "seq": pseudo[counted]})
    there = output_losses(*student, {"tok": 7, "seq": 7}, teacher_hidden=hidden, teacher_head=teacher.lm_head)
    stored = output_losses(*student, {"tok": 7, "seq": 7}, topk_ids=ids[counted], topk_logprobs=logprobs[counted])
    torch.testing.assert_close(stored, there, rtol=1e-4, atol=1e-4)


def test_log_probabilities_of_other_tokens_are_refused(teacher, processor, rows, tmp_path):
    decode_pseudo_targets(teacher, processor, rows[:1], tmp_path / "s", **OPTIONS, top_k=2)
    store, features = PseudoTargets(tmp_path / "s"), EncodedDataset(processor, rows)[0]["row"]
    fewer = {**features, "labels": features["labels"].masked_fill(features["labels"] != IGNORE_INDEX, IGNORE_INDEX)}
    with pytest.raises(ValueError, match=r"row 0 has 0 answer tokens and .* knows"):
        stored_topk(store, rows[0], fewer)


@pytest.mark.slow
def test_killed_again_and_again(teacher, processor, stored, decoded, tmp_path):
    teacher.save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    stored.save_to_disk(tmp_path / "data")
    keys = [row_key(row) for row in module.undecoded(stored)]
    for _ in range(20):
        process = start_forked(fill_worker.main, (tmp_path, tmp_path / "s"), {}, [tmp_path / "out", tmp_path / "err"])
        lines, file = 0, tmp_path / "s" / "shard-00000" / "answers.jsonl"
        before = file.read_bytes().count(b"\n") if file.exists() else 0
        while process.is_alive() and lines < before + 2:
            lines = file.read_bytes().count(b"\n") if file.exists() else 0
            time.sleep(0.002)
        if not process.is_alive():
            break
        process.kill()
        process.join()
    assert process.exitcode == 0, (tmp_path / "err").read_text()
    assert_holds(tmp_path / "s", dict(zip(keys, decoded.values())), 3)
