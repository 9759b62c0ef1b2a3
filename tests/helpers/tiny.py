"""Tiny random models in float64, and batches as the Qwen2.5-VL processor would return them."""

from typing import ClassVar

import torch
from torch import nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

from linmu_hf import LinMUConfig, LinMUForConditionalGeneration, LinMUTextConfig
from linmu_hf.modeling.compat import checkpoint_activations


IMAGE, VIDEO, START, END, PAD = 60, 61, 62, 63, 0
PATCH_PIXELS = 3 * 2 * 2 * 2  # channels, frames, height, width of a patch
WINDOWS = {"window_size": [2, 2, 3], "image_window_size": [1, 2, 3]}
NEAR_TEXT = {"text_window": 5, "sink_tokens": 2}


def text_config(**options) -> LinMUTextConfig:
    return LinMUTextConfig(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "state_size": 24,
            "timescale_range": [2.0, 200.0],
            "pad_token_id": PAD,
            "eos_token_id": 63,
            **WINDOWS,
            **NEAR_TEXT,
            **options,
        }
    )


def vision_config(**options) -> Qwen2_5_VLVisionConfig:
    return Qwen2_5_VLVisionConfig(
        **{
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 2,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 8,
            "fullatt_block_indexes": [0],
            "out_hidden_size": 32,
            "tokens_per_second": 2,
            **options,
        }
    )


def config(tie_word_embeddings=False, **options) -> LinMUConfig:
    return LinMUConfig(
        text_config=text_config(**options),
        vision_config=vision_config(out_hidden_size=options.get("hidden_size", 32)),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tie_word_embeddings,
    )


def randomise(module: nn.Module, seed=0) -> nn.Module:
    """Moves every parameter away from its special start, so that no path through the model is silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 1
            small = name.endswith(("A_log", "dt_bias", "norm.weight")) or parameter.ndim == 1
            scale = 0.3 if small or "conv_weight" in name else 1.2 / fan_in**0.5
            keep = 1.0 if small or "conv_weight" in name else 0.0
            parameter.mul_(keep).add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)
    return module


def exact(model: nn.Module) -> nn.Module:
    """In float64, and without the detour that Qwen's norm takes through float32."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Qwen2_5_VLRMSNorm):
                norm = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model.double().eval()


def plain(seed=0, tie_word_embeddings=False, **options) -> LinMUForConditionalGeneration:
    """A model as users have it, in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomise(LinMUForConditionalGeneration(config(tie_word_embeddings, **options)), seed).eval()


def model(*args, **options) -> LinMUForConditionalGeneration:
    """The same in float64."""
    return exact(plain(*args, **options))


def checkpoint(model, **kwargs):
    """Turns activation checkpointing on."""
    checkpoint_activations(model, True, kwargs)


class Sample:
    """
    One sequence of parts: a number of text tokens, `("image", h, w)` or `("video", t, h, w)` in merged tokens. Equal
    first parts give equal first tokens and pixels.
    """

    placeholders: ClassVar[dict[str, int]] = {"image": IMAGE, "video": VIDEO}
    another_image = ("image", 3, 2)

    def __init__(self, *parts, seed=0):
        text = torch.Generator().manual_seed(seed)
        pixels = torch.Generator().manual_seed(seed + 1000)
        self.parts, self.ids, self.cuts = parts, [], []
        self.grids, self.pixels, self.sizes = ({"image": [], "video": []} for _ in range(3))
        for part in parts:
            if isinstance(part, int):
                self.ids += torch.randint(1, 60, (part,), generator=text).tolist()
            else:
                ids, grids, shape = self.medium(*part)
                self.ids += ids
                self.grids[part[0]].append(grids)
                self.pixels[part[0]].append(torch.randn(shape, generator=pixels))
                self.sizes[part[0]].append(ids.count(self.placeholders[part[0]]))
            self.cuts.append(len(self.ids))  # where a chunk may end

    def medium(self, kind, *size):
        """Ids of an image or video, its rows of the grids and the shape of its pixels."""
        frames, height, width = (1, *size)[-3:]
        tokens = frames * height * width
        ids = [START] + [self.placeholders[kind]] * tokens + [END]
        return ids, [[frames, 2 * height, 2 * width]], (4 * tokens, PATCH_PIXELS)

    def __len__(self):
        return len(self.ids)


def extended(sample: Sample, ids) -> Sample:
    """The sample with more text after it."""
    longer = type(sample)(*sample.parts)
    longer.ids = [*sample.ids, *ids]
    return longer


def batch(*samples: Sample, padding="right", dtype=torch.float64, length=None) -> dict:
    """What the processor returns for the samples, padded on the given side."""
    length = length or max(map(len, samples))
    ids, mask = torch.full((len(samples), length), PAD), torch.zeros(len(samples), length, dtype=torch.long)
    for row, sample in enumerate(samples):
        columns = slice(0, len(sample)) if padding == "right" else slice(length - len(sample), None)
        ids[row, columns], mask[row, columns] = torch.tensor(sample.ids), 1
    tokens = samples[0].placeholders
    types = (ids == tokens["image"]).int() + 2 * (ids == tokens["video"]).int()
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}
    for kind, pixel_name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        grids = [row for sample in samples for grids in sample.grids[kind] for row in grids]
        if grids:
            inputs[f"{kind}_grid_thw"] = torch.tensor(grids)
            inputs[pixel_name] = torch.cat([p for sample in samples for p in sample.pixels[kind]]).to(dtype)
    if "video_grid_thw" in inputs:
        inputs["second_per_grid_ts"] = [1.0] * len(inputs["video_grid_thw"])
    return inputs


def cut(sample: Sample, start: int, end: int) -> dict:
    """The inputs of tokens `start` to `end` of a sample: the media that are in them, the mask of all until `end`."""
    inputs = batch(sample)
    types = inputs["mm_token_type_ids"][0]
    sliced = {
        "input_ids": inputs["input_ids"][:, start:end],
        "mm_token_type_ids": inputs["mm_token_type_ids"][:, start:end],
        "attention_mask": inputs["attention_mask"][:, :end],
    }
    for kind, code, pixel_name in (("image", 1, "pixel_values"), ("video", 2, "pixel_values_videos")):
        counts = [int((types[:at] == code).sum()) for at in (start, end)]
        ends = torch.tensor(sample.sizes[kind]).cumsum(0).tolist()
        chosen = [i for i, last in enumerate(ends) if counts[0] < last <= counts[1]]
        if chosen:
            sliced[f"{kind}_grid_thw"] = torch.tensor([row for i in chosen for row in sample.grids[kind][i]])
            sliced[pixel_name] = torch.cat([sample.pixels[kind][i] for i in chosen]).double()
            if kind == "video":
                sliced["second_per_grid_ts"] = [1.0] * len(sliced["video_grid_thw"])
    return sliced
