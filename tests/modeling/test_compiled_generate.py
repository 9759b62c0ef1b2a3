"""`generate(cache_implementation="static")`: one graph for all decode steps, which a CUDA graph can hold."""

import pytest
import tiny
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._guards import TracingContext
from transformers import CompileConfig, StaticCache


NEW = 9
SAMPLES = tiny.Sample(5, ("image", 2, 3), 4), tiny.Sample(3)
KINDS = {"linear": ["m_mate"] * 2, "hybrid": ["m_mate", "full_attention"]}


def generate(model, backend=None, length=None, **options):
    """Ids that greedy decoding gives for a padded batch; with a backend, from a static cache and compiled whole."""
    inputs = tiny.batch(*SAMPLES, padding="left", dtype=torch.float32, length=length)
    if backend is not None:
        options["cache_implementation"] = "static"
        options["compile_config"] = CompileConfig(fullgraph=True, backend=backend, mode=None)
        options["compile_config"]._compile_all_devices = True  # Transformers compiles on GPUs alone otherwise
    return model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None, **options)


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def model(request):
    torch._dynamo.reset()
    counters.clear()
    return tiny.plain(layer_types=request.param, num_hidden_layers=2)


def test_compiled_once_for_all_steps_and_calls(model):
    """A second call has a cache of its own; it and all steps after the first run what the first has compiled."""
    # keys and values have another size for a longer prompt, states have not
    lengths = (40, 30) if "full_attention" in model.config.get_text_config().layer_types else (30, 40)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in lengths:
            expected = generate(model, length=length)
            assert torch.equal(generate(model, backend="eager", length=length), expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_the_graph_writes_only_what_keeps_its_address(model):
    """CUDA graphs are given up where a step writes into inputs that may be elsewhere in the next."""
    written, static = [], []

    def look(graph, inputs):
        facts = TracingContext.get().fw_metadata
        written.extend(facts.mutated_inp_runtime_indices)
        static.extend(facts.static_input_indices)
        return graph.forward

    generate(model, backend=aot_autograd(fw_compiler=look))
    m_mate = model.config.get_text_config().layer_types.count("m_mate")
    assert len(written) >= 3 * m_mate  # state, tail, tokens seen
    assert set(written) <= set(static)


@pytest.mark.parametrize("beams", [1, 3])
def test_states_keep_their_addresses(beams):
    model = tiny.plain(num_hidden_layers=2)
    text = model.config.get_text_config()
    inputs = tiny.batch(*SAMPLES, padding="left", dtype=torch.float32)
    cache = StaticCache(config=text, max_cache_len=64)
    found = []

    def note(module, args, output):
        tensors = [(layer.recurrent_states[0], layer.conv_states[0], layer.seen) for layer in cache.layers]
        found.append([t.data_ptr() for held in tensors for t in held])
        assert all(t._dynamo_static_input_type for held in tensors for t in held)

    model.model.language_model.register_forward_hook(note)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=NEW, eos_token_id=None, num_beams=beams)
    assert len(found) == NEW and all(step == found[0] for step in found)


@pytest.mark.slow
@pytest.mark.parametrize("model", [KINDS["hybrid"]], indirect=True)
def test_inductor(model):
    """The default backend, with the C++ that it makes on a CPU; both kinds of layers."""
    assert torch.equal(generate(model, backend="inductor"), generate(model))
    assert counters["stats"]["unique_graphs"] == 1
