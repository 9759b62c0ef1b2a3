"""Our side of lmms-eval. `make lmms-check` runs lmms-eval itself, in an environment of its own."""

import json
import sys
import types
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from PIL import Image
from transformers import AutoModelForImageTextToText

from linmu_hf.data import bad_rows, encode_prompts, load_rows
from linmu_hf.evaluation.lmms.report import compare_benchmarks, format_benchmarks
from linmu_hf.evaluation.lmms.rows import doc_to_messages, doc_to_target, doc_to_text, process_results, write_tasks
from linmu_hf.evaluation.lmms.run import benchmarks_of_rows, find_benchmarks, run_model, summarise
from linmu_hf.evaluation.lmms.tasks import PERCENT, SUITES, Benchmark, chance, sample_score
from linmu_hf.evaluation.retention import generate_answers


# ---- What lmms-eval hands over


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ({"options": ["A. a", "B. b", "C. c", "D. d"]}, 0.25),  # Video-MME
        ({"options": "['x', 'y']"}, 0.5),  # MMMU: as text
        ({"options": "[]", "question_type": "open"}, 0.0),
        ({"candidates": ["1", "2", "3"]}, 1 / 3),  # MLVU, LongVideoBench
        ({"choices": {"A": "a", "B": "b"}}, 0.5),
        ({"options": "not a list"}, 0.0),
        ({"question": "?"}, 0.0),
    ],
)
def test_chance(doc, expected):
    assert chance(doc) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.0, 1.0),
        (False, 0.0),
        ({"score": 0.5}, 0.5),
        ({"pred_answer": "A", "answer": "A"}, 1.0),  # Video-MME
        ({"parsed_pred": "B", "answer": ["A", "B"]}, 1.0),  # MMMU
        ({"parsed_pred": "B", "answer": "C"}, 0.0),
        ({"submission": 1}, None),
        ("text", None),
    ],
)
def test_sample_score(value, expected):
    assert sample_score({"metric": value}, "metric") == expected


def found(scores, reported, metric="score"):
    samples = [{"doc_id": i, "doc": {"options": "abcd"}, metric: score} for i, score in enumerate(scores)]
    return {
        "results": {"t": {f"{metric},none": reported, f"{metric}_stderr,none": 0.1}},
        "samples": {"t": samples[::-1]},
    }


def test_summary_of_a_task():
    one = summarise(Benchmark("T", "t", ""), found([1.0, 0.0, 1.0], 2 / 3), {"avg_ttft": 0.5, "avg_speed": 3.0})
    assert (one["metric"], one["ttft"], one["tokens_per_second"]) == ("score", 0.5, 3.0)
    assert [sample["score"] for sample in one["samples"]] == [1.0, 0.0, 1.0]
    percent = summarise(Benchmark("T", "t", "score"), found([1.0, 0.0], 50.0), {})
    assert percent["score"] == 0.5 and percent["samples"][0]["score"] == 1.0
    # scores of the questions that do not make up what is reported are not used
    other = summarise(Benchmark("T", "t", "score"), found([1.0, 0.0], 0.9), {})
    assert [sample["score"] for sample in other["samples"]] == [None, None]
    with pytest.raises(ValueError, match=r"t gives \['score'\], not acc"):
        summarise(Benchmark("T", "t", "acc"), found([1.0], 1.0), {})


@pytest.mark.parametrize(
    ("metric", "reported", "scores", "expected"),
    [
        ("videomme_perception_score", 1.0, [1.0] + [0.0] * 99, 0.01),  # percent by its name: 1% is not 100%
        ("videomme_perception_score", 0.5, [1.0] + [0.0] * 199, 0.005),
        ("mmmu_acc", 1.0, [1.0, 1.0], 1.0),  # a share by its name
        ("own", 1.0, [1.0] + [0.0] * 99, 0.01),  # by the questions
        ("own", 1.0, [1.0, 1.0], 1.0),
        ("own", 0.0, [0.0, 0.0], 0.0),
        ("own", 40.0, ["kept elsewhere"], 0.4),  # by neither, but no share is above 1
        ("own", 0.4, ["kept elsewhere"], 0.4),
    ],
)
def test_the_unit_is_that_of_the_metric(metric, reported, scores, expected):
    one = summarise(Benchmark("T", "t", metric), found(scores, reported, metric), {})
    assert one["score"] == pytest.approx(expected)


def test_every_percent_metric_is_one_of_the_suites():
    assert set(PERCENT) <= {one.metric for suite in SUITES.values() for one in suite}


def test_suites(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    paper, left_out = find_benchmarks(["paper", "docvqa_val", "mine"])
    assert left_out == ["ActivityNet-QA", "MathVista"]
    assert [one.task for one in paper[-2:]] == ["docvqa_val", "mine"] and paper[-2].metric == "anls"
    assert find_benchmarks(["activitynetqa"]) == ([SUITES["paper"][8]], [])  # asked for by name
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    assert len(find_benchmarks(["paper", "dense"])[0]) == sum(map(len, SUITES.values()))


# ---- Tables


def result(scores, chances=None, score=None):
    chances = chances or [0.0] * len(scores)
    samples = [{"id": i, "score": s, "chance": c} for i, (s, c) in enumerate(zip(scores, chances))]
    return {"samples": samples, "score": np.mean(scores) if score is None else score, "metric": "score",
            "ttft": 0.1, "tokens_per_second": 10.0}  # fmt: skip


def test_retention_by_hand():
    teacher = {"a": result([1, 1, 1, 0], [0.25] * 4), "b": result([1, 1])}
    student = {"a": result([1, 1, 0, 0], [0.25] * 4), "b": result([1, 1])}
    benchmarks = [Benchmark("A", "a", ""), Benchmark("B", "b", "")]
    report = compare_benchmarks({"teacher": teacher, "s": student}, benchmarks, "teacher")
    kept = report["tasks"]["a"]["models"]["s"]
    assert kept["retention"]["value"] == pytest.approx(0.5 / 0.75)
    assert kept["above_chance"]["value"] == pytest.approx(0.25 / 0.5)
    low, high = kept["retention"]["interval"]
    assert 0 <= low <= kept["retention"]["value"] <= high <= 1  # paired: where the student is right, so is the teacher
    assert "retention" not in report["tasks"]["a"]["models"]["teacher"]
    assert report["mean"]["s"]["above_chance"] == pytest.approx((0.5 + 1) / 2)
    table = format_benchmarks(report)
    assert "66.7 [" in table and "50.0 [" in table and "100 ms" in table


def test_no_interval_where_questions_have_no_scores():
    none = [{"id": 0, "score": None, "chance": 0.0}]
    results = {
        name: {"a": {**result([1], score=score), "samples": none}} for name, score in (("teacher", 0.8), ("s", 0.6))
    }
    kept = compare_benchmarks(results, [Benchmark("A", "a", "")], "teacher")["tasks"]["a"]["models"]["s"]
    assert kept["retention"] == {"value": pytest.approx(0.75), "interval": None}


def test_other_questions_are_not_compared():
    with pytest.raises(ValueError, match="other questions of a"):
        compare_benchmarks(
            {"teacher": {"a": result([1, 1])}, "s": {"a": result([1])}}, [Benchmark("A", "a", "")], None
        )


# ---- Rows as tasks


def encode_texts(processor, row):
    return processor.tokenizer.decode(encode_prompts(processor, [row])["input_ids"][0])


def test_a_row_is_asked_as_linmu_eval_asks_it(processor, rows):
    for row in rows:
        asked = {"messages": [*doc_to_messages(row), {"role": "assistant", "content": "?"}]}
        ours, theirs = encode_prompts(processor, [asked]), encode_prompts(processor, [row])
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name]), rtol=0, atol=0)
        # lmms-eval asks for texts and judges answers with rows that it has read without their media
        bare = {name: value for name, value in row.items() if name not in ("images", "videos")}
        assert doc_to_text(bare) in encode_texts(processor, row)
        assert process_results(bare, [f" {doc_to_target(bare).upper()}."]) == {"score": 1.0}
        assert process_results(bare, ["no"]) == {"score": 0.0}


def test_files_of_tasks(processor, dataset_folder, tmp_path):
    names = write_tasks(str(dataset_folder), "test", tmp_path / "tasks", processor, limit=2)
    assert list(names.values()) == [one.title for one in benchmarks_of_rows(tmp_path / "tasks")]
    for name in names:
        text = (tmp_path / "tasks" / f"{name}.yaml").read_text()
        assert f"task: {name}\n" in text and "max_new_tokens: 32" in text


# ---- The model


@dataclass
class Request:
    args: tuple


@dataclass
class TokenCounts:
    output_tokens: int


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts


class Base:
    def __init__(self):
        self.cache_hook = types.SimpleNamespace(add_partial=lambda *given: None)
        self.task_dict = {}

    rank = property(lambda self: self._rank)


@dataclass
class Logged:
    calls: list = field(default_factory=list)

    def log_metrics(self, seconds, tokens, speed, more):
        self.calls.append((seconds, tokens, speed, more))


@pytest.fixture
def lmms_eval(monkeypatch):
    """As much of lmms-eval as the model imports."""
    logged = Logged()
    contents = {
        "lmms_eval.api.instance": {"GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": logged.log_metrics},
    }
    for name, content in contents.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            module = types.ModuleType(".".join(parts[:i]))
            monkeypatch.setitem(sys.modules, module.__name__, sys.modules.get(module.__name__, module))
        vars(sys.modules[name]).update(content)
    monkeypatch.delitem(sys.modules, "linmu_hf.evaluation.lmms.model", raising=False)
    yield logged
    sys.modules.pop("linmu_hf.evaluation.lmms.model", None)


def requests_of(rows):
    ways = [{"max_new_tokens": 3}, {"max_new_tokens": 3, "until": ["x"]}]
    return [Request(("", doc_to_messages, ways[i % 2], i, "t", "test")) for i in range(len(rows))]


def test_answers_are_those_of_linmu_eval(lmms_eval, student_folder, processor, rows):
    from linmu_hf.evaluation.lmms.model import LinMU

    model = LinMU(str(student_folder), batch_size=2, device="cpu")
    model.task_dict = {"t": {"test": rows}}
    results = model.generate_until(requests_of(rows))
    student = AutoModelForImageTextToText.from_pretrained(student_folder)
    expected = generate_answers(student, processor, rows, max_new_tokens=3)
    assert [result.text for result in results] == [
        text.split("x")[0] if i % 2 else text for i, text in enumerate(expected)
    ]
    assert all(1 <= result.token_counts.output_tokens <= 3 for result in results)
    ((seconds, tokens, speed, more),) = lmms_eval.calls
    assert tokens == sum(result.token_counts.output_tokens for result in results)
    assert 0 < more["ttft"] < seconds and speed == tokens / seconds


def test_special_tokens_of_the_reference_stay(lmms_eval, student_folder, processor, monkeypatch):
    """In tasks made of rows, as by `linmu-eval --dataset`; lmms-eval's own tasks are judged without any."""
    from linmu_hf.evaluation.lmms.model import LinMU

    said = "<|box_start|>(12,30)<|box_end|>"
    ids = torch.tensor([[*processor.tokenizer(said)["input_ids"], processor.tokenizer.eos_token_id]])
    question = {"role": "user", "content": "where?"}
    rows = [{"messages": [question, {"role": "assistant", "content": text}]} for text in (said, "(12,30)")]
    model = LinMU(str(student_folder), device="cpu")
    model.task_dict = {"t": {"test": rows}}
    monkeypatch.setattr(model.model, "generate", lambda input_ids, **given: torch.cat([input_ids, ids], 1))
    for how, expected in (({"keep_special_tokens_of_the_reference": True}, [said, "(12,30)"]), ({}, ["(12,30)"] * 2)):
        requests = [Request(("", doc_to_messages, how, i, "t", "test")) for i in range(2)]
        results = model.generate_until(requests)
        assert [result.text for result in results] == expected
    assert process_results(rows[0], [said]) == {"score": 1.0}


def test_rows_that_cannot_be_used_are_left_out(processor, tmp_path):
    for name in ("a.png", "b.png"):
        Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / name)
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:-40])
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which?"}]}
    messages = [question, {"role": "assistant", "content": [{"type": "text", "text": "7"}]}]
    lines = [
        {"messages": messages, "images": [str(tmp_path / name)], "task": task}
        for name, task in (("a.png", "x"), ("b.png", "x"), ("b.png", "y"))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = load_rows(str(tmp_path / "rows.jsonl"), "train")
    assert [number for number, _ in bad_rows(rows, processor)] == []  # their headers are right
    bad = dict(bad_rows(rows, processor, decode=True))
    assert list(bad) == [1, 2] and "b.png" in str(bad[1])
    names = write_tasks(str(tmp_path / "rows.jsonl"), "train", tmp_path / "tasks", processor, without=bad)
    assert list(names.values()) == ["x"]
    (name,) = names
    assert len(load_from_disk(str(tmp_path / "tasks" / "data" / name))["train"]) == 1
    assert "keep_special_tokens_of_the_reference: true" in (tmp_path / "tasks" / f"{name}.yaml").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"frames": 3}, r"model_args \['frames'\] are unknown"),
        ({"batch_size": "auto"}, "batch_size='auto' must be a number"),
        ({"max_batch_size": 4}, "max_batch_size=4 has no effect"),
    ],
)
def test_arguments(lmms_eval, student_folder, given, message):
    from linmu_hf.evaluation.lmms.model import LinMU

    with pytest.raises(ValueError, match=message):
        LinMU(str(student_folder), device="cpu", **given)


def test_a_part_of_a_video(lmms_eval):
    """By lmms-eval's names and by those of qwen-vl-utils, which its tasks give, too."""
    from linmu_hf.evaluation.lmms.model import as_row

    medium = {"path": "a.mp4", "video_start": 3.0}
    parts = [{"type": "video", "url": "a.mp4", "start_time": 3.0, "end_time": 4}, {"type": "video", "url": medium}]
    row = as_row([{"role": "system", "content": "?"}, {"role": "user", "content": parts}])
    expected = [
        {"type": "video", "url": "a.mp4", "video_start": 3.0, "video_end": 4}, {"type": "video", "url": medium},
    ]  # fmt: skip
    assert [message["content"] for message in row["messages"]] == ["?", expected, "?"]


def test_rounds(lmms_eval, student_folder, processor, rows):
    """Each round asks what the task makes of the answers before, by lmms-eval's protocol."""
    from linmu_hf.evaluation.lmms.model import LinMU

    model = LinMU(str(student_folder), device="cpu")
    model.task_dict = {"t": {"test": rows}}
    calls = []

    def doc_to_messages(doc, round_idx=None, previous_output=None, previous_round_info=None):
        calls.append((round_idx, previous_output, previous_round_info))
        if round_idx == 3:
            return None, True, previous_output, None
        asked = [{"role": "user", "content": f"{doc['task']} {round_idx} {previous_output}"}]
        return asked if round_idx is None else (asked, False, previous_output, {"round": round_idx})

    (said,) = model.generate_until_multi_round([Request(("", doc_to_messages, {"max_new_tokens": 3}, 0, "t", "test"))])
    student = AutoModelForImageTextToText.from_pretrained(student_folder)
    expected = []
    for i in range(3):
        text = f"{rows[0]['task']} {i or None} {expected or None}"
        row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "?"}]}
        expected += generate_answers(student, processor, [row], max_new_tokens=3)
    assert said == expected
    assert [call[0] for call in calls] == [None, 1, 2, 3] and calls[2][2] == {"round": 1}


def test_results_are_kept(tmp_path, monkeypatch):
    """What is there is not run again, and what was made otherwise is refused."""
    runs = []
    model = types.SimpleNamespace(rank=0, accelerator=types.SimpleNamespace(wait_for_everyone=lambda: None))
    monkeypatch.setattr("linmu_hf.evaluation.lmms.run._load", lambda settings: model)
    monkeypatch.setattr(
        "linmu_hf.evaluation.lmms.run._run", lambda *given: runs.append(given[1].task) or {"score": len(runs)}
    )
    one, two = (Benchmark(name, name, "") for name in ("one", "two"))
    run_model("m", [one], tmp_path, {"limit": None, "batch_size": 1}, None)
    results = run_model("m", [one, two], tmp_path, {"limit": None, "batch_size": 1}, None)
    assert runs == ["one", "two"] and results["one"]["score"] == 1 and results["two"]["score"] == 2
    with pytest.raises(ValueError, match=r"one.json was made with .* give another --output"):
        run_model("m", [one], tmp_path, {"limit": 5, "batch_size": 1}, None)
