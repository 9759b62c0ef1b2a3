"""Malformed calls: each is refused with an error that names the argument and a remedy, or gives the right answer."""

import functools
import os
import re

import pytest
import tiny
import tiny_nvila
import torch
from corruptions import CORRUPTIONS, Call
from hypothesis import given, settings
from hypothesis import strategies as st


# The same examples every time; with LINMU_RANDOM=1 new ones are drawn, and a failure prints what repeats it.
DRAWN = {"deadline": None, "database": None, "derandomize": "LINMU_RANDOM" not in os.environ, "print_blob": True}

BASES = {
    "text": ((tiny.Sample(9),), "right"),
    "texts": ((tiny.Sample(9), tiny.Sample(5, seed=1)), "left"),
    "image": ((tiny.Sample(2, ("image", 2, 3), 4),), "right"),
    "images": ((tiny.Sample(2, ("image", 2, 3), 1, ("image", 1, 4), 3), tiny.Sample(4, seed=1)), "right"),
    "video": ((tiny.Sample(2, ("video", 3, 2, 2), 4), tiny.Sample(1, ("video", 2, 1, 3), 2, seed=1)), "left"),
    "both": ((tiny.Sample(1, ("image", 2, 2), 2, ("video", 2, 2, 1), 3),), "right"),
}
NVILA_BASES = {
    "NVILA text": ((tiny_nvila.Sample(9), tiny_nvila.Sample(5, seed=1)), "left"),
    "NVILA images": (
        (tiny_nvila.Sample(2, ("image", 2, 3), 3), tiny_nvila.Sample(1, ("image", 1, 1), ("image", 1, 1), 2, seed=1)),
        "right",
    ),
    "NVILA video": ((tiny_nvila.Sample(2, ("video", 3), 4), tiny_nvila.Sample(1, ("video", 1), 2, seed=1)), "left"),
    "NVILA both": ((tiny_nvila.Sample(1, ("image", 2, 2), 2, ("video", 2), 3),), "right"),
}
LITE_BASES = {
    "Lite images": (
        (tiny_nvila.LiteSample(1, ("image", 2, 1), 3), tiny_nvila.LiteSample(1, ("image", 1, 1), 2, seed=1)),
        "left",
    ),
    "Lite both": ((tiny_nvila.LiteSample(1, ("image", 1, 2), 2, ("video", 2), 3),), "right"),
}
HYBRID = {"num_hidden_layers": 2, "layer_types": ["full_attention", "m_mate"]}
MODELS = {
    "m_mate": (tiny, {"num_hidden_layers": 2}, BASES),
    "hybrid": (tiny, HYBRID, BASES),
    "NVILA": (tiny_nvila, HYBRID, NVILA_BASES),
    "NVILA-Lite": (tiny_nvila, {"num_hidden_layers": 2, "vision": tiny_nvila.LITE}, LITE_BASES),
}
REMEDY = re.compile(r"\b(pass|leave|use|must|cast|look)\b")


@functools.cache
def model(name):
    family, options, _ = MODELS[name]
    return family.plain(**options)


def base_inputs(name):
    samples, padding = (BASES | NVILA_BASES | LITE_BASES)[name]
    return tiny.batch(*samples, padding=padding, dtype=torch.float32)


@functools.cache
@torch.no_grad()
def base_logits(model_name, base):
    return model(model_name)(**base_inputs(base)).logits


@functools.cache
def base_token(model_name, base):
    return model(model_name).generate(**base_inputs(base), max_new_tokens=1, do_sample=False)[:, -1]


def corrupted(data, through_generate):
    """A call with one or two corruptions of different arguments, and the names of its model and base."""
    name = data.draw(st.sampled_from(sorted(MODELS)))
    names = name, data.draw(st.sampled_from(sorted(MODELS[name][2])))
    call = Call(model(names[0]), base_inputs(names[1]))
    kinds, done = {kind for kind, *_ in call.kinds()}, set()
    for _ in range(data.draw(st.integers(1, 2))):
        able = [
            name
            for name, (arguments, _, media, generate) in CORRUPTIONS.items()
            if not arguments & done and (media is None or kinds & set(media)) and (generate or not through_generate)
        ]
        if not able:
            break
        name = data.draw(st.sampled_from(able))
        done |= CORRUPTIONS[name][0]
        CORRUPTIONS[name][1](call, data.draw)
    return call, names


def refuses(call, run):
    with pytest.raises((ValueError, TypeError)) as error:
        run(**call.inputs)
    message = str(error.value)
    assert any(name in message for name in call.names), f"{message!r} names none of {call.names}"
    assert REMEDY.search(message), f"{message!r} offers no remedy"


@settings(max_examples=1200, **DRAWN)
@given(st.data())
@torch.no_grad()
def test_forward(data):
    call, names = corrupted(data, through_generate=False)
    if call.names:
        return refuses(call, call.model)
    logits = call.model(**call.inputs).logits
    real = base_inputs(names[1])["attention_mask"].bool()
    torch.testing.assert_close(logits[real], base_logits(*names)[real], rtol=1e-4, atol=1e-4)


@settings(max_examples=300, **DRAWN)
@given(st.data())
def test_generate(data):
    call, names = corrupted(data, through_generate=True)
    run = functools.partial(call.model.generate, max_new_tokens=1, do_sample=False)
    if call.names:
        return refuses(call, run)
    assert torch.equal(run(**call.inputs)[:, -1], base_token(*names))
