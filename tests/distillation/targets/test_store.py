"""The store on disk: what a killed writer leaves, who may write, what is refused."""

import json

import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature

from linmu_hf.data import row_key
from linmu_hf.distillation.targets.decode import Decoded
from linmu_hf.distillation.targets.encode import Answer, TopK
from linmu_hf.distillation.targets.store import ANSWERS, HEADER, TOPK, PseudoTargets, open_shard, write_header


pytestmark = pytest.mark.core_training

MADE_OF = {"teacher": "a", "processor": "b", "max_new_tokens": 4, "generation": {"suppress_tokens": [1, 2]}}


def answered(number, top_k=2):
    """A row's answers: all that is in it depends on its number."""
    ids = torch.arange(number, number + (number + 1) * top_k, dtype=torch.int32).reshape(number + 1, top_k)
    topk = TopK(ids, -ids.float() - 0.1) if top_k else None
    return Decoded([Answer([number, 7], True), Answer([number], False)], topk)


def fill(folder, numbers, shard=0, top_k=2):
    write_header(folder, MADE_OF | {"top_k": top_k}, {"teacher": "T"})
    with open_shard(folder, shard) as writer:
        for number in numbers:
            writer.write({f'id"{number}:k': answered(number, top_k)})


def assert_holds(folder, numbers, top_k=2):
    store = PseudoTargets(folder, MADE_OF)
    assert set(store.places) == {f'id"{number}:k' for number in numbers}
    for number in numbers:
        expected = answered(number, top_k)
        assert store.answers(f'id"{number}:k') == expected.answers
        if top_k:
            topk = store.topk(f'id"{number}:k')
            assert topk.ids.dtype == torch.int32 and topk.logprobs.dtype == torch.float32
            assert all(torch.equal(*pair) for pair in zip(topk, expected.topk))


@pytest.mark.parametrize("top_k", [0, 2])
def test_what_was_written_is_read(tmp_path, top_k):
    fill(tmp_path / "s", [0, 1], top_k=top_k)
    fill(tmp_path / "s", [2], shard=11, top_k=top_k)
    fill(tmp_path / "s", [3], top_k=top_k)  # a shard grows
    assert_holds(tmp_path / "s", [0, 1, 2, 3], top_k)
    assert PseudoTargets(tmp_path / "s").header["about"] == {"teacher": "T"}


@pytest.mark.parametrize("top_k", [0, 2])
def test_a_writer_may_be_killed_at_any_byte(tmp_path, top_k):
    whole = tmp_path / "whole"
    fill(whole, [0, 1, 2], top_k=top_k)
    answers, topk = ((whole / "shard-00000" / name).read_bytes() for name in (ANSWERS, TOPK))
    second = answers.index(b"\n") + 1
    # The log-probabilities of a row come first: cut there with two lines written, then anywhere in the third line.
    lines_end = len(answers.rstrip(b"\n").rpartition(b"\n")[0]) + 1
    cuts = [(lines_end, end) for end in range(len(topk) * 3 // 6, len(topk) + 1, 5)]
    cuts += [(end, len(topk)) for end in range(second, len(answers), 7)]
    for number, (lines, values) in enumerate(cuts):
        folder = tmp_path / str(number)
        fill(folder, [], top_k=top_k)
        (folder / "shard-00000" / ANSWERS).write_bytes(answers[:lines])
        (folder / "shard-00000" / TOPK).write_bytes(topk[:values])
        kept = answers[:lines].count(b"\n")
        assert_holds(folder, range(kept), top_k)  # a reader ignores the rest
        fill(folder, range(kept, 3), top_k=top_k)
        assert_holds(folder, [0, 1, 2], top_k)
        assert (folder / "shard-00000" / ANSWERS).read_bytes() == answers
        assert (folder / "shard-00000" / TOPK).read_bytes() == topk


def test_a_header_whose_writer_was_killed_is_taken_away(tmp_path):
    for begun in (False, True):  # killed before the header had its name, and after it
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / f"{HEADER}.0").write_text('{"form')
        write_header(tmp_path / "s", MADE_OF | {"top_k": 0}, {})
        assert [path.name for path in (tmp_path / "s").iterdir()] == [HEADER], begun


def test_log_probabilities_that_never_reached_the_disk(tmp_path):
    """After a loss of power, say: the lines that need them count for nothing."""
    fill(tmp_path / "s", [0, 1, 2])
    file = tmp_path / "s" / "shard-00000" / TOPK
    file.write_bytes(file.read_bytes()[:-1])
    assert_holds(tmp_path / "s", [0, 1])
    fill(tmp_path / "s", [2, 3])
    assert_holds(tmp_path / "s", [0, 1, 2, 3])


def test_a_shard_has_one_writer(tmp_path):
    fill(tmp_path / "s", [0])
    with open_shard(tmp_path / "s", 0):
        with pytest.raises(BlockingIOError, match=r"shard-00000 is being written by process \d+"):
            fill(tmp_path / "s", [1])
        fill(tmp_path / "s", [1], shard=1)
    fill(tmp_path / "s", [2])
    assert_holds(tmp_path / "s", [0, 1, 2])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("teacher", "z", "teacher is a there and z here: give the teacher"),
        ("processor", "z", "processor is b there and z here: give the processor"),
        ("max_new_tokens", 5, "max_new_tokens is 4 there and 5 here: set max_completion_length to 4"),
        (
            "generation",
            {"repetition_penalty": 1.0, "suppress_tokens": [1, 2]},
            "(teacher T): generation: repetition_penalty is not noted there and 1.0 here: decode into another",
        ),
        ("top_k", 3, "top_k is 2 there and 3 here: set top_k to 2"),
    ],
)
def test_other_answers_are_refused(tmp_path, name, value, message):
    fill(tmp_path / "s", [0])
    other = MADE_OF | {"top_k": 2} | {name: value}
    for use in (lambda: PseudoTargets(tmp_path / "s", other), lambda: write_header(tmp_path / "s", other, {})):
        with pytest.raises(ValueError) as error:
            use()
        assert message in str(error.value) and "(teacher T)" in str(error.value)
    assert_holds(tmp_path / "s", [0])


def test_folders_that_are_no_stores(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder of teacher answers: make it with linmu-pseudo-targets"):
        PseudoTargets(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt and no answers: give a folder of its own"):
        write_header(tmp_path, MADE_OF, {})
    (tmp_path / HEADER).write_text(json.dumps({"format": 99, "made_of": {"top_k": 0}}))
    with pytest.raises(ValueError, match="damaged, or of another version"):
        PseudoTargets(tmp_path)


@pytest.mark.parametrize("form", ["list", "dataset", "stream"])
def test_rows_without_answers_are_counted(tmp_path, form):
    rows = [
        {"id": number, "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": str(number)}]}
        for number in range(5)
    ]
    message = {"role": Value("string"), "content": Value("string")}
    kinds = Features({"id": Value("int64"), "messages": List(message), "images": List(ImageFeature())})
    dataset = Dataset.from_list([row | {"images": []} for row in rows], kinds)
    given = {"list": rows, "dataset": dataset, "stream": dataset.to_iterable_dataset()}[form]
    write_header(tmp_path / "s", MADE_OF | {"top_k": 0}, {})
    with open_shard(tmp_path / "s", 0) as writer:
        writer.write({row_key(rows[number]): answered(number, 0) for number in (0, 1, 3)})
    store = PseudoTargets(tmp_path / "s")
    with pytest.raises(ValueError, match=r"has no answers to 2 rows, row 2 first: run linmu-pseudo-targets"):
        store.check_rows(given)
    with pytest.raises(ValueError, match=r"has no answers to row 4 \(key 4:"):
        store.answers(row_key(rows[4]), 4)
    with pytest.raises(ValueError, match="holds no log-probabilities: decode with --top_k"):
        store.topk(row_key(rows[0]))
