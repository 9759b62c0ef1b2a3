"""Every option works; every impossible value is refused with its name, the value and what to do."""

import pytest
import tiny
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig

from linmu_hf import PRESETS, LinMUConfig, LinMUTextConfig
from linmu_hf.modeling.configuration_linmu import MIXER_FIELDS


WORKING = [
    {},
    {"scan_orders": ["thw"]},
    {"scan_orders": ["wht", "hwt", "thw"]},
    {"reverse_scope": "sequence"},
    {"gate": "channel"},
    {"scan_rope": False},
    {"bc_feature_map": None},
    {"state_size": 10},
    {"max_span_frames": 2},
    {"conv_kernel": 1},
    {"conv_kernel": 7},
    {"timescale_init": "mamba2"},
    {"timescale_range": [3, 3]},
    {"window_size": [1, 1, 1], "image_window_size": [1, 1, 1]},
    {"window_size": (16, 4, 4), "image_window_size": (1, 16, 16)},
    {"window_wrap": True},
    {"output_norm": "layer_norm"},
    {"layer_types": ["full_attention", "m_mate", "m_mate", "full_attention"]},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1},
    {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
    PRESETS["paper"],
]
SAMPLES = tiny.Sample(3, ("image", 3, 5), 2, ("video", 3, 3, 2), 2), tiny.Sample(4)


@pytest.mark.parametrize("options", WORKING, ids=str)
def test_option_works(options):
    """Forward, a gradient for every parameter, generation; and the configuration survives JSON."""
    model = tiny.model(**options)
    inputs = tiny.batch(*SAMPLES, padding="left")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or "embed_tokens" in name or unused(name, options), name
    assert model.generate(**inputs, max_new_tokens=2, eos_token_id=None).shape[1] == inputs["input_ids"].shape[1] + 2
    assert LinMUConfig.from_dict(model.config.to_dict()).to_dict() == model.config.to_dict()


def unused(name, options):
    """A window of one token attends to itself whatever its query and key."""
    return options.get("window_size") == [1, 1, 1] and ("local_swin.q_proj" in name or "local_swin.k_proj" in name)


@pytest.mark.parametrize("options", [{}, PRESETS["paper"]], ids=["default", "paper"])
def test_every_option_is_tried(options):
    tried = {name for one in WORKING for name in one}
    assert set(MIXER_FIELDS) <= tried


IMPOSSIBLE = [
    ({"reverse_scope": "image"}, r"reverse_scope='image' is unknown; choose one of \['span', 'sequence'\]"),
    ({"gate": "token"}, r"gate='token' is unknown; choose one of \['head', 'channel'\]"),
    ({"max_span_frames": 0}, "max_span_frames=0 must be at least 1, or None"),
    ({"state_size": 7}, "state_size=7 must be even and at least 2"),
    ({"bc_feature_map": "relu"}, r"bc_feature_map='relu' is unknown; choose one of \[None, 'softmax'\]"),
    ({"timescale_init": "random"}, r"timescale_init='random' is unknown; choose one of"),
    ({"output_norm": "batch_norm"}, r"output_norm='batch_norm' is unknown; choose one of"),
    ({"scan_orders": ["htw"]}, r"scan_orders=\['htw'\] must be a non-empty list out of \['thw'"),
    ({"scan_orders": []}, r"scan_orders=\[\] must be a non-empty list"),
    ({"window_size": [16, 4]}, r"window_size=\(16, 4\) must have 3 entries \(frames, height, width\)"),
    ({"window_size": [16, 0, 4]}, r"window_size=\(16, 0, 4\) must have entries of at least 1"),
    ({"image_window_size": [1, 16, 16, 1]}, r"image_window_size=\(1, 16, 16, 1\) must have 3 entries"),
    ({"image_window_size": [1, -1, 1]}, r"image_window_size=\(1, -1, 1\) must have entries of at least 1"),
    ({"conv_kernel": 0}, r"conv_kernel=0 must be at least 1 \(1 leaves the convolution out\)"),
    ({"timescale_range": [4.0]}, r"timescale_range=\(4.0,\) must be \(shortest, longest\)"),
    ({"timescale_range": [0.0, 4.0]}, r"timescale_range=\(0.0, 4.0\) must be \(shortest, longest\)"),
    ({"timescale_range": [9.0, 4.0]}, r"timescale_range=\(9.0, 4.0\) must be .* in that order"),
    ({"num_key_value_heads": 3}, r"num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
    ({"layer_types": ["m_mate"] * 3 + ["mamba"]}, r"layer_types has \['mamba'\]; each entry must be one of"),
    ({"layer_types": ["m_mate"]}, r"layer_types has 1 entries for num_hidden_layers=4; give one entry per layer"),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}},
        r"mrope_section=\[2, 2, 2\] must add up to half of head_dim=8",
    ),
]


@pytest.mark.parametrize(("options", "message"), IMPOSSIBLE, ids=[str(options) for options, _ in IMPOSSIBLE])
def test_impossible_value(options, message):
    with pytest.raises(ValueError, match=message):
        tiny.text_config(**options)
    with pytest.raises(ValueError, match=message):
        LinMUConfig(text_config={**tiny.text_config().to_dict(), **options})


@pytest.mark.parametrize("options", [{"conv_kernel": 2.5}, {"window_size": "4"}, {"scan_rope": "yes"}], ids=str)
def test_value_of_a_wrong_type_is_refused_by_name(options):
    (name,) = options
    with pytest.raises(
        StrictDataclassFieldValidationError, match=rf"'{name}'[\s\S]* got {type(options[name]).__name__}"
    ):
        tiny.text_config(**options)


def teacher_config(**text):
    config = tiny.config()
    common = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields = {name: getattr(config.text_config, name) for name in (*common, "num_key_value_heads", "rope_parameters")}
    return Qwen2_5_VLConfig(
        text_config={**fields, **text}, vision_config=config.vision_config.to_dict(), image_token_id=tiny.IMAGE,
        video_token_id=tiny.VIDEO, vision_start_token_id=tiny.START, vision_end_token_id=tiny.END,
    )  # fmt: skip


def test_from_teacher():
    config = LinMUConfig.from_teacher(teacher_config(), keep_attention=(1,), preset="paper", window_size=[2, 2, 2])
    text = config.text_config
    assert text.layer_types == ["m_mate", "full_attention", "m_mate", "m_mate"]
    assert (text.output_norm, text.timescale_init, text.window_size) == ("layer_norm", "mamba2", [2, 2, 2])
    assert (text.hidden_size, text.rope_parameters["mrope_section"]) == (32, [2, 1, 1])
    assert (config.image_token_id, config.video_token_id) == (tiny.IMAGE, tiny.VIDEO)
    assert config.vision_config.model_type == "qwen2_5_vl_vision"
    everything = LinMUConfig.from_teacher(teacher_config(), keep_attention="all").text_config
    assert set(everything.layer_types) == {"full_attention"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "best"}, r"preset='best' is unknown; choose one of \['default', 'paper'\]"),
        ({"windows": 3}, r"unknown M-MATE options \['windows'\]; known ones are"),
        ({"keep_attention": (1, 4)}, r"keep_attention names layers \[4\]; the teacher has layers 0 to 3"),
        ({"keep_attention": (-1,)}, r"keep_attention names layers \[-1\]"),
        ({"window_size": [2, 2]}, r"window_size=\(2, 2\) must have 3 entries"),
    ],
    ids=str,
)
def test_from_teacher_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        LinMUConfig.from_teacher(teacher_config(), **options)


def test_from_teacher_refuses_sliding_windows():
    config = teacher_config(use_sliding_window=True, sliding_window=8, max_window_layers=2)
    with pytest.raises(ValueError, match="sliding-window attention are not supported"):
        LinMUConfig.from_teacher(config)


def test_saved_configuration_loads_by_its_type(tmp_path):
    config = tiny.config(gate="channel", window_size=(2, 2, 2))
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LinMUConfig and type(loaded.text_config) is LinMUTextConfig
    assert loaded.text_config.to_dict() == config.text_config.to_dict()
    assert (loaded.text_config.gate, loaded.text_config.window_size) == ("channel", [2, 2, 2])


@torch.no_grad()
def test_default_configuration_is_complete():
    """The documented defaults build a (meta) model."""
    with torch.device("meta"):
        from linmu_hf import LinMUTextModel

        model = LinMUTextModel(LinMUTextConfig(num_hidden_layers=2))
    assert model.layers[1].mixer.flex_ma.forward_scan.conv_weight.shape == (4, (28 + 8) * 128)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"text_window": -1}, "text_window=-1"),
        ({"text_window": 8, "sink_tokens": -2}, "sink_tokens=-2"),
        ({"text_window": 0, "sink_tokens": 4}, "sink_tokens=4 need a text_window"),
    ],
)
def test_impossible_text_windows(options, said):
    with pytest.raises(ValueError, match=said):
        LinMUTextConfig(**options)


def test_a_model_of_before_has_no_text_window():
    """Its configuration does not name the field, and its fusion has one weight for all heads."""
    config = LinMUTextConfig(num_hidden_layers=1)
    content = {name: value for name, value in config.to_dict().items() if name not in ("text_window", "sink_tokens")}
    assert LinMUTextConfig(**content).text_window == LinMUTextConfig(**content).sink_tokens == 0
    assert PRESETS["default"] == {"text_window": 512, "sink_tokens": 4} and PRESETS["paper"]["text_window"] == 0
