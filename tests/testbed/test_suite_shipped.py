"""The suite's teacher that is shipped: a plain model, small, which answers what it was trained on."""

import json

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from linmu_hf.testbed.suite.check_teacher import check
from linmu_hf.testbed.suite.model import TEACHER, teacher_config
from linmu_hf.testbed.suite.processor import build_processor


@pytest.fixture(scope="module")
def teacher():
    return AutoModelForImageTextToText.from_pretrained(TEACHER, dtype="float32").eval()


def test_it_is_small_and_as_the_script_builds_it(teacher):
    assert type(teacher) is Qwen2_5_VLForConditionalGeneration
    assert sum(file.stat().st_size for file in TEACHER.iterdir()) <= 8e6
    processor = build_processor()
    assert AutoProcessor.from_pretrained(TEACHER).tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    built, shipped = teacher_config(processor.tokenizer), teacher.config
    for part in ("vision_config", "text_config"):
        for name in ("hidden_size", "intermediate_size", "depth", "num_hidden_layers", "max_position_embeddings"):
            assert getattr(getattr(built, part), name, None) == getattr(getattr(shipped, part), name, None), name


@pytest.mark.parametrize("task", ["sign", "icon", "same", "needle", "memory"])
def test_it_answers(task, teacher):
    found = check(teacher, AutoProcessor.from_pretrained(TEACHER), "seen", 20, [task], seed=7)
    assert found[task]["accuracy"] >= 0.8


def test_its_log_is_that_of_this_model():
    lines = [json.loads(line) for line in (TEACHER / "training_log.jsonl").read_text().splitlines()]
    assert "looking" in lines[0] and min(lines[-1]["seen"].values()) > 0.8
