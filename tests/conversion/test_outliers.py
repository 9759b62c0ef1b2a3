"""Outlier channels in the biases of q and k, as real teachers have them, must not saturate softmax features."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import make_teacher

from linmu_hf import LinMUForConditionalGeneration
from linmu_hf.conversion.convert import convert
from linmu_hf.modeling.layout.token_layout import TokenLayout
from linmu_hf.modeling.mixers.flex_ma import LARGEST_BIAS, feature_scale, initial_feature_weight


HEAD_DIM, CHANNEL = 16, 6


@pytest.fixture(scope="module")
def students(processor, tmp_path_factory):
    """Students of one teacher whose every head of layer 1 but the first of k has an outlier, by (k, q) outlier."""
    found = {}
    for k, q in ((0.0, 0.0), (30.0, 10.0), (400.0, -40.0)):
        root = tmp_path_factory.mktemp("outliers")
        make_teacher(root / "teacher", processor=processor, shard=None)
        file = root / "teacher" / "model.safetensors"
        tensors = load_file(file)
        for name, value, first in (("k_proj", k, 1), ("q_proj", q, 0)):
            key = next(key for key in tensors if key.endswith(f"layers.1.self_attn.{name}.bias"))
            if value:
                tensors[key].view(-1, HEAD_DIM)[first:, CHANNEL] = value
        save_file(tensors, file, metadata={"format": "pt"})
        options = {"state_size": 2 * HEAD_DIM, "text_window": 0, "sink_tokens": 0}  # all text goes through the scan
        report = convert(str(root / "teacher"), str(root / "student"), mixer_options=options)
        model = LinMUForConditionalGeneration.from_pretrained(root / "student").eval()
        found[k, q] = model.model.language_model, report
    return found


def probe(text, layer_idx=1, t=40):
    """Gradient norms of layer 1's forward scan for a functional of its output, and its smallest normaliser."""
    generator = torch.Generator().manual_seed(3)
    mixer = text.layers[layer_idx].mixer
    u = torch.randn(1, t, text.config.hidden_size, generator=generator)
    rope = text.rotary_emb(u, torch.arange(t).expand(3, 1, t))
    layout = TokenLayout.build(text.config, 1, t, "cpu")
    direction = mixer.flex_ma.forward_scan
    parameters = [direction.b_proj.weight, direction.c_proj.weight, direction.b_features, direction.c_features]
    flex, _ = mixer.branches(u, rope, layout)
    grads = torch.autograd.grad((flex * torch.randn(flex.shape, generator=generator)).sum(), parameters)
    with torch.no_grad():
        grads = [grad[len(grad) // 2 :] for grad in grads]  # the first of the two groups of heads has no outlier in k
        return [float(grad.norm()) for grad in grads], mixer.smallest_normalizer(u, rope, layout)


@pytest.mark.parametrize("outliers", [(30.0, 10.0), (400.0, -40.0)], ids=str)
def test_gradients_stay_healthy(students, outliers):
    usual, usual_normalizer = probe(students[0.0, 0.0][0])
    text = copy.deepcopy(students[outliers][0])
    grads, normalizer = probe(text)
    assert all(grad > 0.25 * right for grad, right in zip(grads, usual)), (grads, usual)
    assert normalizer > 0.1 * usual_normalizer
    direction = text.layers[1].mixer.flex_ma.forward_scan
    with torch.no_grad():  # without the temperature
        weight = initial_feature_weight(HEAD_DIM, text.config.state_size // 2)
        for features in (direction.b_features, direction.c_features):
            features.copy_(weight.expand_as(features))
    saturated, worse = probe(text)
    if outliers[0] == 30:
        assert saturated[0] < 0.1 * usual[0] and worse > normalizer  # one weight of 1: nothing to learn from
    else:
        assert worse < 1e-19  # below what the scan divides by at least


def test_only_the_outliers_are_scaled_and_reported(students):
    plain, report = students[0.0, 0.0]
    assert report.scaled_heads == {} and "scaled" not in str(report)
    weight = initial_feature_weight(HEAD_DIM, plain.config.state_size // 2)
    for layer in plain.layers:
        for scan in (layer.mixer.flex_ma.forward_scan, layer.mixer.flex_ma.reverse_scan):
            assert (scan.b_features == weight).all() and (scan.c_features == weight).all()
    text, report = students[400.0, -40.0]
    g, h = text.config.num_key_value_heads, text.config.num_attention_heads
    wanted = {f"layers.1 B head {i}": 400.0 for i in range(1, g)} | {f"layers.1 C head {i}": 40.0 for i in range(h)}
    assert report.scaled_heads == wanted
    assert "400 (layers.1 B head" in str(report)
    for scan in (text.layers[1].mixer.flex_ma.forward_scan, text.layers[1].mixer.flex_ma.reverse_scan):
        same = torch.ones(HEAD_DIM, dtype=torch.bool)
        same[[CHANNEL, CHANNEL + HEAD_DIM // 2]] = False  # rotated into each other
        assert (scan.b_features[0] == weight).all() and (scan.b_features[:, same] == weight[same]).all()
        for features, largest in ((scan.b_features[1:], 400), (scan.c_features, 40)):
            expected = (LARGEST_BIAS / largest * weight[CHANNEL]).expand(len(features), -1)
            torch.testing.assert_close(features[:, CHANNEL], expected, rtol=1e-3, atol=0)


def test_scale():
    bias = torch.tensor([[0.0, 3.0, 30.0, -2.9], [0.0, 3.0, -6.0, 4.0]])
    torch.testing.assert_close(feature_scale(bias, False), torch.tensor([[1, 1, 0.1, 1], [1, 1, 0.5, 0.75]]))
    torch.testing.assert_close(feature_scale(bias, True)[1], torch.tensor([0.5, 0.6, 0.5, 0.6]))
