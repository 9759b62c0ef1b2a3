"""The suite's teacher: a plain Qwen2.5-VL, its decoder started from the digits' teacher."""

from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from .. import qwen2_5_vl
from ..check_teacher import TEACHER as DIGITS


TEACHER = Path(__file__).parent / "teacher"  # shipped
DEPTH = 5


def teacher_config(tokenizer) -> Qwen2_5_VLConfig:
    """Returns the digits' shape with a larger vision tower, which attends to whole pictures in every layer."""
    config = qwen2_5_vl.teacher_config(tokenizer)
    vision = config.vision_config
    vision.depth, vision.hidden_size, vision.intermediate_size = DEPTH, 128, 320
    vision.fullatt_block_indexes = list(range(DEPTH))
    config.text_config.max_position_embeddings = 8192
    return config


def build_model(processor: Qwen2_5_VLProcessor) -> Qwen2_5_VLForConditionalGeneration:
    """Builds the teacher: the vision tower at random, decoder and known tokens from the digits' teacher."""
    tokenizer = processor.tokenizer
    model = Qwen2_5_VLForConditionalGeneration(teacher_config(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    digits = qwen2_5_vl.load_model(DIGITS)
    model.model.language_model.layers.load_state_dict(digits.model.language_model.layers.state_dict())
    model.model.language_model.norm.load_state_dict(digits.model.language_model.norm.state_dict())
    known = qwen2_5_vl.build_processor().tokenizer.get_vocab()
    ours, theirs = (m.get_input_embeddings().weight for m in (model, digits))
    pairs = [(i, known[token]) for token, i in tokenizer.get_vocab().items() if token in known]
    with torch.no_grad():
        rows, sources = (torch.tensor(side) for side in zip(*pairs))
        ours[rows] = theirs[sources]
    return model


def save_checkpoint(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, folder: Path) -> None:
    """Writes the weights in bfloat16, half the size; a model loaded from them is in float32 again."""
    state = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)
