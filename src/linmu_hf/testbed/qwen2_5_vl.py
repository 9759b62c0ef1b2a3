"""The testbed's Qwen2.5-VL: its shape, and what makes its training quick."""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from .processor import build_processor as build_processor


def teacher_config(tokenizer) -> Qwen2_5_VLConfig:
    """Returns the teacher's shape: every cell is one vision token, every moment two temporal positions."""
    ids = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "rms_norm_eps": 1e-6,
            "initializer_range": 0.05,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 128,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.05,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    return config


def equal_windows_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, max_length_q, **kwargs):
    """Attends to equal windows of the vision tower in one call; Transformers' own SDPA path loops over them."""
    _, h, s, d = query.shape
    n = len(cu_seq_lens_q) - 1
    if n * int(max_length_q) != s:
        raise ValueError(f"{n} windows of {int(max_length_q)} patches do not fill {s}: batch scenes of one size")
    query, key, value = (x.reshape(h, n, s // n, d).transpose(0, 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, scale=scaling)  # [n, h, s / n, d]
    return out.transpose(1, 2).reshape(1, s, h, d), None


# "flash" in the name selects the variable-length call, which hands over all windows at once
AttentionInterface.register("flash_equal_windows", equal_windows_attention)


def build_model(processor: Qwen2_5_VLProcessor) -> Qwen2_5_VLForConditionalGeneration:
    """Builds the teacher with random weights."""
    model = Qwen2_5_VLForConditionalGeneration(teacher_config(processor.tokenizer))
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    return model


def load_model(folder: str | Path) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)


def save_checkpoint(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, folder: str | Path
) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def train_mode(model: Qwen2_5_VLForConditionalGeneration, training: bool = True) -> None:
    """Sets training or evaluation mode; batches in training have scenes of one size, so that windows are equal."""
    model.train(training)
    model.model.visual.config._attn_implementation = "flash_equal_windows" if training else "sdpa"


def shared_positions(model: Qwen2_5_VLForConditionalGeneration, batch: dict) -> torch.Tensor:
    """Returns positions `[3, b, t]` of a batch with one grid: all rows have those of the longest."""
    longest = int(batch["attention_mask"].sum(1).argmax())
    names = ("labels", "attention_mask")
    one_row = {
        name: value[longest, None]
        for name, value in batch.items()
        if name not in names and not name.startswith("pixel")
    }
    return model.model.get_rope_index(**one_row)[0].expand(-1, len(batch["input_ids"]), -1)
