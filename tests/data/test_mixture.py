"""A mixture holds the shares that its file gives, in the same order every time."""

import json
from collections import Counter

import pytest

from linmu_hf.data.mixture import Mixture, StreamMixture, load_mixture, load_training_rows


pytestmark = pytest.mark.core_training


def rows(name, n):
    return [{"id": f"{name}{i}", "messages": [{"role": "user", "content": name}]} for i in range(n)]


def letters(mixture):
    return [row["id"][0] for row in mixture]


def read(mixture):
    return [mixture[i] for i in range(len(mixture))]


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 1), (3, 2), (0.05, 0.95)])
def test_every_prefix_holds_the_shares(weights):
    mixture = Mixture([rows("a", 60), rows("b", 50)], weights)
    stream = StreamMixture([rows("a", 60), rows("b", 50)], weights)
    share = weights[0] / sum(weights)
    for order in (letters(read(mixture)), letters(stream)):
        for n in range(1, len(order) + 1):
            assert abs(order[:n].count("a") - share * n) <= 1
    assert len({row["id"] for row in read(mixture)}) == len(mixture)  # no row twice
    assert len(mixture) == int(min(60 / share, 50 / (1 - share)) + 1e-9)


def test_all_rows_come_at_least_once():
    mixture = Mixture([rows("a", 20), rows("b", 5)], (1, 1), stopping="all_exhausted")
    seen = Counter(row["id"] for row in read(mixture))
    assert len(mixture) == 40 and len(seen) == 25
    assert {seen[f"a{i}"] for i in range(20)} == {1} and {seen[f"b{i}"] for i in range(5)} == {4}
    stream = [row["id"] for row in StreamMixture([rows("a", 20), rows("b", 5)], (1, 1), stopping="all_exhausted")]
    assert set(stream) == set(seen) and stream[:4] == ["a0", "b0", "a1", "b1"]


def test_the_seed_decides():
    sources = [rows("a", 30), rows("b", 30)]
    first, again, other = (Mixture(sources, (2, 1), seed) for seed in (0, 0, 1))
    assert read(first) == read(again) != read(other)
    assert letters(read(first)) == letters(read(other))
    stream = StreamMixture(sources, (2, 1))
    assert list(stream) == list(stream)


def test_datasets_of_unequal_columns_are_mixed(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(rows("a", 8)))
    lines = [{"id": i, "conversations": [{"from": "human", "value": "hi"}]} for i in range(4)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = tmp_path / "mixture.yaml"
    file.write_text("datasets:\n  - {path: a.json, weight: 2}\n  - {path: b.jsonl, weight: 1}\n")
    mixture = load_mixture(str(file), seed=3)
    assert len(mixture) == 12 and sum("conversations" in row for row in read(mixture)) == 4
    stream = list(load_mixture(str(file), streaming=True))
    assert [row["id"] for row in stream[:4]] == ["a0", 0, "a1", "a2"]
    file.write_text("datasets:\n  - {path: a.json}\n  - {path: b.jsonl}\n")
    assert len(load_mixture(str(file))) == 12  # by their sizes
    with pytest.raises(ValueError, match=r"streams have no length .* give `weight`"):
        load_mixture(str(file), streaming=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a.json", "is no mixture: it has `datasets`"),
        ("datasets: [{path: a.json, wieght: 1}]", r"entry 0 is .*wieght.*'weight'"),
        ("datasets: [{path: a.json, weight: 0}]", "weight=0 must be a positive number"),
        ("datasets: [{path: a.json, weight: 1}, {path: a.json}]", "none for .*a.json: give all or none"),
        ("{datasets: [{path: a.json, weight: 1}], stopping: never}", "stopping='never' must be one of first"),
        ("datasets: [{path: none.json, weight: 1}]", "there is no folder none.json"),
        ("datasets: [", "cannot be read"),
    ],
)
def test_files_that_say_nothing(tmp_path, text, message):
    (tmp_path / "a.json").write_text(json.dumps(rows("a", 8)))
    (tmp_path / "mixture.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_mixture(str(tmp_path / "mixture.yaml"))


def test_a_row_that_cannot_be_made_names_its_dataset():
    class Broken(list):
        def __getitem__(self, index):
            raise OSError("disk")

    mixture = Mixture([Broken(rows("a", 3))], [1], names=["a.json"])
    with pytest.raises(ValueError, match=r"a\.json, row \d cannot be read: disk"):
        mixture[0]


def test_a_path_says_what_it_is(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(rows("a", 8)))
    (tmp_path / "mixture.yml").write_text("datasets: [{path: a.json, weight: 1}]")
    for streaming in (False, True):
        alone = load_training_rows(str(tmp_path / "a.json"), streaming=streaming)
        mixed = load_training_rows(str(tmp_path / "mixture.yml"), streaming=streaming)
        assert {row["id"] for row in alone} == {row["id"] for row in mixed}
