"""What the benchmark runs: presets, prompts, a decoder with random weights, and blocks of one branch."""

import copy
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, PreTrainedConfig

from ...conversion.source import TEACHER_CONFIGS
from ...families.nvila.checkpoint import is_nvila
from ...families.nvila.configuration import NVILAVisionConfig
from ...families.nvila.vision import tiles_of
from ...modeling.compat import CACHE
from ...modeling.configuration_linmu import LinMUConfig, LinMUTextConfig
from ...modeling.decoder import LinMUTextModel
from ...modeling.generation import chunk_sizes
from ...modeling.layout.token_layout import TextStep
from ...modeling.mixers.m_mate import MMate
from ...modeling.modeling_linmu import VISION_SIDES
from ..loading import first_line


PRESETS = {
    "qwen2.5-vl-7b": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "nvila-8b": {"vocab_size": 151648, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "nvila-8b-video": {"vocab_size": 151648, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
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

# Of the presets that have NVILA's vision side; the others have Qwen2.5-VL's.
NVILA_VISION = {
    "nvila-8b": {"image_aspect_ratio": "dynamic_s2", "s2_scales": [448, 896, 1344]},
    "nvila-8b-video": {"image_aspect_ratio": "resize", "video_encoder": "tsp", "pool_sizes": [[8, 1, 1]]},
}
SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
}
# Media and grid of a prompt that the command does not name. NVILA reads an image of 4:3 in 3 x 4 blocks of 16 x 16.
PROMPTS = {"nvila-8b": ("image", "48x64")}


ATTENTIONS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def text_config(model: str) -> LinMUTextConfig:
    """
    The decoder's configuration for the name of a preset, a folder, a `config.json` or a Hub id.

    Raises:
        `ValueError`: There is no such model, or it is not one that LinMU can be made of.
    """
    if model in PRESETS:
        return LinMUTextConfig(**PRESETS[model])
    if not Path(model).exists() and model.count("/") != 1:
        raise ValueError(f"{model} is neither a file, a folder nor one of the presets {', '.join(PRESETS)}")
    try:
        if is_nvila(PreTrainedConfig.get_config_dict(model)[0]):
            raise ValueError("NVILA as it was published: give a preset, or the folder that linmu-convert made of it")
        config = AutoConfig.from_pretrained(model)
        if not isinstance(config, (LinMUConfig, *TEACHER_CONFIGS.values())):
            raise ValueError(f"a {config.model_type!r} model: give a Qwen2.5-VL, a LinMU model or a preset")
        if not isinstance(config, LinMUConfig):
            config = LinMUConfig.from_teacher(config)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model}: {first_line(error)}") from error
    return config.text_config


def vision_config(model: str):
    """The configuration of the vision side, for all that [`text_config`] takes."""
    if model in NVILA_VISION:
        width = text_config(model).hidden_size
        return NVILAVisionConfig(**NVILA_VISION[model], tower_config=SO400M, out_hidden_size=width)
    if model in PRESETS:
        size = {} if model == "qwen2.5-vl-7b" else {"depth": 2, "hidden_size": 96, "num_heads": 4}
        vision = LinMUConfig().vision_config
        return type(vision)(**vision.to_dict() | size | {"out_hidden_size": text_config(model).hidden_size})
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
    A prompt of text around one video, or of images with text between them.

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
    A function without arguments that encodes the images or the video of a prompt, with random weights and pixels.

    Args:
        model (`str`): As in [`text_config`].
        layout (`torch.LongTensor` of shape `[1, tokens, 4]`): Of the prompt, see [`prompt_layout`].
        media (`str`): `"video"` or `"image"`.
        dtype (`torch.dtype`), device (`str`): Of weights and pixels.

    Raises:
        `ValueError`: The frames or images of the prompt are no whole tiles of NVILA's.
    """
    vision = vision_config(model)
    with torch.device(device):
        tower = VISION_SIDES[vision.model_type].tower_class._from_config(vision, dtype=dtype).eval()
    spans = layout[0][layout[0, :, 0] >= 0]
    grids = torch.stack([spans[spans[:, 0] == span, 1:].amax(0) + 1 for span in spans[:, 0].unique()])
    if vision.model_type == "nvila_vision":
        g, edge = vision.tile_tokens, vision.tower_config.image_size
        if (grids[:, 1:] % g).any() or (media == "video" and (grids[:, 1:] != g).any()):
            wanted = f"{g}x{g}" if media == "video" else f"a multiple of {g}x{g}"
            raise ValueError(f"{model} has a grid of {wanted} tokens, not {grids[0, 1]}x{grids[0, 2]}")
        if media == "video":
            tiles = int(grids[:, 0].sum()) * vision.pool_sizes[0][0]
        else:
            tiles = sum(tiles_of(vision, height // g, width // g) for _, height, width in grids.tolist())
        pixels = torch.randn(tiles, 3, edge, edge, device=device, dtype=dtype)
        return partial(tower, pixels, grids.to(device), media)
    grids[:, 1:] *= vision.spatial_merge_size
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    patches = torch.randn(int(grids.prod(1).sum()), pixels, device=device, dtype=dtype)
    return partial(tower, patches, grid_thw=grids.to(device))


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
        """Logits of the last token `[b, 1, v]` and the cache, for `embeds` `[b, t, d]`."""
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
        """The next ids `[b, 1]`, greedily."""
        output = self.text(input_ids=ids, past_key_values=cache, use_cache=True)
        return self.head(output.last_hidden_state).argmax(-1)


class FlexMAOnly(nn.Module):
    """An M-MATE block without Local-Swin (Table 4); for measuring, no model is trained like this."""

    def __init__(self, block: MMate):
        super().__init__()
        self.block = block

    def forward(self, hidden_states, rope, layout, cache_layer=None):
        layout = layout if isinstance(layout, TextStep) else replace(layout, vision=None)
        return self.block(hidden_states, rope, layout, cache_layer)


class LocalSwinOnly(FlexMAOnly):
    """An M-MATE block without Flex-MA (Table 4): text tokens are not mixed at all."""

    def forward(self, hidden_states, rope, layout, cache_layer=None):
        y, swin = torch.zeros_like(hidden_states), self.block.local_swin
        if not isinstance(layout, TextStep) and layout.vision is not None:
            mixed = swin(hidden_states.flatten(0, 1), tuple(t.flatten(0, 1) for t in rope), layout)
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
    """PyTorch's attention by the named one of its backends, or not at all."""
    return sdpa_kernel(ATTENTIONS[name])
