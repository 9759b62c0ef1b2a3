"""NVILA's released layouts: what is read from each, and what is refused."""

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from synthetic import rewrite
from synthetic_nvila import DECODER, HIDDEN, KINDS, LAYOUTS, SIZE, change_json, make_nvila, make_tokenizer
from transformers import GenerationConfig

from linmu_hf.conversion import source as source_module
from linmu_hf.conversion.source import open_source
from linmu_hf.families.nvila.checkpoint import _vision_config
from linmu_hf.safetensors_io import StoredTensor


@pytest.fixture
def teacher(tmp_path):
    make_nvila(tmp_path / "teacher", shard=None)
    return tmp_path / "teacher"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_configuration(layout, kind, tmp_path):
    make_nvila(tmp_path / "teacher", layout, kind)
    config = open_source(tmp_path / "teacher").teacher.config
    vision, text = config.vision_config, config.text_config
    assert vision.image_aspect_ratio == {"8b": "dynamic_s2", "lite": "dynamic", "video": "resize"}[kind]
    assert vision.s2_scales == ([32, 64, 96] if kind == "8b" else None)
    assert vision.projector_type == f"mlp_downsample_{'3x3' if kind == 'lite' else '2x2'}_fix"
    assert (vision.tower_config.image_size, vision.tower_config.hidden_size) == (SIZE, HIDDEN)
    assert (vision.feature_layer, vision.out_hidden_size) == (-2, DECODER)
    video = ("tsp", [[2, 1, 1]], 4) if kind == "video" else ("basic", [[1, 1, 1]], 8)
    assert (vision.video_encoder, vision.pool_sizes, config.num_video_frames) == video
    n = len(make_tokenizer())
    assert (text.vocab_size, config.image_token_id, config.video_token_id) == (n, n + 1, n + 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_are_those_of_the_flat_layout(layout, tmp_path):
    tensors = make_nvila(tmp_path / "teacher", layout)
    found = open_source(tmp_path / "teacher").tensors
    without_inner = {name.replace("vision_model.", ""): tensor.shape for name, tensor in tensors.items()}
    assert {name.replace("vision_model.", ""): t.shape for name, t in found.items()} == without_inner


def test_released_nvila_8b():
    """The values of the published config.json, and the size of the published projector."""
    top = {
        "image_aspect_ratio": "dynamic_s2", "s2_scales": "448,896,1344", "s2_max_split_size": 448, "dynamic_s2": True,
        "s2_resize_output_to_scale_idx": -1, "mm_hidden_size": 3456, "mm_vision_select_layer": -2, "fps": 0.0,
        "num_time_tokens": 0, "num_video_frames": 8, "model_type": "llava_llama",
    }  # fmt: skip
    tower = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 448, "patch_size": 14, "hidden_act": "gelu_pytorch_tanh", "model_type": "siglip_vision_model",
        "bad_words_ids": None, "torch_dtype": "bfloat16", "max_length": 20,
    }  # fmt: skip
    sizes = {1: (13824,), 2: (3584, 13824), 4: (3584, 3584)}
    tensors = {
        f"mm_projector.layers.{i}.weight": StoredTensor(None, torch.bfloat16, size, 0, 0) for i, size in sizes.items()
    }
    config = _vision_config(top, tower, {"mm_projector_type": "mlp_downsample"}, tensors, 3584)
    assert (config.mm_hidden_size, config.tile_tokens, config.n_scales, config.downsample) == (3456, 16, 3, 2)
    assert config.s2_scales == [448, 896, 1344]
    assert "torch_dtype" not in config.tower_config.to_dict()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_processor_and_generation(layout, tmp_path):
    make_nvila(tmp_path / "teacher", layout)
    source = open_source(tmp_path / "teacher")
    tokenizer = source.load_processor().tokenizer
    assert tokenizer.convert_ids_to_tokens(source.teacher.config.image_token_id) == "<image>"
    assert tokenizer.convert_ids_to_tokens(source.teacher.config.video_token_id) == "<vila/video>"
    (tmp_path / "out").mkdir()
    source.write_processor(tmp_path / "out")
    written = GenerationConfig.from_pretrained(tmp_path / "out")
    assert written.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert written.pad_token_id == tokenizer.convert_tokens_to_ids("[PAD]")
    assert not written.do_sample and written.suppress_tokens is None


def test_stop_tokens_of_the_language_model_count_too(teacher):
    end = make_tokenizer().convert_tokens_to_ids("<|im_end|>")
    change_json(teacher / "llm" / "config.json", eos_token_id=[3, end])
    assert open_source(teacher).teacher.generation_config.eos_token_id == [end, 3]


@pytest.mark.parametrize("new_rows, suppressed", [(1, 1), (3, 3), (8, 3)])
def test_untrained_tokens_in_the_vocabulary_are_suppressed(tmp_path, new_rows, suppressed):
    make_nvila(tmp_path / "teacher", new_rows=new_rows)
    n = len(make_tokenizer())
    assert open_source(tmp_path / "teacher").teacher.generation_config.suppress_tokens == list(
        range(n, n + suppressed)
    )


def test_pixel_statistics_are_the_towers(teacher):
    change_json(teacher / "vision_tower" / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 3])
    processor = open_source(teacher).load_processor()
    for part in (processor.image_processor, processor.video_processor):
        assert (list(part.image_mean), list(part.image_std)) == ([0.1, 0.2, 0.3], [1, 2, 3])


def test_tokenizer_may_lie_in_the_top_folder(teacher):
    for file in (teacher / "llm").glob("*token*"):
        file.rename(teacher / file.name)
    assert open_source(teacher).load_processor().tokenizer.pad_token == "[PAD]"


@pytest.mark.parametrize(
    "value, expected",
    [
        (None, ("basic", [[1, 1, 1]])),
        ("BasicVideoEncoder", ("basic", [[1, 1, 1]])),
        ({"_target_": "llava.model.encoders.BasicVideoEncoder", "end_tokens": "\n"}, ("basic", [[1, 1, 1]])),
        ({"_target_": "a.TSPVideoEncoder", "pool_sizes": [[2, 1, 1], [4, 2, 2]]}, ("tsp", [[2, 1, 1], [4, 2, 2]])),
        ('{"_target_": "a.TSPVideoEncoder", "pool_sizes": [[8, 1, 1]], "sep_tokens": null}', ("tsp", [[8, 1, 1]])),
    ],
)
def test_video_encoder(teacher, value, expected):
    change_json(teacher / "config.json", video_encoder=value)
    vision = open_source(teacher).teacher.config.vision_config
    assert (vision.video_encoder, vision.pool_sizes) == expected


def test_tiles(teacher):
    change_json(teacher / "config.json", min_tiles=2, max_tiles=20)
    vision = open_source(teacher).teacher.config.vision_config
    assert (vision.min_tiles, vision.max_tiles) == (2, 20)


UNSUPPORTED = {
    "image_aspect_ratio='s2' is not supported": {"image_aspect_ratio": "s2"},
    "image_aspect_ratio='pad' is not supported": {"image_aspect_ratio": "pad"},
    "s2=True .S2 without dynamic tiles. is not supported": {"s2": True},
    "ps3=True .* is not supported": {"ps3": True},
    "mm_vision_select_feature='patch' .* is not supported": {"mm_vision_select_feature": "patch"},
    "mm_use_im_start_end=True .* is not supported": {"mm_use_im_start_end": True},
    "s2_resize_output_to_scale_idx=0 is not supported": {"s2_resize_output_to_scale_idx": 0},
    "s2_max_split_size=64 is not supported": {"s2_max_split_size": 64},
    "mm_hidden_size has 16 channels, but 3 scale": {"mm_hidden_size": 16},
    "the projector has 48 channels, but 1 scale": {"image_aspect_ratio": "resize"},
    "the projector has 48 channels, but 2 scale": {"s2_scales": [32, 64]},
    "s2_scales=.31, 62, 93. must begin with": {"s2_scales": "31,62,93"},
    "max_tiles=4 is less than the 9 tiles": {"max_tiles": 4},
    "is quantized .awq.": {"quantization_config": {"quant_method": "awq"}},
    "image_encoder='CustomImageEncoder' is not supported": {"image_encoder": "CustomImageEncoder"},
    "video_encoder=5 is not supported": {"video_encoder": 5},
    "video_encoder='TSPVideoEncoder' is not supported": {"video_encoder": "TSPVideoEncoder"},
    "video_encoder=.*end_tokens.* is not supported": {
        "video_encoder": {"_target_": "BasicVideoEncoder", "end_tokens": None}
    },
    "feature_layer=-9 is none of the 4": {"mm_vision_select_layer": -9},
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_unsupported_settings(teacher, message):
    change_json(teacher / "config.json", **UNSUPPORTED[message])
    with pytest.raises(ValueError, match=message):
        open_source(teacher)


@pytest.mark.parametrize(
    "part, changes, message",
    [
        ("llm", {"model_type": "llama"}, "its language model is 'llama': only 'qwen2'"),
        ("llm", {"quantization_config": {"quant_method": "awq"}}, "is quantized .awq."),
        ("vision_tower", {"model_type": "radio"}, "its vision tower is 'radio': only SigLIP"),
        ("vision_tower", {"hidden_size": 18}, "its projector takes 48 channels, no multiple of"),
        ("vision_tower", {"image_size": "large"}, "its configuration is broken"),
        ("mm_projector", {"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type='mlp2x_gelu' is not supported"),
        (
            "mm_projector",
            {"mm_projector_type": "mlp_downsample_3x3_fix"},
            r"\[1, 2, 4\] instead of \[1, 2, 4, 5",
        ),
    ],
)
def test_unsupported_parts(teacher, part, changes, message):
    change_json(teacher / part / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        open_source(teacher)


def test_projector_is_known_by_its_tensors(teacher):
    change_json(teacher / "mm_projector" / "config.json", mm_projector_type=...)
    assert open_source(teacher).teacher.config.vision_config.downsample == 2
    file = teacher / "mm_projector" / "model.safetensors"
    rewrite(file, lambda tensors: {name: t for name, t in tensors.items() if not name.startswith("layers.1.")})
    with pytest.raises(ValueError, match=r"lacks the tensor 'mm_projector.layers.1.weight'"):
        open_source(teacher)


@pytest.mark.parametrize("part", ["llm", "vision_tower", "mm_projector"])
def test_missing_part(teacher, part):
    (teacher / part).rename(teacher / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"lacks its sub-folder {part}"):
        open_source(teacher)


def test_missing_files(teacher):
    (teacher / "llm" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        open_source(teacher)
    (teacher / "vision_tower" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"vision_tower has no config.json"):
        open_source(teacher)


def test_neither_layout(teacher):
    change_json(teacher / "config.json", llm_cfg=...)
    with pytest.raises(ValueError, match="names neither the parts of an NVILA model"):
        open_source(teacher)


def test_unsupported_models_are_not_downloaded(teacher, monkeypatch):
    change_json(teacher / "config.json", image_aspect_ratio="ps3")

    def fail(*args, **kwargs):
        raise AssertionError("downloaded")

    monkeypatch.setattr(source_module, "hf_hub_download", lambda *args, **kwargs: str(teacher / "config.json"))
    monkeypatch.setattr(source_module, "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"^org/nvila: image_aspect_ratio='ps3' is not supported"):
        open_source("org/nvila")


def test_fields_that_are_left_out_have_their_defaults(teacher):
    """Configurations are saved without what equals the class's default."""
    change_json(teacher / "llm" / "config.json", hidden_act=..., rms_norm_eps=..., vocab_size=...)
    change_json(teacher / "vision_tower" / "config.json", hidden_act=..., layer_norm_eps=..., num_channels=...)
    config = open_source(teacher).teacher.config
    assert (config.text_config.vocab_size, config.text_config.rms_norm_eps) == (151936, 1e-6)
    tower = config.vision_config.tower_config
    assert (tower.hidden_act, tower.layer_norm_eps, tower.num_channels) == ("gelu_pytorch_tanh", 1e-6, 3)


def test_ids_of_config_and_tokenizer_disagree(tmp_path):
    make_nvila(tmp_path / "teacher", "nvila")
    change_json(tmp_path / "teacher" / "config.json", image_token_id=5)
    with pytest.raises(ValueError, match=r"image_token_id is 5 in config\.json and 310 in the tokenizer"):
        open_source(tmp_path / "teacher")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_download_is_all_that_is_needed_and_no_more(layout, tmp_path, monkeypatch):
    """The Hub is asked for config.json, then for what its layout needs."""
    folder = tmp_path / "hub"
    make_nvila(folder, layout)
    useless = {"README.md", "modeling_vila.py", "pytorch_model.bin", "trainer_state.json", "demo/cat.png"}
    for extra in useless:
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_text("{}")
    taken = []

    def snapshot_download(name, revision, allow_patterns):
        names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        taken.extend(filter_repo_objects(names, allow_patterns=allow_patterns))
        for name in taken:
            (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cache" / name).write_bytes((folder / name).read_bytes())
        return str(tmp_path / "cache")

    monkeypatch.setattr(source_module, "hf_hub_download", lambda *args, **kwargs: str(folder / "config.json"))
    monkeypatch.setattr(source_module, "snapshot_download", snapshot_download)
    assert open_source("org/nvila").tensors.keys() == open_source(folder).tensors.keys()
    assert not {"README.md", "modeling_vila.py", "pytorch_model.bin", "trainer_state.json", "demo/cat.png"} & set(
        taken
    )
