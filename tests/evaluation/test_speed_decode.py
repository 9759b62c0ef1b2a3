"""What the benchmark measures of batches and of compiled decoding."""

import pytest
import torch
from evaluation_fixtures import SMALL

from linmu_hf.evaluation.speed.measure import Variant, measure, static_copy, summarise
from linmu_hf.evaluation.speed.models import PRESETS, BenchmarkDecoder, text_config
from linmu_hf.families.family import Preset


KINDS = {"student": ["m_mate"] * 2, "teacher": ["full_attention"] * 2, "hybrid": ["m_mate", "full_attention"]}


@pytest.fixture
def decoders(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", ("qwen2_5_vl_vision", Preset(SMALL)))
    config = text_config("small").to_dict()
    made = type(text_config("small"))
    return {kind: BenchmarkDecoder(made.from_dict(config | {"layer_types": types})) for kind, types in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_static_copy_goes_on_like_the_cache(decoders, kind):
    decoder = decoders[kind]
    logits, cache = decoder.prefill(torch.randn(1, 10, 32), None)
    static = static_copy(cache, decoder.text.config, 3, 20)
    ids = logits.argmax(-1)
    copies = ids.expand(3, 1)
    for _ in range(6):
        ids, copies = decoder.step(ids, cache), decoder.step(copies, static)
        assert torch.equal(copies, ids.expand(3, 1))


def test_batches_and_graphs_are_measured(decoders):
    variants = {name: Variant(decoders[name]) for name in ("student", "teacher")}
    rows = measure(
        variants, [12], layout_of=lambda tokens: None, batches=(1, 2), prefill_batches=(1, 2), graphs=True, steps=1,
        repeats=1, report=lambda line: None,
    )  # fmt: skip
    for row in rows:
        assert set(row["prefill"]) == {"2"} and row["prefill"]["2"]["ttft_s"] > 0
        assert all(row["decode_graphs"][batch]["tokens_per_s"] > 0 for batch in ("1", "2"))


def test_a_step_that_does_not_compile_is_reported(decoders, monkeypatch):
    def compile(*args, **kwargs):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", compile)
    rows = measure(
        {"student": Variant(decoders["student"])}, [12], layout_of=lambda tokens: None, graphs=True, steps=1,
        repeats=1, report=lambda line: None,
    )  # fmt: skip
    assert rows[0]["decode_graphs"]["1"] == {"error": "RuntimeError: no compiler"}
    assert rows[0]["decode"]["1"]["tokens_per_s"] > 0


def test_speedups_compare_the_faster_way_of_each():
    def row(model, plain, compiled):
        decode = {"step_s": 1 / plain, "tokens_per_s": plain}
        entry = {"model": model, "tokens": 8, "ttft_s": 1.0, "decode": {"1": decode, "2": {"error": "no"}}}
        return entry | {"decode_graphs": {"1": {"tokens_per_s": compiled} if compiled else {"error": "no"}}}

    [speedup] = summarise([row("student", 6.0, 8.0), row("teacher", 2.0, None)])["speedups"]
    assert speedup["throughput"] == {"1": 4.0}
