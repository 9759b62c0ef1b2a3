"""A tiny random teacher and its student, and a handful of conversations about random images and clips."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from transformers import Qwen2_5_VLConfig

from linmu_hf import LinMUConfig, LinMUForConditionalGeneration
from linmu_hf.distillation import folders
from linmu_hf.testbed.processor import build_processor


def tiny_teacher_config(processor) -> Qwen2_5_VLConfig:
    """A Qwen2.5-VL of three layers for the testbed's processor."""
    ids = processor.tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            "initializer_range": 0.2,
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
            "bos_token_id": None,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 32,
            "fullatt_block_indexes": [0],
            "out_hidden_size": 32,
            "initializer_range": 0.2,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )


def as_stored(rows):
    """The rows as a dataset, pictures in the form of files."""
    part = {"type": Value("string"), "text": Value("string")}
    features = Features(
        {
            "messages": List({"role": Value("string"), "content": List(part)}),
            "images": List(Image()),
            "videos": List(List(Image())),
        }
    )
    return Dataset.from_list(rows, features=features)


def save_pair(folder, processor, student, teacher):
    """Saves both models with their processor as `student` and `teacher`."""
    for name, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)


class Rows:
    """A stream that is nothing but an iterable."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.fixture(scope="package", autouse=True)
def frozen_heap():
    """Accelerate collects garbage before every stage: slow beside all that a test session has imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes as long as a tiny training; what fixtures of a module train has its pictures."""
    for name in ("plot_training_log", "plot_error_map"):
        monkeypatch.setattr(folders, name, lambda rows, path: Path(path).touch())


@pytest.fixture(scope="session")
def processor():
    return build_processor()


@pytest.fixture(scope="session")
def teacher_config(processor):
    return tiny_teacher_config(processor)


@pytest.fixture(scope="session")
def make_teacher(teacher_config):
    def make(seed: int = 0):
        torch.manual_seed(seed)
        config = LinMUConfig.from_teacher(teacher_config, keep_attention="all")
        return LinMUForConditionalGeneration(config).eval()

    return make


@pytest.fixture(scope="session")
def make_student(teacher_config, make_teacher):
    """A student around the teacher's backbone; its mixers are random, apart from what M-MATE resets itself."""

    def make(keep_attention=()):
        torch.manual_seed(1)
        student = LinMUForConditionalGeneration(
            LinMUConfig.from_teacher(teacher_config, keep_attention=keep_attention)
        ).eval()
        student.load_state_dict(make_teacher().state_dict(), strict=False)
        return student

    return make


@pytest.fixture(scope="session")
def rows():
    """Ten rows: one or two images or a clip each, of different sizes, with one to three questions."""
    random = np.random.default_rng(0)

    def picture(height, width):
        return PILImage.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))

    def row(index):
        media = {"images": [], "videos": []}
        if index % 3 == 2:
            media["videos"] = [[picture(32, 48) for _ in range(4)]]
            parts = [{"type": "video"}]
        else:
            count = 1 + index % 2
            media["images"] = [picture(16 * (2 + index % 3), 48) for _ in range(count)]
            parts = [{"type": "image"}] * count
        messages = []
        for turn in range(1 + index % 3):
            content = [*(parts if turn == 0 else []), {"type": "text", "text": f"row {turn} column {index}?"}]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": str((index + turn) % 10)}]})
        return {"messages": messages, **media}

    return [row(index) for index in range(10)]
