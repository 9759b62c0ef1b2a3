"""Invariants 2 and 5: forward = prefill + decode = chunks = padded = reordered, and a state that does not grow."""

import copy

import pytest
import tiny
import torch
from transformers import DynamicCache, StaticCache

from linmu_hf.ops.backends import use_kernels


SAMPLES = {
    "text": tiny.Sample(21),
    "image": tiny.Sample(3, ("image", 3, 5), 12),
    "video longer than wide": tiny.Sample(2, ("video", 5, 2, 3), 9),
    "many": tiny.Sample(1, ("image", 2, 3), 2, ("video", 3, 3, 2), 1, ("image", 1, 4), ("image", 4, 1), 6),
}
OPTIONS = {
    "default": {},
    "paper-like": {
        "scan_rope": False, "bc_feature_map": None, "output_norm": "layer_norm",
    },
    "no convolution": {"conv_kernel": 1},
    "wide convolution": {"conv_kernel": 9, "gate": "channel"},
    "hybrid": {"layer_types": ["m_mate", "full_attention", "m_mate", "full_attention"]},
    "attention first": {"layer_types": ["full_attention", "m_mate", "m_mate", "m_mate"]},
    "all attention": {"layer_types": ["full_attention"] * 4},
}  # fmt: skip
CLOSE = {"atol": 2e-5, "rtol": 0}  # the vision tower and rotary tables of Transformers compute in float32

all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
all_samples = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)


def whole(model, sample):
    return model(**tiny.batch(sample), use_cache=False).logits


def in_chunks(model, sample, borders, cache=None):
    """Logits of a sample fed in chunks that end at the borders, each with the pixels and grids of its own media."""
    logits = []
    for start, end in zip([0, *borders], [*borders, len(sample)]):
        outputs = model(**tiny.cut(sample, start, end), past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    return torch.cat(logits, 1), cache


@torch.no_grad()
@all_options
@all_samples
def test_prefill_and_decode(sample, options):
    model = tiny.model(**options)
    tail = 5
    borders = [len(sample) - i for i in range(tail, 0, -1)]
    logits, _ = in_chunks(model, sample, borders)
    torch.testing.assert_close(logits, whole(model, sample), **CLOSE)


@torch.no_grad()
@all_options
def test_chunks_between_spans(options):
    model, sample = tiny.model(**options), SAMPLES["many"]
    logits, _ = in_chunks(model, sample, sample.cuts[:-1])
    torch.testing.assert_close(logits, whole(model, sample), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", [("image", 2, 3), ("video", 4, 2, 1)], ids=["image", "video"])
def test_a_chunk_may_end_with_the_last_vision_token(kind):
    model, sample = tiny.model(), tiny.Sample(2, kind, 5)
    end_of_span = sample.cuts[1] - 1
    logits, _ = in_chunks(model, sample, [3, end_of_span, end_of_span + 1])
    torch.testing.assert_close(logits, whole(model, sample), **CLOSE)


def test_a_chunk_that_cuts_a_span_is_refused():
    model, sample = tiny.model(), SAMPLES["image"]
    inputs = tiny.batch(sample)
    inputs["input_ids"], inputs["mm_token_type_ids"] = inputs["input_ids"][:, :10], inputs["mm_token_type_ids"][:, :10]
    inputs["attention_mask"] = inputs["attention_mask"][:, :10]
    with pytest.raises(
        ValueError, match=r"the prompt has 6 image tokens but image_grid_thw describes 15 \(1 images\)"
    ):
        model(**inputs)


def test_gradients_flow_through_chunks():
    model, sample = tiny.model(num_hidden_layers=2), SAMPLES["many"]
    parameters = dict(model.model.language_model.named_parameters())
    grads = []
    for logits in (whole(model, sample), in_chunks(model, sample, [*sample.cuts[:-1], len(sample) - 1])[0]):
        weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).double()
        grads.append(torch.autograd.grad((logits * weight).sum(), parameters.values()))
    for name, expected, actual in zip(parameters, *grads):
        torch.testing.assert_close(actual, expected, atol=1e-4 * float(expected.abs().max() + 1e-3), rtol=0, msg=name)


@torch.no_grad()
@all_options
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding(padding, options):
    model = tiny.model(**options)
    inputs = tiny.batch(*SAMPLES.values(), padding=padding)
    logits = model(**inputs, use_cache=False).logits
    for row, sample in enumerate(SAMPLES.values()):
        real = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(logits[row, real][None], whole(model, sample), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("options", [OPTIONS["default"], OPTIONS["hybrid"]], ids=["default", "hybrid"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_rows_of_padding_alone_keep_their_state(padding, options):
    """A padded batch in chunks: in some of them a short row has nothing but padding."""
    model, samples = tiny.model(**options), (SAMPLES["image"], tiny.Sample(4, seed=3), tiny.Sample(2, seed=4))
    inputs = tiny.batch(*samples, padding=padding)
    cache, logits, t = DynamicCache(config=model.config.text_config), [], inputs["input_ids"].shape[1]
    media = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    for start, end in [(0, 3), (3, 20), (20, 24), (24, 26), (26, t)]:
        outputs = model(
            input_ids=inputs["input_ids"][:, start:end], attention_mask=inputs["attention_mask"][:, :end],
            past_key_values=cache, **(media if start == 3 else {}),
        )  # fmt: skip
        logits.append(outputs.logits)
    logits = torch.cat(logits, 1)
    step = torch.tensor([[7], [8], [9]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(step)], 1)
    after = model(input_ids=step, attention_mask=mask, past_key_values=cache).logits
    for row, sample in enumerate(samples):
        real = inputs["attention_mask"][row].bool()
        longer = tiny.Sample(*sample.parts, seed=[0, 3, 4][row])
        longer.ids.append(int(step[row]))
        expected = whole(model, longer)
        torch.testing.assert_close(torch.cat([logits[row, real], after[row]])[None], expected, **CLOSE)


UNEQUAL = tiny.Sample(1, ("image", 2, 5), 2), tiny.Sample(9), tiny.Sample(2, ("video", 4, 1, 3), 1)


def after(model, sample, steps):
    """Logits of the last of some tokens after a sample, by one forward pass."""
    return whole(model, tiny.extended(sample, steps))[:, -1]


def read_unequal(model, cache=None):
    """The three samples as a left-padded batch: the cache, and a function that reads a token of every row."""
    inputs = tiny.batch(*UNEQUAL, padding="left")
    cache = model(**inputs, past_key_values=cache, use_cache=True).past_key_values
    return cache, inputs["attention_mask"]


@torch.no_grad()
@all_options
def test_reordered_selected_and_repeated_cache(options):
    """Rows whose positions are at different distances from the number of their tokens."""
    model, rows = tiny.model(**options), [0, 1, 2]
    cache, mask = read_unequal(model)
    for change, rows in (
        (lambda: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda: cache.reorder_cache(torch.tensor([5, 0, 2, 3, 1, 4])), [2, 0, 1, 1, 0, 2]),
        (lambda: cache.batch_select_indices(torch.tensor([3, 0, 1, 4])), [1, 2, 0, 0]),
    ):
        change()
        steps = torch.arange(5, 5 + len(rows))[:, None]
        now = copy.deepcopy(cache)
        grown = torch.cat([mask[rows], torch.ones_like(steps)], 1)
        logits = model(input_ids=steps, attention_mask=grown, past_key_values=now).logits[:, -1]
        for row, source in enumerate(rows):
            expected = after(model, UNEQUAL[source], steps[row].tolist())
            torch.testing.assert_close(logits[row : row + 1], expected, **CLOSE)


@torch.no_grad()
@all_options
@pytest.mark.parametrize("length", [1, 3])
def test_a_given_cache_is_used_whatever_use_cache_says(length, options):
    model = tiny.model(**options)
    cache, mask = read_unequal(model)
    steps = torch.arange(3 * length).view(3, length) + 5
    mask = torch.cat([mask, torch.ones_like(steps)], 1)
    logits = model(input_ids=steps, attention_mask=mask, past_key_values=cache, use_cache=False).logits[:, -1:]
    assert cache.get_seq_length() == mask.shape[1]
    for row, sample in enumerate(UNEQUAL):
        expected = after(model, sample, steps[row].tolist())
        torch.testing.assert_close(logits[row], expected, **CLOSE)


@torch.no_grad()
@all_options
def test_a_cache_is_used_again_after_reset(options):
    """Nothing of the rows before is left, neither state nor position."""
    model, text = tiny.model(**options), tiny.Sample(2)
    cache = StaticCache(config=model.config.text_config, max_cache_len=40)
    read_unequal(model, cache)
    cache.reset()
    ids = torch.tensor([text.ids] * 3)
    for token in ids.split(1, dim=1):  # token by token: nothing but the reset says that this is a beginning
        logits = model(input_ids=token, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(logits, whole(model, text)[:, -1].expand(3, -1), **CLOSE)


def test_a_cache_and_checkpointed_training():
    """A layer that runs again for its gradient would read its tokens twice; without gradients nothing runs again."""
    model, sample = tiny.model(num_hidden_layers=2).train(), SAMPLES["text"]
    tiny.checkpoint(model)
    with torch.no_grad():
        logits, cache = in_chunks(model, sample, [5, 20])
        torch.testing.assert_close(logits, whole(model, sample), **CLOSE)
    with pytest.raises(ValueError, match=r"trains with gradient checkpointing.*no_grad"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


@torch.no_grad()
@all_options
def test_prefill_with_positions_alone(options):
    """Positions say where tokens are, not which of them make up an image: that is derived all the same."""
    model, inputs = tiny.model(**options), tiny.batch(*UNEQUAL, padding="left")
    where = {name: value for name, value in inputs.items() if "pixel" not in name}
    positions, layout = model.model.get_positions(**where)
    expected = model(**inputs).logits[:, -1:]
    for given in ({"position_ids": positions}, {"position_ids": positions, "vision_layout": layout}, {}):
        logits = model.prefill(**inputs, **given, chunk_size=4).logits
        torch.testing.assert_close(logits, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("options", [OPTIONS["default"], OPTIONS["hybrid"]], ids=["default", "hybrid"])
def test_static_cache(options):
    model, sample = tiny.model(**options), SAMPLES["many"]
    cache = StaticCache(config=model.config.text_config, max_cache_len=len(sample) + 3)
    logits, _ = in_chunks(model, sample, [*sample.cuts[:-1], len(sample) - 2], cache)
    torch.testing.assert_close(logits, whole(model, sample), **CLOSE)
    cache.reset()
    again, _ = in_chunks(model, sample, [*sample.cuts[:-1], len(sample) - 2], cache)
    torch.testing.assert_close(again, logits)


@torch.no_grad()
def test_state_is_constant_in_the_number_of_tokens():
    model = tiny.model()

    def elements(cache):
        states = [
            state for layer in cache.layers for state in (layer.conv_states[0], layer.recurrent_states[0], layer.keys)
        ]
        return sum(0 if state is None else state.untyped_storage().nbytes() for state in states)

    sizes = []
    for t in (1, 10, 200):
        cache = model(**tiny.batch(tiny.Sample(t))).past_key_values
        for _ in range(3):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        assert cache.get_seq_length() == t + 3
        sizes.append(elements(cache))
    s, p, k, width = 4, 8 + 1, 24, 4
    per_layer = s * p * k + (width - 1) * (4 + 2 + 2) * 8
    assert sizes == [4 * per_layer * 8] * 3  # layers x elements x bytes of float64


@torch.no_grad()
def test_states_are_float32_in_a_half_precision_model():
    model = tiny.model().bfloat16()
    cache = model(**tiny.batch(tiny.Sample(5), dtype=torch.bfloat16)).past_key_values
    assert {layer.recurrent_states[0].dtype for layer in cache.layers} == {torch.float32}
    assert {layer.conv_states[0].dtype for layer in cache.layers} == {torch.bfloat16}


@torch.no_grad()
def test_an_earlier_answer_does_not_change_when_an_image_follows():
    model = tiny.model()
    before, after = tiny.Sample(3, ("image", 3, 5), 6), tiny.Sample(3, ("image", 3, 5), 6, ("image", 2, 2), 4)
    torch.testing.assert_close(whole(model, after)[:, : len(before)], whole(model, before), **CLOSE)


def test_crop_is_refused():
    cache = tiny.model()(input_ids=torch.tensor([[1, 2, 3]])).past_key_values
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.crop(1)


def test_heads_of_a_published_model():
    """Heads of 128 and states of 256, as a 7B teacher has them: chunks and single tokens against the recurrence."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    sizes = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "state_size": 256}
    model = tiny.model(num_hidden_layers=2, rope_parameters=rope, **sizes)
    sample = tiny.Sample(9, ("image", 3, 4), 7, ("video", 2, 2, 3), 8)
    with torch.no_grad():
        with use_kernels(ssd="recurrence"):
            expected = model(**tiny.batch(sample), use_cache=False).logits
        torch.testing.assert_close(whole(model, sample), expected, atol=1e-10, rtol=0)
        logits, _ = in_chunks(model, sample, (30, *range(len(sample) - 4, len(sample))))
        torch.testing.assert_close(logits, expected, **CLOSE)
