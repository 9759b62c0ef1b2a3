"""Whole tiny models by our kernels in Triton's interpreter, against plain PyTorch; run as `interpreted_scan.py` is."""

from itertools import pairwise

import pytest
import tiny
import torch
from interpreted_scan import nan_filled_memory  # noqa: F401
from transformers import DynamicCache

from linmu_hf.modeling.mixers import flex_ma
from linmu_hf.ops import decode_triton
from linmu_hf.ops.backends import use_kernels
from linmu_hf.ops.conv import causal_conv
from linmu_hf.ops.conv import triton as conv_triton
from linmu_hf.ops.ssd import scan as ssd
from linmu_hf.ops.ssd import triton as ssd_triton
from linmu_hf.ops.ssd import triton_step


HYBRID = {"layer_types": ["m_mate", "full_attention"]}
NO_WINDOW = {"text_window": 0, "sink_tokens": 0}
SAMPLES = tiny.Sample(5, ("image", 2, 3), 4, ("video", 2, 2, 3), 2), tiny.Sample(3)
READS = {"conv_kernel", "chunk_states_kernel", "pass_states_kernel", "output_kernel"}
LEARNS = {"conv_grad_kernel", "c_grad_kernel", "b_grad_kernel", "x_grad_kernel", "dt_grad_kernel"}


@pytest.fixture
def compare(monkeypatch):
    """`compare(what, options, kernels)` gives the same by all of these kernels as by plain PyTorch."""
    launched = set()

    def noting(kernel, grid, *args, **options):
        launched.add(kernel.fn.__name__)
        kernel[grid](*args, **options)

    for module in (ssd_triton, conv_triton, decode_triton, triton_step):
        monkeypatch.setattr(module, "launch", noting)

    def run(what, options, kernels):
        results = []
        for backend in ("chunked", "triton"):
            assert not launched
            for module in (causal_conv, ssd, flex_ma):
                monkeypatch.setattr(module, "use_triton_kernels", lambda x, on=backend == "triton": on)
            with use_kernels(ssd=backend):
                layers = len(options.get("layer_types", ["m_mate"]))
                results.append(what(tiny.plain(num_hidden_layers=layers, **options)))
        assert launched >= kernels, f"{kernels - launched} did not run"
        torch.testing.assert_close(*reversed(results), rtol=1e-3, atol=1e-5)

    return run


def gradients(model, logits):
    """The logits, and the gradient of every parameter that has one."""
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(logits.square().mean(), parameters, allow_unused=True)
    return {"logits": logits, **{name: grad for name, grad in zip(names, found) if grad is not None}}


def learn(model, padding="left"):
    inputs = tiny.batch(*SAMPLES, padding=padding, dtype=torch.float32)
    return gradients(model, model(**inputs).logits[inputs["attention_mask"].bool()])


@pytest.mark.parametrize(
    "options",
    [{}, {"reverse_scope": "sequence"}, {"bc_feature_map": None, "gate": "channel"}, {"conv_kernel": 1, **HYBRID}],
    ids=str,
)
def test_gradients(compare, options):
    unused = {"conv_kernel", "conv_grad_kernel"} if options.get("conv_kernel") == 1 else set()
    compare(learn, options, (READS | LEARNS) - unused)


def test_gradients_with_checkpoints(compare):
    def checkpointed(model):
        tiny.checkpoint(model, use_reentrant=False)
        return learn(model.train(), "right")

    compare(checkpointed, {}, READS | LEARNS)


def test_packed(compare):
    samples = tiny.Sample(5, ("image", 2, 3), 2), tiny.Sample(4), tiny.Sample(1, ("image", 3, 2), 3)
    alone = [tiny.batch(sample, dtype=torch.float32) for sample in samples]
    bounds = torch.tensor([0, *map(len, samples)]).cumsum(0)

    def learn_packed(model):
        inputs = {name: torch.cat([one[name] for one in alone], 1) for name in ("input_ids", "mm_token_type_ids")}
        for name in ("pixel_values", "image_grid_thw"):
            inputs[name] = torch.cat([one[name] for one in alone if name in one])
        return gradients(model, model(**inputs, cu_seq_lens_q=bounds, use_cache=False).logits)

    compare(learn_packed, HYBRID, READS | LEARNS)


@pytest.mark.parametrize(
    "options, how",
    [
        (HYBRID | NO_WINDOW, {}),
        ({}, {}),
        ({}, {"cache_implementation": "static", "disable_compile": True}),
        ({"bc_feature_map": None} | NO_WINDOW, {"prefill_chunk_size": 8}),
        (NO_WINDOW, {"num_beams": 2, "num_return_sequences": 2}),
    ],
    ids=["hybrid", "near text", "static cache", "chunks, no features", "beams"],
)
def test_generate(compare, options, how):
    def generate(model):
        inputs = tiny.batch(*SAMPLES, padding="left", dtype=torch.float32)
        how_much = {"max_new_tokens": 4, "suppress_tokens": [60, 61, 62, 63], "do_sample": False, "eos_token_id": None}
        outputs = model.generate(**inputs, **how_much, **how, output_logits=True, return_dict_in_generate=True)
        return outputs.sequences, outputs.logits

    # the kernel for the whole mixer scans the token that comes, with near text it is the one that leaves
    compare(generate, options, {*READS, "decode_kernel" if "text_window" in options else "step_kernel"})


def test_a_chat_goes_on_and_is_learnt_from(compare):
    """A second image after a cache, in inference mode; what was kept there does no harm to gradients afterwards."""
    whole = tiny.Sample(5, ("image", 2, 3), 2, ("image", 3, 2), 4)
    cuts = 0, whole.cuts[2], len(whole)

    def chat(model):
        cache, logits = DynamicCache(config=model.config.get_text_config()), []
        with torch.inference_mode():
            for start, end in pairwise(cuts):
                inputs = tiny.cut(whole, start, end)
                inputs["pixel_values"] = inputs["pixel_values"].float()
                logits.append(model(**inputs, past_key_values=cache, use_cache=True).logits)
            for token in (7, 8):
                step = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
                logits.append(step.logits)
        learnt = gradients(model, model(**{**tiny.batch(whole, dtype=torch.float32), "use_cache": False}).logits)
        return [one.clone() for one in logits], learnt

    compare(chat, {}, {*READS, *LEARNS, "step_kernel"})
