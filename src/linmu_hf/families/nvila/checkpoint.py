"""NVILA's checkpoints, whatever their layout: one configuration, one set of tensor names, one processor.

    layout   config.json                                   tensors
    parts    llm_cfg, vision_tower_cfg, mm_projector_cfg   in llm/, vision_tower/, mm_projector/, as each one's own
    flat     text_config, vision_config                    llm.*, vision_tower.*, mm_projector.*

Tensors are named as in the flat layout: the part, a dot, the name within the part. Every part has a config.json of its
own, which is the one to read: copies inside the top config.json are not always up to date.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2TokenizerFast, SiglipVisionConfig

from ...safetensors_io import StoredTensor, read_checkpoint, read_config
from ..family import TOKENIZER_FILES, Checkpoint
from .configuration import IMAGE_MODES, PROJECTORS, NVILAConfig, NVILAVisionConfig
from .processing import IMAGE_TOKEN, SENTINEL_TOKEN, VIDEO_TOKEN, build_processor


PARTS = ("llm", "vision_tower", "mm_projector")
# What to download of a model in parts; one in the flat layout needs what every other family does.
PARTS_DOWNLOADS = (
    "config.json",
    *(f"{part}/{name}" for part in PARTS for name in ("config.json", "*.safetensors", "model.safetensors.index.json")),
    *(f"llm/{name}" for name in TOKENIZER_FILES),
    *TOKENIZER_FILES,
    "vision_tower/preprocessor_config.json",
)

VIDEO_ENCODERS = {"BasicVideoEncoder": "basic", "TSPVideoEncoder": "tsp"}
PROJECTOR_LAYERS = {2: [1, 2, 4], 3: [1, 2, 4, 5, 7]}  # side of the downsampling -> layers with parameters
# Settings of a top config that have one value here, and what another one would mean.
FIXED = {
    "mm_vision_select_feature": ("cls_patch", "other patches than all"),
    "s2": (False, "S2 without dynamic tiles"),
    "ps3": (False, "the PS3 vision tower"),
    "mm_use_im_start_end": (False, "tokens around every image"),
}
TOWER_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
    "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout",
)  # fmt: skip


def is_nvila(raw_config: Mapping[str, Any]) -> bool:
    """Returns whether a `config.json` is one of VILA's family, supported or not."""
    model_type = str(raw_config.get("model_type"))
    return "vila" in model_type or model_type == "llava_llama" or in_parts(raw_config)


def in_parts(raw_config: Mapping[str, Any]) -> bool:
    """Returns whether the tensors are in a folder for each part."""
    return {f"{part}_cfg" for part in PARTS} <= set(raw_config)


def open_nvila(folder: Path, top: dict[str, Any]) -> Checkpoint:
    """
    Reads everything of a checkpoint but the values of its tensors.

    Args:
        folder (`Path`): The checkpoint.
        top (`dict`): Its `config.json`, which has passed [`check_top`].

    Raises:
        `FileNotFoundError`: A part is missing.
        `ValueError`: Something is not supported, or does not fit together.
    """
    if in_parts(top):
        for part in PARTS:
            if not (folder / part).is_dir():
                raise FileNotFoundError(f"{folder} lacks its sub-folder {part}: download or copy it too")
        llm, tower, projector = (read_config(folder / part / "config.json") for part in PARTS)
        tensors = {f"{part}.{name}": t for part in PARTS for name, t in read_checkpoint(folder / part).items()}
        tokenizer_folders, pixels = [folder / "llm", folder], folder / "vision_tower" / "preprocessor_config.json"
    else:
        llm, tower, projector = top["text_config"], top["vision_config"], {}
        tensors = read_checkpoint(folder)
        tokenizer_folders, pixels = [folder], folder / "preprocessor_config.json"
    try:
        _check_parts(llm, tower)
        text_config = Qwen2Config.from_dict(dict(llm))
        vision_config = _vision_config(top, tower, projector, tensors, text_config.hidden_size)
    except (TypeError, StrictDataclassError) as error:
        raise ValueError(f"{folder}: its configuration is broken ({error!r}): download or copy it again") from error
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error

    frames = top.get("num_video_frames") or 8
    tokenizer = _read_tokenizer(tokenizer_folders)
    statistics = read_config(pixels) if pixels.is_file() else {}
    processor = build_processor(
        vision_config,
        tokenizer,
        num_video_frames=frames,
        image_mean=statistics.get("image_mean"),
        image_std=statistics.get("image_std"),
    )
    config = NVILAConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        tie_word_embeddings=text_config.tie_word_embeddings,
        num_video_frames=frames,
    )
    for name in ("image_token_id", "video_token_id"):
        if top.get(name, getattr(config, name)) != getattr(config, name):
            raise ValueError(
                f"{folder}: {name} is {top[name]} in config.json and {getattr(config, name)} in the tokenizer: "
                "they do not belong together"
            )
    return Checkpoint(config, tensors, processor, _generation_config(text_config, processor.tokenizer))


def check_top(top: dict) -> None:
    """Raises a `ValueError` for what the top `config.json` alone tells to be unsupported."""
    flat = isinstance(top.get("text_config"), dict) and isinstance(top.get("vision_config"), dict)
    if not flat and not in_parts(top):
        raise ValueError(
            f"its config.json (model_type={top.get('model_type')!r}) names neither the parts of an NVILA model "
            "(llm_cfg, vision_tower_cfg, mm_projector_cfg) nor text_config and vision_config: give an NVILA checkpoint"
        )
    for name, (value, meaning) in FIXED.items():
        if top.get(name, value) not in (value, None):
            raise ValueError(
                f"{name}={top[name]!r} ({meaning}) is not supported: give a checkpoint with {name}={value!r}"
            )
    if (top.get("image_aspect_ratio") or IMAGE_MODES[0]) not in IMAGE_MODES:
        raise ValueError(
            f"image_aspect_ratio={top['image_aspect_ratio']!r} is not supported: give a checkpoint with one of "
            f"{list(IMAGE_MODES)}"
        )
    target, options = _encoder(top.get("image_encoder") or "BasicImageEncoder")
    if target != "BasicImageEncoder" or options:
        raise ValueError(f"image_encoder={top['image_encoder']!r} is not supported: only a plain BasicImageEncoder is")
    _video_encoder(top.get("video_encoder") or "BasicVideoEncoder")


def _check_parts(llm: dict, tower: dict) -> None:
    for config in (llm, tower):
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method")
            raise ValueError(f"it is quantized ({method}): give the checkpoint it was quantized from")
    if llm.get("model_type") != "qwen2":
        raise ValueError(f"its language model is {llm.get('model_type')!r}: only 'qwen2' is supported, as in NVILA")
    if tower.get("model_type") != "siglip_vision_model":
        raise ValueError(
            f"its vision tower is {tower.get('model_type')!r}: only SigLIP ('siglip_vision_model') is supported; "
            "give an NVILA checkpoint with that tower"
        )


def _vision_config(
    top: dict, tower: dict, projector: dict, tensors: dict[str, StoredTensor], out_hidden_size: int
) -> NVILAVisionConfig:
    tower_config = SiglipVisionConfig(
        **{name: tower[name] for name in TOWER_FIELDS if name in tower}, vision_use_head=False
    )
    size = tower_config.image_size
    stated = projector.get("mm_projector_type") or top.get("mm_projector_type")
    projector_type, channels = _read_projector(stated, tensors)
    n_scales, rest = divmod(channels, tower_config.hidden_size)
    if rest or not n_scales:
        raise ValueError(
            f"its projector takes {channels} channels, no multiple of the tower's hidden_size="
            f"{tower_config.hidden_size}: config.json and weights do not belong together"
        )
    # The flat layout leaves out what its model code fixes.
    mode = top.get("image_aspect_ratio") or ("dynamic_s2" if n_scales > 1 else "dynamic")
    scales = (top.get("s2_scales") or [size * (i + 1) for i in range(n_scales)]) if mode == "dynamic_s2" else None
    video_encoder, pool_sizes = _video_encoder(top.get("video_encoder") or "BasicVideoEncoder")
    config = NVILAVisionConfig(
        tower_config=tower_config,
        projector_type=projector_type,
        feature_layer=top.get("mm_vision_select_layer", -2),
        image_aspect_ratio=mode,
        s2_scales=scales,
        min_tiles=top.get("min_tiles", 1),
        max_tiles=top.get("max_tiles", 12),
        video_encoder=video_encoder,
        pool_sizes=pool_sizes,
        out_hidden_size=out_hidden_size,
    )
    for name, found in (("the projector", channels), ("mm_hidden_size", top.get("mm_hidden_size", channels))):
        if found != config.mm_hidden_size:
            raise ValueError(
                f"{name} has {found} channels, but {config.n_scales} scale(s) of hidden_size="
                f"{tower_config.hidden_size} make {config.mm_hidden_size} (image_aspect_ratio={mode!r}, "
                f"s2_scales={scales}): config.json and weights do not belong together"
            )
    if mode == "dynamic_s2":
        for name, allowed in {
            "s2_max_split_size": (size,),
            "s2_resize_output_to_scale_idx": (-1, n_scales - 1),
        }.items():
            if top.get(name, allowed[0]) not in allowed:
                raise ValueError(f"{name}={top[name]!r} is not supported: give a checkpoint with {allowed[0]}")
    return config


def _read_projector(stated: str | None, tensors: dict[str, StoredTensor]) -> tuple[str, int]:
    """The projector's type, as stated and as its tensors show, and how many channels it takes."""
    if stated is not None and stated not in PROJECTORS:
        raise ValueError(
            f"mm_projector_type={stated!r} is not supported: give a checkpoint with one of {list(PROJECTORS)}"
        )
    prefix = "mm_projector.layers."
    if f"{prefix}1.weight" not in tensors:
        raise ValueError(f"it lacks the tensor '{prefix}1.weight': download or copy it again")
    names = [name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)]
    layers = sorted({int(name) for name in names if name.isdecimal()})
    found = next((side for side, of_side in PROJECTOR_LAYERS.items() if of_side == layers), None)
    side = PROJECTORS[stated] if stated else found
    if side is None or found not in (side, None):
        wanted = PROJECTOR_LAYERS[side] if side else " or ".join(map(str, PROJECTOR_LAYERS.values()))
        raise ValueError(
            f"its projector (mm_projector_type={stated!r}) has parameters in layers {layers} instead of {wanted}: "
            "config.json and weights do not belong together"
        )
    return f"mlp_downsample_{side}x{side}_fix", tensors[f"{prefix}1.weight"].numel // side**2


def _encoder(value: Any) -> tuple[str, dict]:
    """Class name and options of an encoder, given as a dict, as JSON, or as the name of its class."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            pass
    options = dict(value) if isinstance(value, dict) else {"_target_": value}
    name = str(options.pop("_target_", "")).rpartition(".")[2]
    defaults = {"start_tokens": None, "end_tokens": "\n", "sep_tokens": None}
    return name, {key: option for key, option in options.items() if key not in defaults or option != defaults[key]}


def _video_encoder(value: Any) -> tuple[str, list[list[int]]]:
    name, options = _encoder(value)
    pool_sizes = options.pop("pool_sizes", [[1, 1, 1]] if name == "BasicVideoEncoder" else None)
    if name not in VIDEO_ENCODERS or options or pool_sizes is None:
        raise ValueError(
            f"video_encoder={value!r} is not supported: give a checkpoint with BasicVideoEncoder, or with "
            "TSPVideoEncoder and its pool_sizes, and no other options"
        )
    return VIDEO_ENCODERS[name], pool_sizes


def _read_tokenizer(folders: list[Path]) -> Qwen2TokenizerFast:
    for folder in folders:
        if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            return Qwen2TokenizerFast.from_pretrained(folder)
    raise FileNotFoundError(f"{folders[0]} holds no tokenizer (tokenizer.json, or vocab.json and merges.txt): copy it")


def _generation_config(text_config: Qwen2Config, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Greedy, as in NVILA, and never one of the tokens that were added without being trained."""
    stated = text_config.eos_token_id
    stops = [tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])]
    stops = [token for token in dict.fromkeys(stops) if token is not None]
    added = tokenizer.convert_tokens_to_ids([SENTINEL_TOKEN, IMAGE_TOKEN, VIDEO_TOKEN])
    suppressed = [token for token in added if token < text_config.vocab_size]
    return GenerationConfig(
        eos_token_id=stops if len(stops) > 1 else stops[0],
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=suppressed or None,
    )
