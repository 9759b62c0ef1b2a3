"""A run is continued only with what it was made of: every row, picture, weight and setting counts."""

import copy
import os

import numpy as np
import pytest
import torch
from datasets import Dataset
from distillation_fixtures import as_stored
from PIL import Image as Pictures

from linmu_hf.distillation.fingerprint import fingerprint_processor, fingerprint_rows, fingerprint_weights
from linmu_hf.testbed.processor import build_processor


def changed(rows, index, **changes):
    return [{**row, **changes} if i == index else row for i, row in enumerate(rows)]


def answered(row, text):
    messages = copy.deepcopy(row["messages"])
    messages[-1]["content"] = [{"type": "text", "text": text}]
    return messages


@pytest.mark.parametrize("form", [list, as_stored])
def test_every_row_and_picture_counts(rows, form):
    white = [Pictures.new("RGB", image.size, "white") for image in rows[3]["images"]]
    frames = [[frame.rotate(180) for frame in video] for video in rows[2]["videos"]]
    others = [
        changed(rows, 3, images=white),
        changed(rows, 3, images=[image.rotate(180) for image in rows[3]["images"]]),
        changed(rows, 2, videos=frames),
        changed(rows, 9, messages=answered(rows[9], "other")),
        [rows[1], rows[0], *rows[2:]],
        rows[:9],
    ]
    prints = [fingerprint_rows(form(each)) for each in (rows, *others)]
    assert len(set(prints)) == len(prints)
    assert fingerprint_rows(form(copy.deepcopy(rows))) == prints[0]


@pytest.mark.parametrize("form", [list, Dataset.from_list])
def test_every_row_of_many_counts(form):
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}]} for i in range(5000)]
    other = {"messages": [{"role": "user", "content": "another"}]}
    before = fingerprint_rows(form(rows))
    for replaced in ([1], [777], [4999], [i for i in range(5000) if i % 9]):
        some = set(replaced)
        assert fingerprint_rows(form([other if i in some else row for i, row in enumerate(rows)])) != before


def test_a_column_of_answers_counts(rows):
    with_answers = [{**row, "pseudo_messages": row["messages"]} for row in rows]
    other = changed(with_answers, 8, pseudo_messages=answered(rows[8], "garbage"))
    assert fingerprint_rows(with_answers) != fingerprint_rows(other)


def test_a_file_counts_by_name_and_content(tmp_path):
    """And not by its time: a picture that was lost may be put back."""
    file = tmp_path / "a.png"

    def prints():
        lists = [{"messages": [], "images": [str(file)]}]
        return [
            fingerprint_rows(lists),
            fingerprint_rows(Dataset.from_list(lists)),
            fingerprint_rows([{"images": [Pictures.open(file)]}]),
        ]

    Pictures.new("RGB", (8, 8), "red").save(file)
    before = prints()
    os.utime(file, ns=(1, 1))
    assert prints() == before
    Pictures.new("RGB", (8, 8), "blue").save(file)
    assert not set(prints()) & set(before)


def test_arrays_and_numbers_count():
    prints = {
        fingerprint_rows([{"x": value}])
        for value in (np.zeros(3), np.zeros(3, np.float32), np.arange(3), torch.arange(4), b"12", "12", 12, ["1", "2"])
    }
    assert len(prints) == 8


def test_any_weight_and_the_configuration_count(make_teacher):
    teacher = make_teacher()
    before = fingerprint_weights(teacher)
    assert fingerprint_weights(make_teacher()) == before
    with torch.no_grad():
        teacher.model.language_model.embed_tokens.weight[200, 7] += 1e-3  # far from both ends
    assert fingerprint_weights(teacher) != before
    teacher = make_teacher()
    teacher.config.text_config.rope_parameters["rope_theta"] = 1e6
    assert fingerprint_weights(teacher) != before
    assert fingerprint_weights(make_teacher().bfloat16()) != before


def test_processors_count(processor):
    other = build_processor()
    assert fingerprint_processor(other) == fingerprint_processor(processor)
    other.image_processor.size = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    assert fingerprint_processor(other) != fingerprint_processor(processor)
    other = build_processor()
    other.chat_template = other.chat_template.replace("user", "human") + " "
    assert fingerprint_processor(other) != fingerprint_processor(processor)
