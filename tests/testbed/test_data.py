"""The testbed's data: held-out digits, reproducible rows, answers that follow from what is shown."""

import itertools
import re
from functools import cache

import numpy as np
import pytest
from sklearn.datasets import load_digits

from linmu_hf.testbed.data import (
    FULL_SIZES,
    QUESTIONS_PER_ROW,
    SCENE_OF_TASK,
    TASKS,
    compose,
    converse,
    evaluation_rows,
    evaluation_scenes,
    split_indices,
    training_rows,
    training_scenes,
)


@cache
def digit_labels():
    return load_digits().target


def answer_from_labels(scene, question):
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    source_labels = np.where(scene.sources >= 0, digit_labels()[scene.sources], -1)
    assert np.array_equal(source_labels, scene.digits)
    if "row" in question:
        row, column = numbers
        return source_labels[0, row - 1 + question.startswith("below"), column - 1]
    moments = [int(np.argwhere((source_labels == n).any((1, 2))).item()) for n in numbers]
    return moments[0] + 1 if question.startswith("when") else numbers[int(np.argmin(moments))]


def test_train_and_test_digits_are_disjoint_and_complete():
    train, test = split_indices("train"), split_indices("test")
    assert not set(train) & set(test)
    assert len(train) + len(test) == len(digit_labels())
    assert np.bincount(digit_labels()[test]).tolist() == [40] * 10


def test_scenes_use_the_digits_of_their_split_alone():
    for scene, _ in training_scenes(0, 50):
        assert set(scene.sources[scene.sources >= 0]) <= set(split_indices("train"))
    for task in TASKS:
        for scene, _ in evaluation_scenes(task, 5):
            assert set(scene.sources[scene.sources >= 0]) <= set(split_indices("test"))


def test_training_answers_follow_from_the_labels():
    for scene, turns in training_scenes(1, 60):
        assert len(turns) == QUESTIONS_PER_ROW
        for question, answer in turns:
            assert answer == str(answer_from_labels(scene, question)), question


@pytest.mark.parametrize("kind", ["mosaic", "large"])
def test_questions_ask_for_cells_that_hold_a_digit(kind):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        scene = compose(rng, kind, "train", FULL_SIZES[kind], filled=3)
        assert (scene.digits >= 0).sum() == 3
        for question, answer in converse(rng, scene):
            assert answer == str(answer_from_labels(scene, question)) != "-1", question


def test_mosaics_can_have_the_size_of_the_test_alone():
    sizes = {kind: set() for kind in FULL_SIZES}
    for scene, _ in training_scenes(0, 40, sizes="test"):
        sizes[scene.kind].add(scene.grid)
    assert sizes["mosaic"] == {FULL_SIZES["mosaic"]} and sizes["large"] == {FULL_SIZES["large"]}
    assert len(sizes["clip"]) > 1


def test_wide_sizes_have_smaller_and_larger_scenes_and_answers_that_follow_from_the_labels():
    grids, frames, turns = set(), set(), set()
    for scene, asked in training_scenes(0, 120, sizes="wide"):
        grids.add(scene.grid)
        frames.add(len(scene.frames))
        turns.add(len(asked))
        for question, answer in asked:
            assert answer == str(answer_from_labels(scene, question)), question
            assert len(scene.frames) <= 16 or "first" in question  # "when" would count in moments of another length
    sides = {side for moments, *sides in grids if moments == 1 for side in sides}
    assert sides == set(range(2, 11))
    assert max(frames) == 32 and max(turns) == 16
    as_the_teacher = [scene.frames.tobytes() for scene, _ in training_scenes(0, 20)]
    wide = [scene.frames.tobytes() for scene, _ in training_scenes(0, 20, sizes="wide")]
    assert wide != as_the_teacher
    with pytest.raises(ValueError, match="sizes='huge' must be one of"):
        next(training_scenes(0, 1, sizes="huge"))


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_answers_follow_from_the_labels(task):
    for scene, (question, answer) in evaluation_scenes(task, 30):
        assert scene.kind == SCENE_OF_TASK[task]
        assert answer == str(answer_from_labels(scene, question)), question


def test_rows_are_reproducible_and_depend_on_their_seed():
    def pixels(rows):
        pictures = [[*row["images"], *itertools.chain.from_iterable(row["videos"])] for row in rows]
        return [[np.asarray(frame).tobytes() for frame in frames] for frames in pictures]

    once, again, other = (list(training_rows(seed, 12)) for seed in (3, 3, 4))
    assert [row["messages"] for row in once] == [row["messages"] for row in again]
    assert pixels(once) == pixels(again) != pixels(other)
    # row i does not depend on how many are asked for
    assert pixels(training_rows(3, 5)) == pixels(once)[:5]
    assert pixels(evaluation_rows("when", 3)) == pixels(evaluation_rows("when", 3))


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_rows_have_one_question_and_the_test_size(task):
    row = next(evaluation_rows(task, 1))
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert row["task"] == task
    if SCENE_OF_TASK[task] == "clip":
        assert len(row["videos"][0]) == 16
        assert row["videos"][0][0].size == (48, 48)
    else:
        assert row["images"][0].size == ((128, 128) if task == "large" else (64, 64))


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="'cells' must be one of"):
        next(evaluation_rows("cells", 1))
