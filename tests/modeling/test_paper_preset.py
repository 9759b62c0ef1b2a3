"""The preset `paper`, whose reverse scan covers all vision tokens of a sequence: every path is the plain forward."""

import pytest
import tiny
import torch

from linmu_hf.modeling.configuration_linmu import PRESETS


SAMPLES = {
    "an image in the middle": tiny.Sample(4, ("image", 3, 5), 9),
    "a video in the middle": tiny.Sample(2, ("video", 3, 2, 2), 7),
    "several": tiny.Sample(1, ("image", 2, 3), 3, ("video", 2, 3, 2), 1, ("image", 1, 4), 6),
}
COMPANY = tiny.Sample(2, ("image", 2, 2), 3, seed=7), tiny.Sample(11, seed=8)


@pytest.fixture(scope="module", params=["paper", "paper with softmax features"])
def model(request):
    features = {"bc_feature_map": "softmax"} if "softmax" in request.param else {}
    return tiny.model(**PRESETS["paper"] | tiny.WINDOWS | features)


@pytest.fixture(params=SAMPLES.values(), ids=SAMPLES)
def sample(request):
    return request.param


@pytest.fixture
def expected(model, sample):
    with torch.no_grad():
        return model(**tiny.batch(sample), use_cache=False).logits[0]


def equal(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_prefill_and_decode(model, sample, expected):
    last = sample.cuts[-2]  # all media are before it
    for first in range(last, len(sample)):
        cache, logits = None, []
        for start, end in ((0, first), (first, first + 1), (first + 1, len(sample))):
            if start < end:
                out = model(**tiny.cut(sample, start, end), past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                logits.append(out.logits[0])
        equal(torch.cat(logits), expected)


@torch.no_grad()
@pytest.mark.parametrize("chunk_size", [1, 5, 16])
def test_chunked_prefill(model, sample, expected, chunk_size):
    equal(model.prefill(**tiny.batch(sample), chunk_size=chunk_size).logits[0, -1], expected[-1])


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padded(model, sample, expected, padding):
    inputs = tiny.batch(COMPANY[0], sample, COMPANY[1], padding=padding)
    equal(model(**inputs, use_cache=False).logits[1][inputs["attention_mask"][1].bool()], expected)


@torch.no_grad()
def test_packed(model, sample, expected):
    together = (COMPANY[0], sample, COMPANY[1])
    row = {name: value for name, value in tiny.batch(*together).items() if "pixel" in name or "grid" in name}
    bounds = torch.tensor([0, *map(len, together)]).cumsum(0).int()
    ids = torch.tensor([[token for one in together for token in one.ids]])
    equal(model(input_ids=ids, **row, cu_seq_lens_q=bounds).logits[0, bounds[1] : bounds[2]], expected)


@torch.no_grad()
def test_what_follows_the_last_medium_does_not_reach_back(model, sample, expected):
    """Perturb the text after the last image or video: nothing before it moves."""
    inputs, last = tiny.batch(sample), sample.cuts[-2]
    inputs["input_ids"][0, last:] = 1 + inputs["input_ids"][0, last:] % 40
    logits = model(**inputs, use_cache=False).logits[0]
    equal(logits[:last], expected[:last])
    assert (logits[last:] - expected[last:]).abs().amax(-1).min() > 1e-3
