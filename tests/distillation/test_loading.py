"""A teacher in the files of its makers: what its student has replaced is read, the rest compared."""

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from linmu_hf import LinMUForConditionalGeneration
from linmu_hf.conversion.convert import convert
from linmu_hf.distillation import loading
from linmu_hf.distillation.stages import FLEX, LORA, Stage
from linmu_hf.distillation.teacher import SeparateTeacher, SharedTeacher


ALIGN = Stage("align", trains=(FLEX,), max_steps=1, learning_rate=1e-3, hid=0.5)
FFN = Stage("ffn", trains=(r"\.mlp\.",), max_steps=1, learning_rate=1e-3, tok=0.5)
ADAPT = Stage("adapt", trains=(LORA,), max_steps=1, learning_rate=1e-3, tok=0.5, lora_r=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, teacher_config, processor):
    root = tmp_path_factory.mktemp("loading")
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(teacher_config).save_pretrained(root / "teacher")
    processor.save_pretrained(root / "teacher")
    convert(str(root / "teacher"), str(root / "student"), keep_attention=[1])
    return root


def student(folders):
    return LinMUForConditionalGeneration.from_pretrained(folders / "student", dtype="float32")


def test_only_attention_is_loaded_where_the_backbone_stays(folders, monkeypatch):
    theirs = loading.load_teacher(folders / "teacher")
    monkeypatch.setattr(loading, "load_teacher", None)
    teacher = loading.load_as_teacher(student(folders), folders / "teacher", [ALIGN, ADAPT], dtype="float32")
    assert isinstance(teacher, SharedTeacher) and set(teacher.attention) == {"0", "2"}
    ids = torch.arange(9)[None]
    torch.testing.assert_close(teacher.as_model()(input_ids=ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize("stages", [[FFN], [ADAPT, ALIGN]], ids=["trained", "merged"])
def test_a_backbone_that_changes_is_loaded_twice(folders, stages):
    teacher = loading.load_as_teacher(student(folders), folders / "teacher", stages)
    assert isinstance(teacher, SeparateTeacher)
    with pytest.raises(ValueError, match=rf"shared_teacher=True, but {stages[0].name} (trains|merges)"):
        loading.load_as_teacher(student(folders), folders / "teacher", stages, shared=True)


def test_another_backbone_is_loaded(folders):
    other = student(folders)
    with torch.no_grad():
        other.model.language_model.layers[2].mlp.up_proj.weight[3, 4] += 0.01
    assert isinstance(loading.load_as_teacher(other, folders / "teacher", [ALIGN]), SeparateTeacher)
    assert isinstance(loading.load_as_teacher(student(folders), folders / "teacher", [ALIGN], False), SeparateTeacher)
