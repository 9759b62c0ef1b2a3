"""Scenes to model inputs, equal to the processor's output."""

from collections.abc import Sequence

import torch
from transformers import Qwen2_5_VLProcessor

from ..encoding import answer_labels
from ..processor import FPS, TEMPORAL_PATCH_SIZE
from .data import Turns
from .drawing import Scene
from .processor import TOKEN


def token_grid(scene: Scene) -> tuple[int, int, int]:
    """Returns (images or moments, rows, columns) of a scene's vision tokens."""
    if scene.video is not None:
        n, height, width = scene.video.shape[0] // TEMPORAL_PATCH_SIZE, *scene.video.shape[1:3]
    else:
        n, (height, width) = len(scene.images), scene.images[0].shape[:2]
    return n, height // TOKEN, width // TOKEN


def render(scene: Scene, turns: Turns) -> str:
    """Returns the chat template's text with the vision tokens repeated."""
    n, rows, columns = token_grid(scene)
    video = scene.video is not None
    pads = ("<|video_pad|>" if video else "<|image_pad|>") * (rows * columns * (n if video else 1))
    text = f"<|vision_start|>{pads}<|vision_end|>" * (1 if video else n)
    for i, (question, answer) in enumerate(turns):
        text = f"<|im_start|>user\n{text}{question}" if i == 0 else f"{text}<|im_start|>user\n{question}"
        text += f"<|im_end|><|im_start|>assistant\n{answer}<|im_end|>"
    return text


def encode_vision(processor: Qwen2_5_VLProcessor, scenes: Sequence[Scene]) -> dict:
    """Encodes the pictures of scenes of one kind and size."""
    if scenes[0].video is not None:
        videos = [torch.from_numpy(scene.video).permute(0, 3, 1, 2) for scene in scenes]
        vision = processor.video_processor(videos, return_tensors="pt", do_sample_frames=False)
        found = {name: vision[name] for name in ("pixel_values_videos", "video_grid_thw")}
        return {**found, "second_per_grid_ts": torch.full((len(videos),), TEMPORAL_PATCH_SIZE / FPS)}
    images = [torch.from_numpy(image.copy()).permute(2, 0, 1) for scene in scenes for image in scene.images]
    vision = processor.image_processor(images, return_tensors="pt")
    return {name: vision[name] for name in ("pixel_values", "image_grid_thw")}


def encode(processor: Qwen2_5_VLProcessor, samples: Sequence[tuple[Scene, Turns]]) -> dict:
    """Encodes scenes of one kind and size with their conversations, right padded; `labels` cover every answer."""
    texts = [render(scene, turns) for scene, turns in samples]
    encoded = processor.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    input_ids = encoded["input_ids"]
    token_type = (input_ids == processor.image_token_id).int() + 2 * (input_ids == processor.video_token_id).int()
    return {
        "input_ids": input_ids,
        "attention_mask": encoded["attention_mask"],
        "mm_token_type_ids": token_type,
        **encode_vision(processor, [scene for scene, _ in samples]),
        "labels": answer_labels(processor.tokenizer, input_ids),
    }
