"""Tiny NVILA checkpoints with random weights, in every layout that was released."""

import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from synthetic import train_bpe
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2TokenizerFast, SiglipVisionConfig, SiglipVisionModel


LAYOUTS = ("llava_llama", "vila", "nvila", "nvila, 0626")
MEDIA_TOKENS = ["<vila/sentinel>", "<image>", "<vila/video>"]
SIZE, HIDDEN, DECODER = 32, 16, 64  # of a tile in pixels, of the tower, of the decoder
# What a kind of release has in its top config, and the scales and the side of the downsampling that go with it.
KINDS = {
    "8b": ({"image_aspect_ratio": "dynamic_s2", "dynamic_s2": True, "s2_scales": "32,64,96"}, 3, 2),
    "lite": ({"image_aspect_ratio": "dynamic"}, 1, 3),
    "video": (
        {
            "image_aspect_ratio": "resize",
            "num_video_frames": 4,
            "num_time_tokens": 100,
            "video_encoder": {"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[2, 1, 1]]},
        },
        1,
        2,
    ),
}


def make_tokenizer(media_tokens: bool = False) -> Qwen2TokenizerFast:
    """Without the media tokens as in the parts layout, where they are added when it is loaded."""
    tokenizer = Qwen2TokenizerFast(
        **train_bpe(),
        pad_token="[PAD]",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "[BOS]"],
    )
    if media_tokens:
        tokenizer.add_tokens(MEDIA_TOKENS, special_tokens=True)
    return tokenizer


def make_parts(
    kind: str = "8b", *, tie: bool = False, new_rows: int = 0, seed: int = 0, layers: int = 4
) -> tuple[dict[str, dict], dict[str, dict[str, torch.Tensor]]]:
    """Configuration and tensors of each part; `new_rows`: of the embedding, after those of the tokenizer."""
    _, scales, side = KINDS[kind]
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    llm_config = Qwen2Config(
        vocab_size=len(tokenizer) + new_rows,
        hidden_size=DECODER,
        intermediate_size=2 * DECODER,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
        eos_token_id=tokenizer.eos_token_id,
    )
    tower_config = SiglipVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
        vision_use_head=False,
    )
    wide = HIDDEN * scales * side**2
    sizes = {1: (wide,), 2: (DECODER, wide), 4: (DECODER, DECODER)}
    if side == 3:
        middle = HIDDEN * 3
        sizes = {1: (wide,), 2: (middle, wide), 4: (middle,), 5: (DECODER, middle), 7: (DECODER, DECODER)}
    llm = Qwen2ForCausalLM(llm_config).state_dict()
    if tie:
        llm.pop("lm_head.weight")
    tower = {name.removeprefix("vision_model."): t for name, t in SiglipVisionModel(tower_config).state_dict().items()}
    tensors = {
        "llm": llm,
        "vision_tower": {f"vision_model.{name}": tensor for name, tensor in tower.items()},
        "mm_projector": {f"layers.{i}.weight": torch.empty(size) for i, size in sizes.items()}
        | {f"layers.{i}.bias": torch.empty(size[0]) for i, size in sizes.items()},
    }
    for part in tensors.values():
        for name, tensor in part.items():  # away from the near-linear regime of a fresh init
            scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 and "embed" not in name else 0.3
            norm = tensor.ndim == 1 and name.endswith("weight")
            tensor.normal_(std=scale).add_(1.0 if norm else 0.0)
    configs = {
        "llm": without_dtype(llm_config),
        "vision_tower": without_dtype(tower_config),
        "mm_projector": {"model_type": "v2l_projector", "mm_projector_type": f"mlp_downsample_{side}x{side}_fix"},
    }
    if side == 2:
        configs["mm_projector"]["mm_projector_type"] = "mlp_downsample"
    return configs, tensors


def without_dtype(config) -> dict:
    return {name: value for name, value in config.to_dict().items() if name != "dtype"}


def make_nvila(
    folder: Path, layout: str = "llava_llama", kind: str = "8b", *, shard="60KB", **options
) -> dict[str, torch.Tensor]:
    """Writes a checkpoint; returns its tensors, by their names in the flat layout."""
    configs, tensors = make_parts(kind, **options)
    flat = {f"{part}.{name}": tensor for part in tensors for name, tensor in tensors[part].items()}
    folder.mkdir(parents=True)
    settings = KINDS[kind][0]
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": SIZE, "width": SIZE}}
    if layout in ("llava_llama", "vila"):
        for part, config in configs.items():
            (folder / part).mkdir()
            save_torch_state_dict(tensors[part], folder / part, max_shard_size=shard or "1GB")
            write_json(folder / part / "config.json", config)
        make_tokenizer().save_pretrained(folder / "llm")
        write_json(folder / "vision_tower" / "preprocessor_config.json", pixels)
        top = released_top(layout, configs) | settings
    else:
        new_names = layout == "nvila, 0626"  # as saved by a Transformers whose SigLIP has no inner module
        renamed = {name.replace("vision_model.", "") if new_names else name: t for name, t in flat.items()}
        save_torch_state_dict(renamed, folder, max_shard_size=shard or "1GB")
        tokenizer = make_tokenizer(media_tokens=True)
        tokenizer.save_pretrained(folder)
        write_json(folder / "preprocessor_config.json", pixels)
        top = {
            "architectures": [
                "NVILALiteForConditionalGeneration" if kind == "lite" else "NVILAForConditionalGeneration"
            ],
            "model_type": "nvila_lite" if kind == "lite" else "nvila",
            "text_config": configs["llm"],
            "vision_config": configs["vision_tower"],
            "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
            "video_token_id": tokenizer.convert_tokens_to_ids("<vila/video>"),
        }
        if kind == "video":
            top |= settings
    write_json(folder / "config.json", top)
    return flat


def released_top(layout: str, configs: dict[str, dict]) -> dict:
    """A top config like a released one, whose copies of the parts' configurations are out of date."""
    top = {
        "architectures": ["LlavaLlamaModel" if layout == "llava_llama" else "VILAForCausalLM"],
        "model_type": layout,
        "drop_path_rate": 0.0,
        "fps": 0.0,
        "hidden_size": DECODER,
        "llm_cfg": {**configs["llm"], "vocab_size": 7},
        "mm_projector_cfg": {"mm_projector_type": "mlp_downsample"},
        "vision_tower_cfg": {**configs["vision_tower"], "image_size": 8},
        "mm_use_im_patch_token": True,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "cls_patch",
        "mm_vision_select_layer": -2,
        "num_time_tokens": 0,
        "num_video_frames": 8,
        "s2": False,
        "s2_max_split_size": SIZE,
        "s2_resize_output_to_scale_idx": -1,
        "vision_resolution": -1,
    }
    if layout == "vila":
        top |= {
            "image_encoder": json.dumps({"_target_": "llava.model.encoders.BasicImageEncoder"}),
            "video_encoder": json.dumps({"_target_": "llava.model.encoders.BasicVideoEncoder"}),
        }
    return top


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2))


def change_json(file: Path, **changes) -> None:
    """Sets entries of a JSON file; `...` removes one."""
    content = json.loads(file.read_text()) | changes
    write_json(file, {name: value for name, value in content.items() if value is not ...})
