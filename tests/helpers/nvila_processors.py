"""A small tokenizer of Qwen2's layout, and NVILA processors at the released and at tiny sizes."""

import json

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast

from linmu_hf import NVILAProcessor, NVILAVisionConfig
from linmu_hf.families.nvila.processing import build_processor


QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TILINGS = {
    "dynamic_s2": {"image_aspect_ratio": "dynamic_s2"},
    "dynamic": {"image_aspect_ratio": "dynamic", "projector_type": "mlp_downsample_3x3_fix"},
    "resize": {"image_aspect_ratio": "resize"},
}


def make_tokenizer() -> Qwen2TokenizerFast:
    """Two line breaks in a row are one token, as in Qwen2's vocabulary."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = ["system user assistant\n\nYou are a helpful assistant what is it?\n\n"] * 9
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    state = json.loads(backend.to_str())["model"]
    return Qwen2TokenizerFast(
        vocab=state["vocab"],
        merges=[tuple(merge) if isinstance(merge, list) else tuple(merge.split()) for merge in state["merges"]],
        pad_token="[PAD]",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[BOS]", "[PAD]"],
    )


def released(tiling: str = "dynamic_s2", **options) -> NVILAProcessor:
    """At the sizes of the released checkpoints: NVILA-8B ("dynamic_s2"), -Lite ("dynamic"), -8B-Video ("resize")."""
    return _processor(tiling, {"image_size": 448, "patch_size": 14}, [448, 896, 1344], **options)


def tiny(tiling: str = "dynamic_s2", **options) -> NVILAProcessor:
    """A tile is 16 pixels and 2x2 tokens."""
    patch_size = 2 if tiling == "dynamic" else 4
    return _processor(tiling, {"image_size": 16, "patch_size": patch_size}, [16, 32, 48], **options)


def _processor(tiling, tower, scales, num_video_frames=8, mean_std=(None, None), **options) -> NVILAProcessor:
    scales = {"s2_scales": scales} if tiling == "dynamic_s2" else {}
    config = NVILAVisionConfig(tower_config=tower, **TILINGS[tiling], **scales, **options)
    mean, std = mean_std
    return build_processor(config, make_tokenizer(), num_video_frames=num_video_frames, image_mean=mean, image_std=std)


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Noise, so that every pixel counts."""
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


def clip(frames: int, width: int = 24, height: int = 20) -> np.ndarray:
    """Frames [t, h, w, 3]; every pixel of a frame is its number."""
    return np.broadcast_to(np.arange(frames, dtype=np.uint8)[:, None, None, None], (frames, height, width, 3)).copy()
