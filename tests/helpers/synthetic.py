"""Tiny Qwen2.5-VL checkpoints with random weights, and a processor with Qwen2.5-VL's own chat template."""

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)


CHAT_TEMPLATE = """{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""  # noqa: E501

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
HUB_NAMES = {"model.visual.": "visual.", "model.language_model.": "model."}


def train_bpe() -> dict:
    """Vocabulary and merges of a small byte-level BPE."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["system user assistant You are a helpful assistant. which digit row column"] * 2,
        trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False),
    )
    state = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split()) for merge in state["merges"]]
    return {"vocab": state["vocab"], "merges": merges}


def make_processor() -> Qwen2_5_VLProcessor:
    tokenizer = Qwen2TokenizerFast(
        **train_bpe(),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL_TOKENS[1:],
    )
    size = {"shortest_edge": 4 * 4, "longest_edge": 64 * 64}
    vision = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": size}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**vision),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**vision, cap_pixels_per_frame=False),
        chat_template=CHAT_TEMPLATE,
    )


def make_teacher_config(processor=None, tie: bool = False, layers: int = 4, hidden: int = 64) -> Qwen2_5_VLConfig:
    tokenizer = (processor or make_processor()).tokenizer
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
            },
            "tie_word_embeddings": tie,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "out_hidden_size": hidden,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tie,
    )


def make_teacher(
    folder: Path | None = None, *, tie=False, hub_names=True, shard="60KB", seed=0, processor=None, **kwargs
):
    """A random teacher; written to `folder` in shards of `shard` (`None`: one file), under Hub or in-memory names."""
    processor = processor or make_processor()
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(make_teacher_config(processor, tie, **kwargs)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.ndim > 1:
                parameter.mul_(4)  # away from the near-linear regime of a fresh init
    if folder is not None:
        model.save_pretrained(folder, max_shard_size=shard or "1GB", save_original_format=hub_names)
        processor.save_pretrained(folder)
        if not hub_names:
            assert any(name.startswith("model.language_model.") for name in checkpoint_names(folder))
    return model


def checkpoint_names(folder: Path) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def rewrite(file: Path, change) -> None:
    """Rewrites a safetensors file with its dict of tensors passed through `change`."""
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def image(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = torch.randint(
        0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return Image.fromarray(pixels.numpy())


def ask(text: str, *, images: int = 0, videos: int = 0) -> dict:
    content = [{"type": "image"}] * images + [{"type": "video"}] * videos + [{"type": "text", "text": text}]
    return {"role": "user", "content": content}


def say(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}
