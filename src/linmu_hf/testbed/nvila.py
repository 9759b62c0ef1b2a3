"""The testbed's NVILA: its shape, its processor, and its checkpoint in the folders in which NVILA is released."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, SiglipImageProcessor, SiglipVisionConfig

from ..conversion.teacher import load_teacher
from ..families.nvila.configuration import NVILAConfig, NVILAVisionConfig
from ..families.nvila.processing import SENTINEL_TOKEN, NVILAProcessor
from ..families.nvila.processing import build_processor as build_nvila_processor
from ..modeling.configuration_linmu import LinMUConfig
from ..modeling.modeling_linmu import LinMUForConditionalGeneration
from .data import FRAMES_PER_MOMENT
from .processor import IMAGE_MEAN, IMAGE_STD, PATCH_SIZE, build_tokenizer


SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[BOS]", "[PAD]")
TILE = 64
SCALES = (TILE, 2 * TILE)
MAX_TILES = 4  # every image becomes 2x2 tiles: 8x8 tokens, one for each cell of the largest mosaic
POOL_SIZES = ((FRAMES_PER_MOMENT, 1, 1),)
MAX_MOMENTS = 8


def vision_config() -> NVILAVisionConfig:
    """Returns dynamic_s2 with two scales, TSP that makes two frames one."""
    return NVILAVisionConfig(
        tower_config=SiglipVisionConfig(
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,  # three of them are used: features come from before the last, as in NVILA
            num_attention_heads=4,
            image_size=TILE,
            patch_size=PATCH_SIZE,
        ),
        projector_type="mlp_downsample_2x2_fix",
        image_aspect_ratio="dynamic_s2",
        s2_scales=list(SCALES),
        max_tiles=MAX_TILES,
        video_encoder="tsp",
        pool_sizes=[list(size) for size in POOL_SIZES],
        out_hidden_size=128,
    )


def build_processor() -> NVILAProcessor:
    """Builds NVILA's processor and chat template around the testbed's tokenizer."""
    return build_nvila_processor(
        vision_config(),
        build_tokenizer(SPECIAL_TOKENS, pad_token="[PAD]"),
        num_video_frames=FRAMES_PER_MOMENT * MAX_MOMENTS,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )


def teacher_config(processor: NVILAProcessor) -> LinMUConfig:
    """Describes the teacher as LinMU with full attention; added tokens are outside its vocabulary, as NVILA's."""
    ids = processor.tokenizer.convert_tokens_to_ids
    teacher = NVILAConfig(
        text_config=Qwen2Config(
            vocab_size=ids(SENTINEL_TOKEN),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            rms_norm_eps=1e-6,
            initializer_range=0.05,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=ids("<|im_end|>"),
            pad_token_id=ids("[PAD]"),
        ),
        vision_config=vision_config(),
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        num_video_frames=FRAMES_PER_MOMENT * MAX_MOMENTS,
    )
    return LinMUConfig.from_teacher(teacher, keep_attention="all")


def build_model(processor: NVILAProcessor) -> LinMUForConditionalGeneration:
    """Builds the teacher with random weights."""
    model = LinMUForConditionalGeneration(teacher_config(processor))
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model


def load_model(folder: str | Path) -> LinMUForConditionalGeneration:
    return load_teacher(folder).requires_grad_(True)


def train_mode(model: LinMUForConditionalGeneration, training: bool = True) -> None:
    model.train(training)


@torch.no_grad()
def start_decoder_from_qwen(model: LinMUForConditionalGeneration, processor: NVILAProcessor, folder: Path) -> None:
    """Starts the decoder from that of the testbed's Qwen2.5-VL, as NVILA's starts from a trained Qwen2.

    Rotary positions lose their three parts, and tokens of other names keep their random embeddings.
    """
    weights = load_file(folder / "model.safetensors")
    theirs = json.loads((folder / "tokenizer.json").read_text())
    ids = theirs["model"]["vocab"] | {token["content"]: token["id"] for token in theirs["added_tokens"]}
    embeddings = weights.pop("model.embed_tokens.weight")
    for name, parameter in model.model.language_model.named_parameters():
        if name != "embed_tokens.weight":
            parameter.copy_(weights["model." + name.replace(".mixer.", ".self_attn.")])
    for token, id in processor.tokenizer.get_vocab().items():
        if id < model.model.n_embeddings and token in ids:
            for head in (model.get_input_embeddings(), model.get_output_embeddings()):
                head.weight[id] = embeddings[ids[token]]


def save_checkpoint(model: LinMUForConditionalGeneration, processor: NVILAProcessor, folder: str | Path) -> None:
    """Writes `config.json` and the sub-folders `llm`, `vision_tower` and `mm_projector`, each with its own weights."""
    folder = Path(folder)
    vision, text = model.config.vision_config, model.config.get_text_config()
    tower = vision.tower_config
    names = {
        "model.language_model.": ("llm", "model."),
        "lm_head.": ("llm", "lm_head."),
        "model.visual.vision_tower.": ("vision_tower", "vision_model."),
        "model.visual.mm_projector.": ("mm_projector", ""),
    }
    tensors: dict[str, dict] = {part: {} for part, _ in names.values()}
    for name, tensor in model.state_dict().items():
        ours, (part, theirs) = next(item for item in names.items() if name.startswith(item[0]))
        released = theirs + name.removeprefix(ours).replace(".mixer.", ".self_attn.")
        tensors[part][released] = tensor.detach().contiguous()
    configs = {
        "llm": _text_config(text),
        "vision_tower": {"architectures": ["SiglipVisionModel"], **tower.to_diff_dict()},
        "mm_projector": {
            "architectures": ["MultimodalProjector"],
            "model_type": "v2l_projector",
            "mm_projector_type": vision.projector_type,
        },
    }
    for part, config in configs.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        save_file(tensors[part], folder / part / "model.safetensors", metadata={"format": "pt"})
        _write(folder / part / "config.json", config)
    _write(
        folder / "config.json",
        {
            "architectures": ["LlavaLlamaModel"],
            "model_type": "llava_llama",
            "llm_cfg": configs["llm"],
            "vision_tower_cfg": configs["vision_tower"],
            "mm_projector_cfg": configs["mm_projector"],
            "hidden_size": text.hidden_size,
            "mm_hidden_size": vision.mm_hidden_size,
            "mm_projector": vision.projector_type,
            "mm_vision_select_feature": "cls_patch",
            "mm_vision_select_layer": vision.feature_layer,
            "image_aspect_ratio": vision.image_aspect_ratio,
            "s2_scales": ",".join(map(str, vision.s2_scales)),
            "s2_max_split_size": tower.image_size,
            "s2_resize_output_to_scale_idx": -1,
            "max_tiles": vision.max_tiles,
            "num_video_frames": processor.video_processor.num_frames,
            "fps": 0.0,
            "num_time_tokens": 0,
            "image_encoder": {"_target_": "llava.model.encoders.BasicImageEncoder"},
            "video_encoder": {"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": vision.pool_sizes},
        },
    )
    processor.tokenizer.save_pretrained(folder / "llm")
    SiglipImageProcessor(
        size={"height": tower.image_size, "width": tower.image_size},
        image_mean=processor.image_processor.image_mean,
        image_std=processor.image_processor.image_std,
        resample=3,
    ).save_pretrained(folder / "vision_tower")


def _text_config(text) -> dict:
    """The decoder's configuration as one of Qwen2, which is what its weights are."""
    known = Qwen2Config().to_dict()
    config = Qwen2Config(**{name: value for name, value in text.to_dict().items() if name in known})
    return {"architectures": ["Qwen2ForCausalLM"], **config.to_diff_dict()}


def _write(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
