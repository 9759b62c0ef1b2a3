"""A tiny random teacher and student in folders, and rows of the testbed."""

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

from linmu_hf import LinMUConfig, LinMUForConditionalGeneration
from linmu_hf.testbed.data import evaluation_rows
from linmu_hf.testbed.make_data import make_data
from linmu_hf.testbed.processor import build_processor
from linmu_hf.testbed.qwen2_5_vl import teacher_config


# Sizes of a decoder to measure.
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    "state_size": 8,
}


@pytest.fixture(scope="session")
def processor():
    return build_processor()


@pytest.fixture(scope="session")
def teacher(processor):
    """An untrained model of the testbed teacher's architecture."""
    torch.manual_seed(0)
    config = teacher_config(processor.tokenizer)
    config.text_config.num_hidden_layers = 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    return Qwen2_5_VLForConditionalGeneration(config).eval()


@pytest.fixture(scope="session")
def teacher_folder(teacher, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "teacher"
    teacher.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def student_folder(teacher, processor, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "student"
    LinMUForConditionalGeneration(LinMUConfig.from_teacher(teacher.config)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_only_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "text-only"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_hidden_layers=1, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dataset_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "rows"
    make_data(folder, train=2, test=3)
    return folder


@pytest.fixture
def rows():
    return [row for task in ("cell", "large", "when") for row in evaluation_rows(task, 3)]
