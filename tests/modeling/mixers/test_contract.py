"""The contract of a mixer, and a further one that is nothing but a class and an entry."""

import pytest
import tiny
import torch
from synthetic import make_teacher
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING

from linmu_hf import LinMUForConditionalGeneration, LinMUTextConfig
from linmu_hf.conversion.convert import convert
from linmu_hf.conversion.weight_map import is_new, map_teacher_key
from linmu_hf.modeling.cache import MMateCacheLayer
from linmu_hf.modeling.configuration_linmu import LAYER_TYPES
from linmu_hf.modeling.layout.token_layout import TextStep
from linmu_hf.modeling.mixers import MIXERS, Mixer, padding_mask, recurrent_layers, register_mixer, state_bytes


class RunningMean(nn.Module):
    """The mean of the values of all tokens so far, times a gain; its state is their sum and number."""

    def __init__(self, config, layer_idx):
        super().__init__()
        g, p = config.num_key_value_heads, config.head_dim
        self.repeats = config.num_attention_heads // g
        self.values = nn.Linear(config.hidden_size, g * p)
        self.out = nn.Linear(config.num_attention_heads * p, config.hidden_size, bias=False)
        self.gain = nn.Parameter(torch.empty(1))

    def reset_new_parameters(self):
        nn.init.constant_(self.gain, 0.5)

    def forward(self, x, rope, layout, cache_layer=None):
        b, t, _ = x.shape
        before = None if cache_layer is None else cache_layer.load()[1]
        if isinstance(layout, TextStep):
            mask = layout.mask
        else:
            mask = torch.zeros(b * t, dtype=torch.long).index_fill(0, next(iter(layout.orders.values())), 1).view(b, t)
        mask = x.new_ones(b, t, 1) if mask is None else mask.view(b, t, 1).to(x.dtype)
        values = torch.cat([self.values(x), torch.ones_like(x[..., :1])], dim=-1) * mask
        sums = values.cumsum(1) + (0 if before is None else before[:, None])
        if cache_layer is not None:
            cache_layer.store(None, sums[:, -1], b)
        mean = (sums[..., :-1] / sums[..., -1:].clamp_min(1)).repeat_interleave(self.repeats, -1)
        return self.gain * self.out(mean)


@pytest.fixture
def running_mean():
    register_mixer(
        "running_mean",
        Mixer(
            module=RunningMean,
            from_teacher={"q_proj": (), "k_proj": (), "v_proj": ("values",), "o_proj": ("out",)},
            recurrent=True,
            state_shapes=lambda config: {"state": (config.num_key_value_heads * config.head_dim + 1,)},
            flops_per_token=lambda config, past=0: 2 * config.hidden_size * (2 + 4) * config.head_dim,
        ),
    )
    yield
    LAYER_TYPES.remove("running_mean")
    for registry in (MIXERS, DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING):
        del registry["running_mean"]


KINDS = ["running_mean", "m_mate", "running_mean", "full_attention"]


@torch.no_grad()
@pytest.mark.parametrize("layer_types", [KINDS, ["running_mean"] * 4], ids=["mixed", "alone"])
def test_a_further_mixer_runs_decodes_and_trains(running_mean, layer_types):
    model = tiny.model(layer_types=layer_types)
    sample, other = tiny.Sample(3, ("image", 2, 3), 7), tiny.Sample(5, seed=8)
    expected = model(**tiny.batch(sample), use_cache=False).logits[0]
    for cache in (None, StaticCache(config=model.config.get_text_config(), max_cache_len=len(sample))):
        logits = []
        for start, end in ((0, len(sample) - 2), (len(sample) - 2, len(sample) - 1), (len(sample) - 1, len(sample))):
            out = model(**tiny.cut(sample, start, end), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[0])
        torch.testing.assert_close(torch.cat(logits), expected)
    inputs = tiny.batch(sample, other, padding="left")
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "suppress_tokens": [60, 61, 62, 63]}
    together = model.generate(**inputs, **how)[0, -4:]
    assert together.tolist() == model.generate(**tiny.batch(sample), **how)[0, -4:].tolist()
    with torch.enable_grad():
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gains = [parameter.grad for name, parameter in model.named_parameters() if name.endswith("mixer.gain")]
    assert len(gains) == layer_types.count("running_mean") and all(grad.abs() > 0 for grad in gains)


@pytest.mark.extras
def test_a_further_mixer_converts(running_mean, tmp_path):
    teacher = make_teacher(tmp_path / "teacher")
    text = LinMUTextConfig.__post_init__

    def with_running_mean(self, **kwargs):
        text(self, **kwargs)
        self.layer_types = [kind if kind == "full_attention" else "running_mean" for kind in self.layer_types]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinMUTextConfig, "__post_init__", with_running_mean)
        report = convert(str(tmp_path / "teacher"), str(tmp_path / "student"), keep_attention=[1])
    assert report.layers_replaced == [0, 2, 3]
    student = LinMUForConditionalGeneration.from_pretrained(tmp_path / "student")
    mixer, attention = (m.model.language_model.layers[2] for m in (student, teacher))
    assert torch.equal(mixer.mixer.values.weight, attention.self_attn.v_proj.weight)
    assert torch.equal(mixer.mixer.out.weight, attention.self_attn.o_proj.weight) and mixer.mixer.gain == 0.5
    name = "model.language_model.layers.2.mixer.gain"
    assert is_new(name, student.config)
    assert map_teacher_key("model.layers.2.self_attn.q_proj.weight", student.config) == []


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"bc_feature_map": None}], ids=str)
def test_the_contract_is_what_a_layer_does(options):
    """State in the cache and matrix products of a decode step, per layer; gates and vision have no part in it."""
    for layer_type, mixer in MIXERS.items():
        model = tiny.model(layer_types=[layer_type] * 4, **options).model.language_model
        model.config._attn_implementation = "eager"  # the counter does not see into others
        cache = DynamicCache(config=model.config)
        for past in (0, 1, 2):
            with FlopCounterMode(display=False) as counter:
                model(input_ids=torch.tensor([[7 + past]]), past_key_values=cache, use_cache=True)
        layer = cache.layers[0]
        if mixer.recurrent:
            held = {"state": layer.recurrent_states[0], **layer.slots}
            shapes = {name: tuple(tensor[0].shape) for name, tensor in held.items()}
        else:
            shapes = {name: tuple(getattr(layer, name)[0, :, 0].shape) for name in ("keys", "values")}
        assert shapes == mixer.state_shapes(model.config)
        counted = sum(sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith(".mixer"))
        assert counted == 4 * mixer.flops_per_token(model.config, past=3), layer_type


@torch.no_grad()
@pytest.mark.parametrize("length", [3, 40])
def test_the_state_takes_the_bytes_that_are_said(length):
    model = tiny.model(layer_types=["m_mate", "full_attention", "m_mate", "m_mate"]).float().model.language_model
    cache = model(input_ids=torch.ones(2, length, dtype=torch.long), use_cache=True).past_key_values
    layers = [layer for layer in cache.layers if isinstance(layer, MMateCacheLayer)]
    held = [tensor for layer in layers for tensor in (layer.recurrent_states[0], *layer.slots.values())]
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) == 2 * state_bytes(model.config, itemsize=4)


def test_masks_by_layer_type():
    mask = torch.ones(1, 2)
    assert recurrent_layers(["full_attention", "m_mate", "m_mate"]) == [1, 2]
    assert padding_mask({"full_attention": None, "m_mate": mask}) is mask and padding_mask(mask) is mask
    assert padding_mask({"full_attention": mask}) is None and padding_mask(None) is None
