"""NVILA's vision configuration: what it derives, what it accepts, what it refuses."""

import pytest
import tiny_nvila
from transformers import AutoConfig

from linmu_hf import LinMUConfig, LinMUModel, NVILAVisionConfig


TOWER = {"hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 448, "patch_size": 14}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"image_aspect_ratio": "dynamic_s2", "s2_scales": "448,896,1344"}, (2, 32, 16, 3, 3456)),
        ({"image_aspect_ratio": "dynamic", "projector_type": "mlp_downsample_3x3_fix"}, (3, 32, 11, 1, 1152)),
        ({"image_aspect_ratio": "resize", "projector_type": "mlp_downsample"}, (2, 32, 16, 1, 1152)),
    ],
    ids=["8B", "Lite", "Video"],
)
def test_derived_sizes(options, expected):
    config = NVILAVisionConfig(tower_config=TOWER, **options)
    sizes = config.downsample, config.tile_patches, config.tile_tokens, config.n_scales, config.mm_hidden_size
    assert sizes == expected
    assert config.tower_layers == 26


def test_what_is_written_otherwise_is_normalised():
    config = NVILAVisionConfig(
        tower_config=TOWER, image_aspect_ratio="dynamic_s2", s2_scales="448, 896", projector_type="mlp_downsample"
    )
    assert config.s2_scales == [448, 896] and config.projector_type == "mlp_downsample_2x2_fix"
    assert config.pool_sizes == [[1, 1, 1]] and config.tower_config.vision_use_head is False
    with_head = NVILAVisionConfig(tower_config={**TOWER, "vision_use_head": True})
    assert with_head.tower_config.vision_use_head is False


S2 = {"image_aspect_ratio": "dynamic_s2", "s2_scales": [8, 16]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector_type": "linear"}, r"projector_type='linear' is unknown; choose one of \['mlp_downsample'"),
        ({"feature_layer": -5}, r"feature_layer=-5 is none of the 4 hidden states .* choose one from -4 to 3"),
        ({"image_aspect_ratio": "pad"}, r"image_aspect_ratio='pad'; choose one of"),
        (S2 | {"s2_scales": None}, r"s2_scales=None must begin with the tower's image_size=8"),
        (S2 | {"s2_scales": [16, 24]}, r"s2_scales=\[16, 24\] must begin with the tower's image_size=8"),
        (S2 | {"s2_scales": [8, 12]}, r"s2_scales=\[8, 12\] must .* rise in multiples of it"),
        (S2 | {"s2_scales": [8, 24, 16]}, r"s2_scales=\[8, 24, 16\] must"),
        (S2 | {"s2_scales": "8,32"}, r"max_tiles=12 is less than the 16 tiles of the last of s2_scales"),
        ({"s2_scales": [8, 16]}, r"s2_scales=\[8, 16\] belong to image_aspect_ratio='dynamic_s2', which is 'resize'"),
        ({"min_tiles": 5, "max_tiles": 4}, r"min_tiles=5 and max_tiles=4 must be at least 1 and in that order"),
        ({"min_tiles": 0}, r"min_tiles=0 and max_tiles=12"),
        ({"video_encoder": "q-former"}, r"video_encoder='q-former'; choose one of"),
        ({"pool_sizes": [[2, 1, 1]]}, r"pool_sizes=\[\[2, 1, 1\]\] belong to video_encoder='tsp'"),
        ({"video_encoder": "tsp", "pool_sizes": []}, r"pool_sizes=\[\] must be a list of \[frames, rows, columns\]"),
        ({"video_encoder": "tsp", "pool_sizes": [[2, 1]]}, r"pool_sizes=\[\[2, 1\]\] must be a list of"),
        ({"video_encoder": "tsp", "pool_sizes": [[0, 1, 1]]}, r"each at least 1"),
        ({"video_encoder": "tsp", "pool_sizes": [[1, 3, 1]]}, r"rows and columns must divide the 2 tokens per edge"),
    ],
    ids=str,
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_nvila.vision_config(**options)


@pytest.mark.parametrize("sizes", [{"image_size": 9}, {"image_size": [8, 8]}, {"patch_size": 3}], ids=str)
def test_a_tile_must_be_square_and_of_whole_patches(sizes):
    tower = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 8, "patch_size": 2}
    with pytest.raises(ValueError, match=r"tower_config: image_size=.* must be one number, a multiple of patch_size="):
        NVILAVisionConfig(tower_config=tower | sizes)


def test_it_is_saved_inside_that_of_the_model(tmp_path):
    config = tiny_nvila.config(scan_rope=False)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LinMUConfig and type(loaded.vision_config) is NVILAVisionConfig
    assert loaded.vision_config.to_dict() == config.vision_config.to_dict()
    assert (loaded.vision_start_token_id, loaded.vision_end_token_id) == (None, None)
    assert "mrope_section" not in loaded.text_config.rope_parameters


def test_only_qwen_has_a_default_for_its_three_axes():
    assert LinMUConfig().text_config.rope_parameters["mrope_section"] == [16, 24, 24]
    with pytest.raises(ValueError, match=r"mrope_section=\[16, 24, 24\] must add up to half of head_dim=64"):
        LinMUConfig(text_config={"hidden_size": 256, "num_attention_heads": 4})


def test_another_vision_side_is_refused():
    config = tiny_nvila.config()
    config.vision_config = config.vision_config.tower_config
    with pytest.raises(ValueError, match=r"vision_config: model_type='siglip_vision_model' is unknown; choose one of"):
        LinMUModel(config)
