"""Every script of examples/ runs, on an untrained model of the testbed teacher's architecture."""

import runpy
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

from linmu_hf.conversion.convert import convert
from linmu_hf.testbed.make_data import make_data
from linmu_hf.testbed.processor import build_processor
from linmu_hf.testbed.qwen2_5_vl import teacher_config


EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str):
    return runpy.run_path(str(EXAMPLES / name))["main"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    torch.manual_seed(0)
    processor = build_processor()
    Qwen2_5_VLForConditionalGeneration(teacher_config(processor.tokenizer)).save_pretrained(folder / "teacher")
    processor.save_pretrained(folder / "teacher")
    make_data(folder / "data", train=16, test=1)
    convert(str(folder / "teacher"), str(folder / "init"))
    return folder


def test_convert_and_distil(folder):
    example("convert_and_distil.py")(*(str(folder / name) for name in ("teacher", "data", "run")), 1)
    AutoModelForImageTextToText.from_pretrained(folder / "run" / "student")


def test_ask(folder, capsys):
    load_from_disk(folder / "data")["test"][0]["images"][0].save(folder / "image.png")
    example("ask.py")(str(folder / "init"), str(folder / "image.png"), "row 2 column 3?")
    assert capsys.readouterr().out.endswith("\n")


def test_lora_changes_the_blocks_and_nothing_else(folder):
    example("lora.py")(str(folder / "init"), str(folder / "data"), str(folder / "lora"), steps=2)
    before = AutoModelForImageTextToText.from_pretrained(folder / "init").state_dict()
    after = AutoModelForImageTextToText.from_pretrained(folder / "lora").state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("language_model.layers" in name for name in changed)
    for part in ("flex_ma.x_proj", "forward_scan.b_proj", "local_swin.q_proj", "mlp.up_proj"):
        assert any(part in name for name in changed), part
