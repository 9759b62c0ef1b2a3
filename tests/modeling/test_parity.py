"""
The parity matrix: every kind of input through every path, in fp32, against the plain forward pass of one sequence.

Every cell is recorded; the whole table goes to `runs/parity.json` (or where `LINMU_PARITY_JSON` says).
"""

import copy
import functools
import json
import os
import weakref
from pathlib import Path

import pytest
import tiny
import tiny_nvila
import torch
from transformers import DynamicCache, StaticCache


SAMPLES = {
    tiny: {
        "text": tiny.Sample(14),
        "image": tiny.Sample(3, ("image", 3, 5), 6),
        "several images": tiny.Sample(2, ("image", 2, 3), 1, ("image", 4, 1), ("image", 3, 3), 4),
        "video": tiny.Sample(2, ("video", 5, 2, 3), 5),
        "interleaved": tiny.Sample(1, ("image", 2, 3), 2, ("video", 3, 3, 2), 1, ("image", 1, 4), 5),
    },
    tiny_nvila: {
        "S2 image": tiny_nvila.Sample(3, ("image", 2, 3), 5),
        "video": tiny_nvila.Sample(2, ("video", 3), 4),
        "interleaved": tiny_nvila.Sample(1, ("image", 2, 2), 2, ("video", 2), 1, ("image", 1, 1), ("image", 1, 1), 4),
        "tiles": tiny_nvila.LiteSample(2, ("image", 2, 2), 4),
        "tiles and video": tiny_nvila.LiteSample(1, ("image", 1, 2), ("video", 2), 1, ("image", 1, 1), 3),
    },
}
HYBRID = {"layer_types": ["m_mate", "full_attention", "m_mate", "full_attention"]}
MODELS = {
    "default": (tiny, {}),
    "paper-like": (
        tiny,
        {
            "scan_rope": False, "bc_feature_map": None, "output_norm": "layer_norm", "gate": "channel",
            "text_window": 0, "sink_tokens": 0,
        },
    ),
    "hybrid": (tiny, HYBRID),
    "attention first, short spans": (tiny, {"layer_types": ["full_attention", *["m_mate"] * 3], "max_span_frames": 2}),
    "NVILA": (tiny_nvila, {}),
    "NVILA hybrid, short spans": (tiny_nvila, HYBRID | {"max_span_frames": 2}),
    "NVILA attention": (tiny_nvila, {"layer_types": ["full_attention"] * 4}),
    "NVILA-Lite": (tiny_nvila, {"vision": tiny_nvila.LITE}),
}  # fmt: skip
COMPANY = {  # other rows of the batch
    tiny.Sample: (tiny.Sample(3, ("image", 2, 2), 2, seed=7), tiny.Sample(19, seed=8)),
    tiny_nvila.Sample: (tiny_nvila.Sample(3, ("image", 1, 1), 2, seed=7), tiny_nvila.Sample(19, seed=8)),
    tiny_nvila.LiteSample: (tiny_nvila.LiteSample(3, ("image", 1, 2), 2, seed=7), tiny_nvila.LiteSample(19, seed=8)),
}
SPECIAL = [60, 61, 62, 63]
NEW = 4
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "suppress_tokens": SPECIAL}
BOUND, BFLOAT16_BOUND = 1e-4, 8e-2  # largest difference; for bf16 the norm of the difference over that of the logits

PATHS, CELLS = {}, []
FILE = Path(os.environ.get("LINMU_PARITY_JSON", "runs/parity.json"))


def path(name, *, bound=BOUND):
    """Registers a check: `(model, sample)` to the largest difference and, where tokens are decoded, if they agree."""

    def register(check):
        PATHS[name] = (check, bound)
        return check

    return register


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    if CELLS:
        FILE.parent.mkdir(parents=True, exist_ok=True)
        counts = {"cells": len(CELLS), "equal": sum(cell["equal"] for cell in CELLS)}
        FILE.write_text(
            json.dumps(counts | {"bound": BOUND, "bound_bf16": BFLOAT16_BOUND, "results": CELLS}, indent=1) + "\n"
        )


@pytest.fixture(scope="module")
def models():
    return {name: family.plain(**options) for name, (family, options) in MODELS.items()}


def fp32(*samples, **kwargs):
    return tiny.batch(*samples, dtype=torch.float32, **kwargs)


def once(truth):
    """What holds of a model and a sample of the table is found once, and not for every path."""
    found = weakref.WeakKeyDictionary()
    lasting = {id(sample) for samples in SAMPLES.values() for sample in samples.values()}

    @functools.wraps(truth)
    def known(model, sample):
        if id(sample) not in lasting:
            return truth(model, sample)
        of_model = found.setdefault(model, {})
        if id(sample) not in of_model:
            of_model[id(sample)] = truth(model, sample)
        return of_model[id(sample)]

    return known


@once
@torch.no_grad()
def plain(model, sample):
    """Logits of a sequence alone, [t, vocab]."""
    return model(**fp32(sample), use_cache=False).logits[0]


@once
def plain_greedy(model, sample):
    """The next tokens, each from a forward pass over everything before it."""
    new = []
    for _ in range(NEW):
        new.append(int(plain(model, tiny.extended(sample, new))[-1, : SPECIAL[0]].argmax()))
    return new


def new_tokens(output, inputs):
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def difference(actual, expected):
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max())


def pieces(sample, borders):
    """Inputs of a sample cut at the borders, in fp32."""
    for start, end in zip([0, *borders], [*borders, len(sample)]):
        inputs = tiny.cut(sample, start, end)
        yield {key: value.float() if "pixel" in key else value for key, value in inputs.items()}


@torch.no_grad()
def stepwise(model, sample, borders, cache, forward=None):
    logits = []
    for inputs in pieces(sample, borders):
        call = forward if forward is not None and inputs["input_ids"].shape[1] == 1 else model
        outputs = call(**inputs, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits[0])
    return torch.cat(logits)


@path("left pad")
@torch.no_grad()
def left_pad(model, sample, side="left"):
    inputs = fp32(COMPANY[type(sample)][0], sample, COMPANY[type(sample)][1], padding=side)
    logits = model(**inputs, use_cache=False).logits[1][inputs["attention_mask"][1].bool()]
    tokens = None
    if side == "left":
        tokens = new_tokens(model.generate(**inputs, **GREEDY), inputs)[1] == plain_greedy(model, sample)
    return difference(logits, plain(model, sample)), tokens


@path("right pad")
def right_pad(model, sample):
    return left_pad(model, sample, "right")


def packed_row(sample):
    """Three sequences one after another in a row, and where they begin."""
    together = (COMPANY[type(sample)][0], sample, COMPANY[type(sample)][1])
    inputs = fp32(*together)
    row = {key: value for key, value in inputs.items() if "pixel" in key or "grid" in key}
    row["input_ids"] = torch.tensor([[i for one in together for i in one.ids]])
    return row, torch.tensor([0, *(len(one) for one in together)]).cumsum(0), together


@path("packed, cu_seq_lens")
@torch.no_grad()
def packed_by_bounds(model, sample):
    row, bounds, _ = packed_row(sample)
    logits = model(**row, cu_seq_lens_q=bounds.int(), cu_seq_lens_k=bounds.int()).logits[0, bounds[1] : bounds[2]]
    return difference(logits, plain(model, sample)), None


@path("packed, position ids")
@torch.no_grad()
def packed_by_positions(model, sample):
    row, bounds, together = packed_row(sample)
    text = torch.cat([torch.arange(len(one)) for one in together])[None]
    expected = plain(model, sample)
    logits = model(**row, position_ids=text).logits[0, bounds[1] : bounds[2]]
    positions = []
    for one in together:
        where = {key: value for key, value in fp32(one).items() if "pixel" not in key}
        positions.append(model.model.get_positions(**where)[0])
    both = torch.cat([text[None], torch.cat(positions, -1)])
    again = model(**row, position_ids=both).logits[0, bounds[1] : bounds[2]]
    return max(difference(logits, expected), difference(again, expected)), None


@path("chunked prefill")
def chunked_prefill(model, sample):
    worst, tokens, expected = 0.0, True, plain(model, sample)[-1]
    for size in (1, 7, 1000):
        out = model.prefill(**fp32(sample), chunk_size=size)
        worst = max(worst, difference(out.logits[0, -1], expected))
        inputs = fp32(sample, COMPANY[type(sample)][1], padding="left")
        new = new_tokens(model.generate(**inputs, **GREEDY, prefill_chunk_size=size), inputs)[0]
        tokens &= new == plain_greedy(model, sample)
    logits = stepwise(model, sample, sample.cuts[:-1], None)
    return max(worst, difference(logits, plain(model, sample))), tokens


@path("prefill and decode")
def prefill_and_decode(model, sample):
    logits = stepwise(model, sample, [len(sample) - i for i in range(3, 0, -1)], None)
    inputs = fp32(sample)
    tokens = new_tokens(model.generate(**inputs, **GREEDY), inputs)[0]
    return difference(logits, plain(model, sample)), tokens == plain_greedy(model, sample)


@path("resume with a new image")
def resume(model, sample):
    first = model.generate(**fp32(sample), **GREEDY, return_dict_in_generate=True)
    answer = first.sequences[0, len(sample) :].tolist()
    everything = type(sample)(*sample.parts, 2, sample.another_image, 3)
    everything.ids[len(sample) : len(sample)] = answer
    past = int(first.past_key_values.get_seq_length())
    *_, inputs = pieces(everything, [past])
    with torch.no_grad():
        logits = model(**inputs, past_key_values=copy.deepcopy(first.past_key_values)).logits[0]
    worst = difference(logits, plain(model, everything)[past:])
    tokens = new_tokens(model.generate(**inputs, past_key_values=first.past_key_values, **GREEDY), inputs)[0]
    return worst, tokens == plain_greedy(model, everything)


@path("beams")
def beams(model, sample):
    inputs = fp32(COMPANY[type(sample)][1], sample, padding="left")
    how = GREEDY | {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0}
    out = model.generate(**inputs, **how, output_scores=True, return_dict_in_generate=True)
    worst = 0.0
    for new, score in list(zip(new_tokens(out.sequences, inputs), out.sequences_scores))[3:]:
        logits = plain(model, tiny.extended(sample, new))[len(sample) - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(len(new)), new].sum()
        worst = max(worst, float((score - expected).abs()))
    return worst, None


@path("num_return_sequences")
def return_sequences(model, sample):
    inputs = fp32(sample, COMPANY[type(sample)][0], padding="left")
    out = model.generate(
        **inputs, max_new_tokens=NEW, do_sample=True, num_return_sequences=2, eos_token_id=None,
        suppress_tokens=SPECIAL, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    worst = 0.0
    for i, new in enumerate(new_tokens(out.sequences, inputs)[:2]):
        expected = plain(model, tiny.extended(sample, new))[len(sample) - 1 : -1]
        worst = max(worst, difference(torch.stack(out.logits)[:, i], expected))
    return worst, None


@path("static cache")
def static_cache(model, sample):
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=len(sample) + NEW)
    logits = stepwise(model, sample, [*sample.cuts[:-1], len(sample) - 2, len(sample) - 1], cache)
    inputs = fp32(sample, COMPANY[type(sample)][1], padding="left")
    tokens = new_tokens(model.generate(**inputs, **GREEDY, cache_implementation="static"), inputs)[0]
    return difference(logits, plain(model, sample)), tokens == plain_greedy(model, sample)


@path("offloaded cache")
def offloaded_cache(model, sample):
    """Layers are moved away and fetched between all steps, as an offloading cache does it around every layer."""
    config = model.config.get_text_config()
    worst = 0.0
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=len(sample))):
        logits = []
        for inputs in pieces(sample, [*sample.cuts[:-1], len(sample) - 1]):
            for layer in cache.layers:
                if layer.is_initialized:
                    layer.offload()
                    layer.prefetch()
            logits.append(model(**inputs, past_key_values=cache, use_cache=True).logits[0])
        worst = max(worst, difference(torch.cat(logits).detach(), plain(model, sample)))
    tokens = None
    if "full_attention" not in config.layer_types:  # Transformers moves keys and values on CUDA streams alone
        inputs, tokens = fp32(sample, COMPANY[type(sample)][1], padding="left"), True
        for kind in ("offloaded", "offloaded_static"):
            new = new_tokens(model.generate(**inputs, **GREEDY, cache_implementation=kind), inputs)[0]
            tokens &= new == plain_greedy(model, sample)
    return worst, tokens


COMPILED: dict = {}
# all models of a test run share the code of one forward, which Dynamo would compile for eight of them only
torch._dynamo.config.recompile_limit = 64


def compiled(model):
    """The model's forward as one graph, and how often it was compiled."""
    if id(model) not in COMPILED:
        graphs = []

        def count(graph, example_inputs):
            graphs.append(graph)
            return graph.forward

        COMPILED[id(model)] = torch.compile(model.forward, fullgraph=True, backend=count), graphs
    return COMPILED[id(model)]


@path("compiled decode")
def compiled_decode(model, sample):
    forward, graphs = compiled(model)
    inputs = fp32(sample)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
    tokens, logits = [], [model(**inputs, past_key_values=cache).logits[:, -1]]
    delta = int(cache.layers[0].rope_deltas)
    worst, counts = 0.0, []
    with torch.no_grad():
        for step in range(6):
            tokens.append(int(logits[-1][0, : SPECIAL[0]].argmax()))
            place = len(sample) + step
            masks = model.create_masks_for_generate(
                model.config, torch.empty(1, 1, 0), torch.ones(1, place + 1, dtype=torch.long), cache
            )
            positions = torch.full((4, 1, 1), place + delta)
            positions[0] = place
            out = forward(
                input_ids=torch.tensor([tokens[-1:]]), attention_mask=masks, position_ids=positions,
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            logits.append(out.logits[:, -1])
            counts.append(len(graphs))
            expected = plain(model, tiny.extended(sample, tokens))[-1]
            worst = max(worst, difference(logits[-1][0], expected))
    assert counts[0] == counts[-1] == 1, f"compiled {counts} times"
    return worst, tokens[:NEW] == plain_greedy(model, sample)


def gradients(model, sample, **checkpointing):
    for parameter in model.parameters():
        parameter.grad = None
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    inputs = fp32(sample, COMPANY[type(sample)][0])
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] > 63), -100)
    model(**inputs, labels=labels).loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if checkpointing:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
    model.zero_grad()
    model.eval()
    return grads


@path("gradient checkpointing, not reentrant")
def checkpointing(model, sample, reentrant=False):
    expected, actual = gradients(model, sample), gradients(model, sample, use_reentrant=reentrant)
    assert expected.keys() == actual.keys() and any(".mixer." in name for name in expected)
    return max(difference(actual[name], expected[name]) for name in expected), None


@path("gradient checkpointing, reentrant")
def reentrant_checkpointing(model, sample):
    return checkpointing(model, sample, reentrant=True)


@path("bf16", bound=BFLOAT16_BOUND)
@torch.no_grad()
def bfloat16(model, sample):
    half = copy.deepcopy(model).bfloat16()
    actual = half(**tiny.batch(sample, dtype=torch.bfloat16)).logits[0].float()
    expected = plain(model, sample)
    error = float((actual - expected).norm() / expected.norm())
    return error, None


def fits(kind, sample):
    """Whether a sample is one for the model."""
    return (kind == "NVILA-Lite") == isinstance(sample, tiny_nvila.LiteSample)


CASES = {
    (name, kind, title): sample
    for name in PATHS
    for kind, (family, _) in MODELS.items()
    for title, sample in SAMPLES[family].items()
    if fits(kind, sample)
}


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_path_equals_the_plain_forward(case, models):
    name, kind, title = case
    check, bound = PATHS[name]
    worst, tokens = check(models[kind], CASES[case])
    equal = worst <= bound and tokens is not False
    cell = {"path": name, "model": kind, "input": title, "max_difference": worst, "bound": bound}
    CELLS.append(cell | {"same_tokens": tokens, "equal": equal})
    assert tokens is not False, "other greedy tokens"
    assert worst <= bound
