import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from linmu_hf.data import encode_rows
from linmu_hf.evaluation.retention import (
    accuracy_report,
    answer_limit,
    compare,
    correct_answers,
    format_table,
    generate_answers,
    normalise,
    reference_lengths,
    retention_report,
    tasks_of,
    wilson_interval,
)


def row(answer, task="cell"):
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}], "task": task}


@pytest.mark.parametrize("text", ["moment 3", " Moment  3. ", '"moment 3"', "MOMENT\n3"])
def test_normalise_forgives_form(text):
    assert normalise(text) == "moment 3"


def test_normalise_keeps_meaning():
    assert normalise("3.5") != normalise("35")
    assert normalise("moment 3") != normalise("moment 13")
    assert normalise("-3") != normalise("3")


@pytest.mark.parametrize("word", ["café", "Tiếng Việt", "한국어", "Ångström", "が"])
def test_normalise_takes_unicode_forms_as_one(word):
    assert normalise(unicodedata.normalize("NFD", word)) == normalise(unicodedata.normalize("NFC", word))


@pytest.mark.parametrize(
    ("text", "same"),
    [("１２", "12"), ("（Ａ）", "(a)"), ("a\u3000b\u00a0c", "a b c"), ("\ufeffyes\u200b", "yes"), ("“yes.”", "yes"),
     ("是。", "是"), ('"yes".', "yes")],
)  # fmt: skip
def test_normalise_forgives_widths_and_marks(text, same):
    assert normalise(text) == same


@pytest.mark.parametrize(("text", "other"), [("x²", "x2"), ("½", "1/2"), (".5", "5"), ("é", "e"), ("a b", "ab")])
def test_normalise_keeps_compatibility_forms(text, other):
    assert normalise(text) != normalise(other)


def test_any_value_names_a_task():
    rows = [{"task": value} for value in ("cell", 0, 3, False, None, "", 1.5)] + [{}]
    assert tasks_of(rows) == ["cell", "0", "3", "False", "all", "all", "1.5", "all"]


class Oracle:
    """Generates the given tokens one by one, up to `max_new_tokens`."""

    device = "cpu"

    def __init__(self, processor, said):
        eos = processor.tokenizer.eos_token_id
        self.generation_config = SimpleNamespace(eos_token_id=eos)
        self.said = encode_rows(processor, [row(said)])["labels"][0]

    def eval(self):
        return self

    def generate(self, input_ids, max_new_tokens, **options):
        said = self.said[self.said != -100][:max_new_tokens]
        return torch.cat([input_ids, said.expand(len(input_ids), -1)], 1)


BOX = "<|box_start|>(12,30),(40,50)<|box_end|>"


@pytest.mark.parametrize(
    "text",
    ["(12,30)", BOX, "<|object_ref_start|>cat<|object_ref_end|>", "<|vision_start|>", "<tool_call>x</tool_call>"],
)
def test_an_answer_that_is_the_reference_is_right(processor, text):
    answers = generate_answers(Oracle(processor, text), processor, [row(text)])
    assert answers == [text] and correct_answers([row(text)], answers).all()


def test_special_tokens_of_the_answer_alone_do_not_count(processor):
    plain = row("(12,30),(40,50)")
    assert correct_answers([plain], generate_answers(Oracle(processor, BOX), processor, [plain])).all()
    assert not correct_answers([row(BOX)], ["(12,30),(40,50)"]).any()


@pytest.mark.parametrize("count", [5, 16, 17, 40])
def test_the_limit_lets_the_longest_reference_through(processor, count):
    text = " ".join(str(i % 10) for i in range(count))
    rows, cut = [row("7"), row(text)], []
    answers = generate_answers(Oracle(processor, text), processor, rows, cut=cut)
    assert correct_answers(rows, answers).tolist() == [False, True] and cut == []
    assert answer_limit(processor, rows) >= max(32, reference_lengths(processor, rows)[1])


def test_answers_cut_at_the_limit_are_told(processor):
    text = " ".join("123456789")
    length = reference_lengths(processor, [row(text)])[0]
    for limit, expected in ((length - 2, [5]), (length, [])):
        cut = []
        generate_answers(Oracle(processor, text), processor, [row(text)], max_new_tokens=limit, numbers=[5], cut=cut)
        assert cut == expected


def test_correct_answers_compares_row_by_row():
    assert correct_answers([row("7"), row("red"), row("9")], ["7.", " Red", "6"]).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("right", "n", "expected"), [(0, 10, (0.0, 0.2775)), (5, 10, (0.2366, 0.7634)), (95, 100, (0.8882, 0.9785))]
)
def test_wilson_interval_has_the_known_values(right, n, expected):
    assert wilson_interval(right, n) == pytest.approx(expected, abs=1e-4)


def test_accuracy_means_over_tasks_not_rows():
    correct = np.array([True] * 9 + [False] + [False])
    report = accuracy_report(correct, ["cell"] * 10 + ["count"])
    assert report["tasks"]["cell"]["accuracy"] == 0.9
    assert report["tasks"]["count"]["rows"] == 1
    assert report["mean"] == pytest.approx(0.45)


def test_retention_pairs_the_rows():
    """A student right on exactly the teacher's rows keeps all of it with no uncertainty, whatever the accuracy."""
    rng = np.random.default_rng(0)
    teacher = rng.random(200) < 0.8
    tasks = ["cell"] * 100 + ["count"] * 100
    same = retention_report(teacher, teacher, tasks)
    assert same["mean"] == {"retention": 1.0, "interval": [1.0, 1.0]}

    student = teacher.copy()
    student[100:150] = False
    report = retention_report(student, teacher, tasks)
    assert report["tasks"]["cell"]["retention"] == 1.0
    assert report["worst"]["task"] == "count"
    assert report["worst"]["retention"] == pytest.approx(student[100:].mean() / teacher[100:].mean())
    low, high = report["tasks"]["count"]["interval"]
    assert low < report["tasks"]["count"]["retention"] < high
    assert report["mean"]["retention"] == pytest.approx(student.mean() / teacher.mean())


def test_retention_interval_covers_the_truth():
    """95% of the intervals, give or take, hold the true ratio 0.7 / 0.9."""
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        draw = rng.random(150)
        report = retention_report(draw < 0.7, draw < 0.9, ["cell"] * 150, samples=300, seed=seed)
        low, high = report["tasks"]["cell"]["interval"]
        covered += low <= 0.7 / 0.9 <= high
    assert 0.9 <= covered / 200 <= 0.99


def test_retention_of_a_teacher_that_knows_nothing_is_undefined():
    nothing = np.zeros(4, dtype=bool)
    report = retention_report(nothing, nothing, ["cell"] * 4)
    assert report["mean"]["retention"] is None
    assert report["worst"] == {"task": None, "retention": None}
    assert "-" in format_table(compare({"teacher": nothing, "student": nothing}, ["cell"] * 4, "teacher"))


def test_retention_refuses_other_rows():
    with pytest.raises(ValueError, match="not 3 and 2"):
        retention_report(np.ones(3, dtype=bool), np.ones(2, dtype=bool), ["cell"] * 3)


def test_table_has_a_row_per_task_and_a_column_per_model():
    tasks = ["cell"] * 4 + ["count"] * 4
    correct = {"teacher": np.ones(8, dtype=bool), "stage-1": np.array([True, False] * 4)}
    lines = format_table(compare(correct, tasks, "teacher")).splitlines()
    assert lines[0].split() == ["task", "teacher", "stage-1"]
    assert [line.split()[0] for line in lines if line[0] != "-"] == [
        "task",
        "cell",
        "count",
        "mean",
        "retention",
        "worst",
    ]
    assert "50.0 [" in next(line for line in lines if line.startswith("retention"))


def test_answers_depend_neither_on_the_batch_nor_on_its_order(teacher, processor, rows):
    alone = [generate_answers(teacher, processor, [row], max_new_tokens=4)[0] for row in rows]
    together = generate_answers(teacher, processor, rows, batch_size=5, max_new_tokens=4)
    assert alone == together
    assert len(set(alone)) > 1  # a wrong order would be seen
