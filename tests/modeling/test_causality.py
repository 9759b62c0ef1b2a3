"""Invariant 1: which token sees which. Perturb one token and look at which outputs move; then ask the gradients."""

import pytest
import tiny
import torch
from perturbation import layer_function, moved

from linmu_hf.modeling.configuration_linmu import PRESETS


# text, an image and a video whose sides no window divides, text, and a second image
PARTS = (3, ("image", 3, 5), 2, ("video", 3, 3, 2), 3, ("image", 1, 4), 1)
OPTIONS = {
    "default": {},
    "wrapped windows": {"window_wrap": True},
    "other options": {
        "gate": "channel", "scan_rope": False, "bc_feature_map": None, "output_norm": "layer_norm",
    },
    "no convolution": {"conv_kernel": 1, "output_norm": "layer_norm"},
    "hybrid": {"layer_types": ["m_mate", "full_attention", "m_mate", "m_mate"]},
}  # fmt: skip


def positions_of(*samples, padding="right"):
    """Rotary positions, vision layout and mask of a batch of samples."""
    inputs = tiny.batch(*samples, padding=padding)
    where = {name: value for name, value in inputs.items() if "pixel" not in name}
    positions, layout = tiny.model(num_hidden_layers=1).model.get_positions(**where)
    return positions, layout, inputs["attention_mask"]


def visible(layout, mask):
    """[t, t]: whether a row may see a column. Text: what is not after it. Vision: what is not after its span."""
    t = len(mask)
    order = torch.arange(t)
    same_span = (layout[:, None, 0] == layout[None, :, 0]) & (layout[:, 0] >= 0)
    return ((order[:, None] >= order[None]) | same_span) & mask.bool() & mask.bool()[:, None]


def gradients(function, embeds):
    """[t, t]: the size of the gradient of (a random functional of) each output row at each input row."""
    embeds = embeds.clone().requires_grad_()
    outputs = function(embeds)
    weight = torch.randn_like(outputs)
    rows = [
        torch.autograd.grad((outputs[0, i] * weight[0, i]).sum(), embeds, retain_graph=True)[0][0]
        for i in range(embeds.shape[1])
    ]
    return torch.stack(rows).abs().amax(-1)


def model_function(positions, layout, mask, **options):
    model = tiny.model(**options).model.language_model

    def function(x):
        b = len(x)
        return model(
            inputs_embeds=x, attention_mask=mask.expand(b, -1), position_ids=positions.expand(3, b, -1),
            vision_layout=layout.expand(b, -1, -1), use_cache=False,
        ).last_hidden_state  # fmt: skip

    return function


def check(function, allowed, mask):
    real = mask.bool()
    embeds = torch.randn(1, len(mask), 32, dtype=torch.float64)
    for effect in (moved(function, embeds), gradients(function, embeds)):
        effect = effect[real]
        assert effect[~allowed[real]].max() < 1e-12, "a row sees what it must not see"
        assert effect[allowed[real]].min() > 1e-12, "a row does not see what it should see"


@pytest.mark.parametrize("padding", [0, 4], ids=["unpadded", "left padded"])
@pytest.mark.parametrize("layer_idx", range(4))
def test_layer(layer_idx, padding):
    sample = tiny.Sample(*PARTS)
    inputs = tiny.batch(sample, padding="left", length=len(sample) + padding)
    where = {name: value for name, value in inputs.items() if "pixel" not in name}
    positions, layout = tiny.model(num_hidden_layers=1).model.get_positions(**where)
    mask = inputs["attention_mask"]
    check(layer_function(layer_idx, positions, layout, mask), visible(layout[0], mask[0]), mask[0])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_model(options):
    positions, layout, mask = positions_of(tiny.Sample(*PARTS))
    check(model_function(positions, layout, mask, **options), visible(layout[0], mask[0]), mask[0])


@pytest.mark.parametrize("order", ["thw", "twh", "hwt", "wht"])
def test_model_of_one_scan_order(order):
    positions, layout, mask = positions_of(tiny.Sample(*PARTS))
    function = model_function(positions, layout, mask, scan_orders=[order], num_hidden_layers=2)
    check(function, visible(layout[0], mask[0]), mask[0])


def seen_over_the_sequence(layout, mask, layers):
    """
    [t, t]: Eq. 2 to the letter: a vision row sees later vision rows too, and the text before them that lets their
    state decay; the next layer sees what these saw.
    """
    vision, order = layout[:, 0] >= 0, torch.arange(len(mask))
    once = (order[:, None] >= order[None]) | (vision[:, None] & (order <= vision.nonzero().max()))
    return torch.linalg.matrix_power(once.double(), layers).bool()


@pytest.mark.parametrize("options", [{"reverse_scope": "sequence"}, PRESETS["paper"] | tiny.WINDOWS], ids=str)
@pytest.mark.parametrize("layers", [1, 2])
def test_reverse_scope_sequence(layers, options):
    positions, layout, mask = positions_of(tiny.Sample(*PARTS))
    for first in range(4) if layers == 1 else ():
        function = layer_function(first, positions, layout, mask, **options)
        check(function, seen_over_the_sequence(layout[0], mask[0], 1), mask[0])
    function = model_function(positions, layout, mask, **options, num_hidden_layers=layers)
    check(function, seen_over_the_sequence(layout[0], mask[0], layers), mask[0])


@pytest.mark.parametrize("padding", ["left", "right"])
def test_rows_of_a_batch_and_padding_do_not_mix(padding):
    samples = (
        tiny.Sample(2, ("video", 3, 2, 3), 2),
        tiny.Sample(4),
        tiny.Sample(1, ("image", 2, 3), ("image", 3, 1), 6),
    )
    positions, layout, mask = positions_of(*samples, padding=padding)
    model = tiny.model().model.language_model
    b, t = mask.shape
    embeds = torch.randn(b, t, 32, dtype=torch.float64, requires_grad=True)
    outputs = model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, vision_layout=layout, use_cache=False
    ).last_hidden_state
    for row in range(b):
        grad = torch.autograd.grad(outputs[row][mask[row].bool()].sum(), embeds, retain_graph=True)[0].abs().amax(-1)
        expected = torch.zeros(b, t, dtype=torch.bool)
        expected[row] = mask[row].bool()
        assert torch.equal(grad > 0, expected)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_nan_in_padding_does_not_leak(padding):
    samples = tiny.Sample(2, ("video", 3, 2, 3), 2), tiny.Sample(4)
    positions, layout, mask = positions_of(*samples, padding=padding)
    model = tiny.model().model.language_model
    embeds = torch.randn(*mask.shape, 32, dtype=torch.float64)
    embeds[mask == 0] = torch.nan
    outputs = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, vision_layout=layout)
    assert outputs.last_hidden_state[mask.bool()].isfinite().all()
    for layer in outputs.past_key_values.layers:
        assert layer.recurrent_states[0].isfinite().all() and layer.conv_states[0].isfinite().all()


def test_separators_inside_a_span_stay_in_place():
    """A span with a text token after each frame: vision rows see the whole span, separators carry the forward scan."""
    frames, height, width, t = 3, 2, 2, 18
    layout = torch.full((1, t, 4), -1)
    place = 2
    for frame in range(frames):
        for y in range(height):
            for x in range(width):
                layout[0, place] = torch.tensor([0, frame, y, x])
                place += 1
        place += 1  # a separator
    positions, mask = torch.arange(t).expand(3, 1, t), torch.ones(1, t, dtype=torch.long)
    vision = layout[0, :, 0] >= 0
    order = torch.arange(t)
    for layer_idx in range(4):
        function = layer_function(layer_idx, positions, layout, mask)
        effect = moved(function, torch.randn(1, t, 32, dtype=torch.float64)) > 1e-12
        assert effect[vision][:, vision].all()
        text = ~vision
        assert torch.equal(effect[text][:, text], (order[:, None] >= order[None])[text][:, text])
        last = int(vision.nonzero().max())
        assert effect[last + 1 :, : last + 1].all()  # what follows the span sees all of it
        assert not effect[:last, last + 1 :].any()  # and nothing of the span sees what follows it
