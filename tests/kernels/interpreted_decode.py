"""The kernels of a decode step and of the convolution, in Triton's interpreter; run as `interpreted_scan.py` is."""

import pytest
import tiny
import torch
from interpreted_scan import SOUND, nan_filled_memory  # noqa: F401
from scans import make
from torch._dynamo.backends.common import aot_autograd

from linmu_hf.modeling.cache import MMateCacheLayer
from linmu_hf.modeling.mixers import flex_ma
from linmu_hf.modeling.mixers.flex_ma import FlexMA
from linmu_hf.ops.conv.causal_conv import causal_conv
from linmu_hf.ops.conv.triton import _tables, causal_conv_triton, conv_backward, conv_forward
from linmu_hf.ops.segments import Segments
from linmu_hf.ops.ssd.scan import ssd_step
from linmu_hf.ops.ssd.triton_step import ssd_step_triton, step_forward


def test_operators_without_gradients_are_sound_for_compilation():
    x, dt, A, B, C = make((66,), (2, 2, 1), states=False, dtype=torch.float32).values()
    states = torch.rand(66, 2, 5, 3)
    torch.library.opcheck(step_forward, (x, dt, A, B, C, states, False), test_utils=SOUND)
    weight, tail = torch.randn(4, 5), torch.randn(1, 3, 5)
    checks = (*SOUND, "test_autograd_registration")
    x = x[:, 0].detach()
    torch.library.opcheck(conv_forward, (x, weight, tail, [66]), test_utils=checks)
    for before in (tail, None):
        torch.library.opcheck(conv_backward, (torch.randn(66, 5), x, weight, before, [66]), test_utils=SOUND)


@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("sizes", [(5, 3), (70, 40), (16, 16)], ids=str)
def test_step(sizes, normalized):
    b, (p, k) = 3, sizes
    inputs = make((b,), (8, 4, 2), p, k, states=False, dtype=torch.float32)
    with torch.no_grad():
        inputs = {name: t.detach().abs() if name in "BC" else t.detach() for name, t in inputs.items()}
    states = torch.rand(b, 4, p + normalized, k)
    expected = ssd_step(**inputs, states=states, normalized=normalized)
    actual = ssd_step_triton(**inputs, states=states, normalized=normalized)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("tails", [False, True], ids=["from zero", "from tails"])
@pytest.mark.parametrize("lengths", [(1,), (2, 3, 1), (63, 65), (130,)], ids=str)
@pytest.mark.parametrize("width", [2, 4])
def test_conv(width, lengths, tails):
    n, c = sum(lengths), 19
    segments = Segments.build(lengths)
    x, weight = torch.randn(n, c), torch.randn(width, c)
    tail = torch.randn(len(lengths), width - 1, c) if tails else None
    inputs = [t.requires_grad_() for t in (x, weight, tail) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in inputs]

    def results(outputs, inputs):
        weights = [torch.arange(t.numel()).view_as(t).sin().to(t) for t in outputs]
        loss = sum((t * w).sum() for t, w in zip(outputs, weights))
        return [*outputs, *torch.autograd.grad(loss, inputs)]

    actual = results(causal_conv_triton(*inputs[:2], segments, *inputs[2:]), inputs)
    expected = results(causal_conv(*exact[:2], segments, *exact[2:]), exact)
    torch.testing.assert_close([t.double() for t in actual], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", ["compiled", "eager"])
def test_conv_compiles_whole(first):
    """Tables of a length are kept: those made while tracing are not taken for real ones, nor real ones for traced."""
    _tables.cache_clear()
    torch._dynamo.reset()
    segments = Segments.build((70,))
    inputs = [torch.randn(size, requires_grad=True) for size in ((70, 5), (4, 5), (1, 3, 5))]

    def gradients(form):
        y, last = form(*inputs)
        return torch.autograd.grad(y.square().sum() + last.square().sum(), inputs)

    def conv(x, weight, tail):
        return causal_conv_triton(x, weight, segments, tail)

    compiled = torch.compile(conv, backend="aot_eager", fullgraph=True)
    forms = (compiled, conv) if first == "compiled" else (conv, compiled)
    torch.testing.assert_close(*map(gradients, forms))


def random_mixer(config):
    mixer = FlexMA(config, 0).requires_grad_(False)
    for parameter in mixer.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return mixer


@pytest.mark.parametrize("masked", [False, True], ids=["all real", "padding"])
@pytest.mark.parametrize(
    "options",
    [{}, {"scan_rope": False}, {"bc_feature_map": None}, {"conv_kernel": 2, "num_key_value_heads": 4}],
    ids=str,
)
def test_decode_step_of_the_mixer(monkeypatch, options, masked):
    """Three tokens of three sequences, one kernel each, against the same steps in plain PyTorch."""
    config = tiny.text_config(**{"bc_feature_map": "softmax", "scan_rope": True, **options})
    mixer = random_mixer(config)
    tokens = torch.randn(3, 3, config.hidden_size)
    angles = torch.rand(3, 3, config.head_dim)
    caches = MMateCacheLayer(), MMateCacheLayer()
    # the columns of a mask, as the decoder cuts them out: not contiguous
    masks = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1]]).T if masked else [None] * 3
    for u, angle, mask in zip(tokens, angles, masks):
        with torch.no_grad():
            results = []
            for fused, cache in enumerate(caches):
                monkeypatch.setattr(flex_ma, "use_triton_kernels", lambda x, fused=fused: bool(fused))
                y = mixer.step(u, (angle.cos(), angle.sin()), mask, cache)
                results.append((y if mask is None else y[mask.bool()], *cache.load()))
        torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)


def test_compiled_decode_step(monkeypatch):
    """One graph for all steps; the state stays where it is, and no step copies it."""
    monkeypatch.setattr(flex_ma, "use_triton_kernels", lambda x: True)
    config = tiny.text_config(bc_feature_map="softmax")
    mixer = random_mixer(config)
    caches = MMateCacheLayer(max_cache_len=8), MMateCacheLayer(max_cache_len=8)
    graphs = []

    def look(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(mixer.step, fullgraph=True, backend=aot_autograd(fw_compiler=look))
    addresses = set()
    with torch.no_grad():
        for i in range(4):
            u, angle = torch.randn(2, config.hidden_size), torch.rand(2, config.head_dim)
            rope = angle.cos(), angle.sin()
            expected = mixer.step(u, rope, None, caches[0])
            actual = (compiled if i else mixer.step)(u, rope, None, caches[1])
            torch.testing.assert_close((actual, *caches[1].load()), (expected, *caches[0].load()))
            addresses.add(caches[1].recurrent_states[0].data_ptr())
    assert len(graphs) == len(addresses) == 1
    # the tail of the convolution alone
    assert graphs[0].count(torch.ops.aten.copy_.default) <= 2
