"""Scenes to model inputs, equal to the processor's output, without the chat template's cost."""

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import Qwen2_5_VLProcessor

from ..families.nvila.processing import NVILAProcessor
from .data import FRAMES_PER_MOMENT, Scene
from .processor import FPS, TEMPORAL_PATCH_SIZE


IGNORED = -100


Sample = tuple[Scene, Sequence[tuple[str, str | None]]]


def encode(processor: Qwen2_5_VLProcessor | NVILAProcessor, samples: Sequence[Sample]) -> dict:
    """Encodes scenes of ONE kind with their turns; `labels` cover every answer and its `<|im_end|>`.

    Sequences are right padded.
    """
    encoded = (_encode_nvila if isinstance(processor, NVILAProcessor) else _encode_qwen)(processor, samples)
    return {**encoded, "labels": answer_labels(processor.tokenizer, encoded["input_ids"])}


def render(scene: Scene, turns: Sequence[tuple[str, str | None]]) -> str:
    """Returns the chat template's text with the vision token repeated; an answer of `None` leaves the prompt open."""
    vision_tokens = scene.digits.size
    pad = "<|video_pad|>" if scene.kind == "clip" else "<|image_pad|>"
    text = f"<|vision_start|>{pad * vision_tokens}<|vision_end|>"
    for i, (question, answer) in enumerate(turns):
        text = f"<|im_start|>user\n{text}{question}" if i == 0 else f"{text}<|im_start|>user\n{question}"
        text += "<|im_end|><|im_start|>assistant\n"
        text += "" if answer is None else f"{answer}<|im_end|>"
    return text


def _encode_qwen(processor: Qwen2_5_VLProcessor, samples: Sequence[Sample]) -> dict:
    scenes = [scene for scene, _ in samples]
    texts = [render(scene, turns) for scene, turns in samples]
    encoded = processor.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    input_ids, attention_mask = encoded["input_ids"], encoded["attention_mask"]

    frames = [torch.from_numpy(scene.frames).permute(0, 3, 1, 2) for scene in scenes]
    if scenes[0].kind == "clip":
        vision = processor.video_processor(frames, return_tensors="pt", do_sample_frames=False)
        vision = {k: vision[k] for k in ("pixel_values_videos", "video_grid_thw")}
        vision["second_per_grid_ts"] = torch.full((len(frames),), TEMPORAL_PATCH_SIZE / FPS)
    else:
        vision = processor.image_processor([frame[0] for frame in frames], return_tensors="pt")
        vision = {k: vision[k] for k in ("pixel_values", "image_grid_thw")}
    token_type = (input_ids == processor.image_token_id).int() + 2 * (input_ids == processor.video_token_id).int()
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "mm_token_type_ids": token_type,
        **vision,
    }


def _encode_nvila(processor: NVILAProcessor, samples: Sequence[Sample]) -> dict:
    """The processor itself is quick; only the chat template is not."""
    texts = [_render_nvila(scene, turns) for scene, turns in samples]
    if samples[0][0].kind == "clip":
        media = {"videos": [scene.frames for scene, _ in samples], "do_sample_frames": False}
    else:
        media = {"images": [Image.fromarray(scene.frames[0]) for scene, _ in samples]}
    return dict(processor(text=texts, padding=True, padding_side="right", return_tensors="pt", **media))


def _render_nvila(scene: Scene, turns: Sequence[tuple[str, str | None]]) -> str:
    text = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
    placeholder = "<vila/video>" if scene.kind == "clip" else "<image>"
    for i, (question, answer) in enumerate(turns):
        text += f"<|im_start|>user\n{'' if i else placeholder}{question}<|im_end|>\n<|im_start|>assistant\n"
        text += "" if answer is None else f"{answer}<|im_end|>\n"
    return text


def answer_labels(tokenizer, input_ids: torch.Tensor) -> torch.Tensor:
    """Returns labels `[b, t]` on the assistant's turns, `<|im_end|>` included; everything else is ignored."""
    assistant, end = tokenizer.convert_tokens_to_ids(["assistant", "<|im_end|>"])
    b, t = input_ids.shape
    index = torch.arange(t).expand(b, t)
    # the word "assistant" and the line break after it open a turn; the next <|im_end|> closes it
    opened = torch.where(input_ids == assistant, index, -1).cummax(1).values
    closed = torch.where(input_ids == end, index, -1).cummax(1).values
    last_closed = torch.cat([torch.full((b, 1), -1), closed[:, :-1]], 1)  # <|im_end|> before this position
    answering = (opened > last_closed) & (index > opened + 1)
    return torch.where(answering, input_ids, IGNORED)


assert FRAMES_PER_MOMENT == TEMPORAL_PATCH_SIZE
