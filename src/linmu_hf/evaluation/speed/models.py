"""What the benchmark runs: presets, prompts, a decoder with random weights, and blocks of one branch."""

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, PreTrainedConfig

from ...families import FAMILIES, QWEN2_5_VL, find_family
from ...families.family import Preset
from ...modeling.compat import CACHE
from ...modeling.configuration_linmu import PRESETS as MIXER_PRESETS
from ...modeling.configuration_linmu import LinMUConfig, LinMUTextConfig
from ...modeling.decoder import LinMUTextModel
from ...modeling.generation import chunk_sizes
from ...modeling.layout.token_layout import TextStep
from ...modeling.mixers.m_mate import MMate
from ...modeling.vision_side import VISION_SIDES
from ..loading import first_line


TINY_VISION = {"depth": 2, "hidden_size": 96, "num_heads": 4}
# Presets that no family has, with Qwen2.5-VL's vision side.
_SMALL = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        "state_size": 64,
    },
    # what `make bench-cpu` measures: an MLP of three times the hidden size, and the state size that suits the head
    # dimension of 64 as the default of 256 suits one of 128
    "tiny-wide": {
        "vocab_size": 512,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        "state_size": 128,
    },
}

# The model type of the vision side of every preset, and its sizes.
PRESETS = {
    name: (family.vision_type, preset) for family in FAMILIES.values() for name, preset in family.presets.items()
} | {name: (QWEN2_5_VL.vision_type, Preset(text, TINY_VISION)) for name, text in _SMALL.items()}


ATTENTIONS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def text_config(model: str) -> LinMUTextConfig:
    """
    Returns the decoder's configuration for the name of a preset, a folder, a `config.json` or a Hub id.

    Raises:
        `ValueError`: There is no such model, or it is not one that LinMU can be made of.
    """
    if model in PRESETS:
        return LinMUTextConfig(**MIXER_PRESETS["default"] | PRESETS[model][1].text)
    if not Path(model).exists() and model.count("/") != 1:
        raise ValueError(f"{model} is neither a file, a folder nor one of the presets {', '.join(PRESETS)}")
    try:
        family = find_family(raw_config := PreTrainedConfig.get_config_dict(model)[0])
        if family is not None and not family.in_transformers:
            remedy = "give a preset, or the folder that linmu-convert made of it"
            raise ValueError(f"{family.name} as it was published: {remedy}")
        if family is None and raw_config.get("model_type") != LinMUConfig.model_type:
            raise ValueError(f"a {raw_config.get('model_type')!r} model: give a teacher, a LinMU model or a preset")
        config: Any = AutoConfig.from_pretrained(model)
        if not isinstance(config, LinMUConfig):
            config = LinMUConfig.from_teacher(config)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model}: {first_line(error)}") from error
    return config.text_config


def vision_config(model: str):
    """Returns the configuration of the vision side; takes what [`text_config`] takes."""
    if model in PRESETS:
        kind, preset = PRESETS[model]
        return AutoConfig.for_model(kind, **preset.vision, out_hidden_size=text_config(model).hidden_size)
    return AutoConfig.from_pretrained(model).vision_config


def prompt_layout(
    tokens: int,
    share: float,
    grid: tuple[int, int],
    media: str = "video",
    span_tokens: int | None = None,
    separators: bool = False,
):
    """
    Builds a prompt of text around one video, or of images with text between them.

    Args:
        tokens (`int`): Length of the prompt.
        share (`float`): Share of vision tokens, at most: only whole frames or images are taken, and at least one, of
            fewer tokens where the prompt is too short for one of `grid`.
        grid (`tuple[int, int]`): Merged tokens of a frame or image, height and width.
        media (`str`): `"video"` or `"image"`.
        span_tokens (`int`, *optional*): Longest span of a video, as `max_span_frames` of a model sets it.
        separators (`bool`, *optional*, defaults to `False`): A text token after every frame and image, as in NVILA.

    Returns:
        `torch.LongTensor` of shape `[1, tokens, 4]`, the `vision_layout`, or `None` for text alone.
    """
    budget, (height, width) = int(tokens * share), grid
    if budget < height * width:
        height = width = math.isqrt(budget)
    if not height or (separators and tokens <= height * width):
        return None
    size = height * width
    frames = budget // size
    if separators:
        frames = min(frames, tokens // (size + 1))
    elif media == "image":
        frames = min(frames, (tokens + 1) // (size + 1))  # a text token between two
    layout = torch.full((tokens, 4), -1)
    cells = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    text = tokens - frames * size
    per_span = max((span_tokens or tokens) // (size + separators), 1)
    for frame in range(frames):
        if media == "image":
            before, span, at = text * (frame + 1) // (frames + 1), frame, 0
        else:
            before, span, at = (
                (text - frames * separators) // 2 + frame * separators,
                frame // per_span,
                frame % per_span,
            )
        start = before + frame * size
        layout[start : start + size, 0] = span
        layout[start : start + size, 1] = at
        layout[start : start + size, 2:] = cells
    return layout[None]


def vision_encoder(model: str, layout, media: str, dtype: torch.dtype, device: str):
    """
    Returns a function without arguments that encodes the media of a prompt, with random weights and pixels.

    Args:
        model (`str`): As in [`text_config`].
        layout (`torch.LongTensor` of shape `[1, tokens, 4]`): Of the prompt, see [`prompt_layout`].
        media (`str`): `"video"` or `"image"`.
        dtype (`torch.dtype`), device (`str`): Of weights and pixels.

    Raises:
        `ValueError`: The frames or images of the prompt are not grids of the model.
    """
    vision = vision_config(model)
    with torch.device(device):
        tower = VISION_SIDES[vision.model_type].tower_class._from_config(vision, dtype=dtype).eval()
    side = VISION_SIDES[vision.model_type](LinMUConfig(vision_config=vision), tower)
    spans = layout[0][layout[0, :, 0] >= 0]
    sizes = torch.stack([spans[spans[:, 0] == span, 1:].amax(0) + 1 for span in spans[:, 0].unique()])
    grids = side.grids(sizes).to(device)
    side.runs(media, grids)  # refuses what is not whole tiles
    pixels = torch.randn(side.pixels(media, grids)[0], device=device, dtype=dtype)
    return partial(side.features, media, pixels, grids)


class BenchmarkDecoder(nn.Module):
    """
    Text model and output head with random weights, shaped by `config`.

    Args:
        config (`LinMUTextConfig`): Its shape.
        dtype (`torch.dtype`), device (`str`): Of the weights.
        shared (`BenchmarkDecoder`, *optional*): A decoder whose weights outside the mixers are used again.
    """

    def __init__(self, config, dtype=torch.float32, device="cpu", shared: "BenchmarkDecoder | None" = None):
        super().__init__()
        with torch.device("meta" if shared else device):
            self.text = LinMUTextModel._from_config(config, dtype=dtype)
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        if shared is not None:
            self.head, self.text.embed_tokens, self.text.norm = shared.head, shared.text.embed_tokens, shared.text.norm
            self.text.rotary_emb = shared.text.rotary_emb
            for layer, other in zip(self.text.layers, shared.text.layers, strict=True):
                layer.mlp, layer.input_layernorm = other.mlp, other.input_layernorm
                layer.post_attention_layernorm = other.post_attention_layernorm
                layer.mixer.to_empty(device=device)
                for parameter in layer.mixer.parameters():
                    nn.init.normal_(parameter, std=config.initializer_range)
        self.eval().requires_grad_(False)

    def prefill(self, embeds, layout, chunk_size: int | None = None):
        """Returns the logits of the last token `[b, 1, v]` and the cache, for `embeds` `[b, t, d]`."""
        t, start, cache = embeds.shape[1], 0, None
        for size in [t] if chunk_size is None else chunk_sizes(layout, t, chunk_size):
            part = None if layout is None else layout[:, start : start + size]
            part = part if part is not None and bool((part[..., 0] >= 0).any()) else None
            output = self.text(
                inputs_embeds=embeds[:, start : start + size],
                vision_layout=part,
                past_key_values=cache,
                use_cache=True,
            )
            cache, start = output[CACHE], start + size
        return self.head(output.last_hidden_state[:, -1:]), cache

    def step(self, ids, cache):
        """Returns the next ids `[b, 1]`, greedily."""
        output = self.text(input_ids=ids, past_key_values=cache, use_cache=True)
        return self.head(output.last_hidden_state).argmax(-1)


class FlexMAOnly(nn.Module):
    """An M-MATE block without Local-Swin (Table 4); for measuring, no model is trained like this."""

    def __init__(self, block: MMate):
        super().__init__()
        self.block = block

    def forward(self, hidden_states, rope, layout, cache_layer=None):
        layout = TextStep(layout.mask) if isinstance(layout, TextStep) else replace(layout, vision=None, near=None)
        return self.block(hidden_states, rope, layout, cache_layer)


class LocalSwinOnly(FlexMAOnly):
    """An M-MATE block without Flex-MA (Table 4): text tokens are mixed by `text_window` or not at all."""

    def forward(self, hidden_states, rope, layout, cache_layer=None):
        y, swin = torch.zeros_like(hidden_states), self.block.local_swin
        tokens, rope = hidden_states.flatten(0, 1), tuple(t.flatten(0, 1) for t in rope)
        if layout.near is not None:
            step = isinstance(layout, TextStep)
            mixed = (
                swin.step(tokens, rope, cache_layer, layout.near) if step else swin(tokens, rope, layout, cache_layer)
            )
            y = swin.o_proj(mixed.flatten(1)).view_as(y)
        elif not isinstance(layout, TextStep) and layout.vision is not None:
            mixed = swin(tokens, rope, layout).flatten(1)
            y.view(-1, y.shape[-1]).index_copy_(0, layout.vision, swin.o_proj(mixed))
        return self.block.output_norm(y)


def ablated(decoder: BenchmarkDecoder, block: type[FlexMAOnly]) -> BenchmarkDecoder:
    """Returns the decoder with one branch in each M-MATE block; it shares the weights."""
    weights = {id(tensor): tensor for tensor in (*decoder.parameters(), *decoder.buffers())}
    other = copy.deepcopy(decoder, weights)
    for layer in other.text.layers:
        if isinstance(layer.mixer, MMate):
            layer.mixer = block(layer.mixer)
    return other


def with_attention(name: str):
    """Returns a context in which PyTorch's attention runs by the named one of its backends, or not at all."""
    return sdpa_kernel(ATTENTIONS[name])
