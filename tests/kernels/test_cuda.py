"""The kernels where they belong: on a GPU, against the float64 recurrence, at the sizes of a 7B model."""

import pytest
import torch
from test_ssd import assert_same, make, run

from linmu_hf.ops.causal_conv import causal_conv
from linmu_hf.ops.ssd import Segments, ssd, ssd_step


pytestmark = pytest.mark.gpu
SIZES = ((28, 28, 4), 128, 256)


def inputs_on(device, lengths, dtype, sizes=SIZES, states=True):
    inputs = make(lengths, *sizes, states=False)
    heads, p, k = sizes
    with torch.no_grad():
        for name in "BC":
            inputs[name] = inputs[name].softmax(-1)
    if states:
        inputs["initial_states"] = torch.rand(len(lengths), heads[1], p + 1, k)
    return {n: t.detach().to(device, dtype if n in "xBC" else torch.float32) for n, t in inputs.items()}


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lengths", [(1,), (63,), (64,), (65,), (200,), (1, 63, 64, 65, 200)], ids=str)
def test_scan(lengths, dtype, rtol):
    low = {name: t.requires_grad_() for name, t in inputs_on("cuda", lengths, dtype).items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in low.items()}

    def scan(backend):
        return lambda segments, **tensors: ssd(segments=segments, normalized=True, backend=backend, **tensors)

    actual = run(scan("triton"), low, lengths)
    expected = run(scan("recurrence"), exact, lengths)
    assert_same({name: value.double() for name, value in actual.items()}, expected, rtol=rtol)


def test_more_elements_than_32_bits_count():
    """600k tokens of 28 heads of 128: y and C end beyond 2^31 elements; the last tokens are as in a short scan."""
    n, tail = 620_000, 300
    assert n * 28 * 128 > 2**31
    sizes = ((28, 28, 4), 128, 128)
    long = inputs_on("cuda", (n,), torch.bfloat16, sizes, states=False)
    long["A"] = long["A"].clamp_max(-4.0)  # forgets within a few tokens
    y, _ = ssd(**long, segments=Segments.build((n,)), normalized=True, backend="triton")
    short = {name: t if name == "A" else t[-tail:].contiguous() for name, t in long.items()}
    expected, _ = ssd(**short, segments=Segments.build((tail,)), normalized=True, backend="triton")
    torch.testing.assert_close(y[-tail // 2 :], expected[-tail // 2 :], rtol=2e-2, atol=2e-2)


def test_step_follows_the_scan():
    b = 3
    inputs = inputs_on("cuda", (b,), torch.bfloat16, states=False)
    states = torch.rand(b, 28, 129, 256, device="cuda")
    exact = {name: t.double() for name, t in inputs.items()}
    y, new_states = ssd_step(**inputs, states=states, normalized=True)
    expected, expected_states = ssd_step(**exact, states=states.double(), normalized=True)
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(new_states.double(), expected_states, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tails", [False, True], ids=["from zero", "from tails"])
def test_conv(tails):
    lengths, channels = (1, 63, 130), 4608
    x, weight = torch.randn(sum(lengths), channels), torch.randn(4, channels)
    inputs = [x, weight, *([torch.randn(3, 3, channels)] if tails else [])]
    results = []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        tensors = [t.to(device, dtype).requires_grad_() for t in inputs]
        y, last = causal_conv(*tensors[:2], Segments.build(lengths, device), *tensors[2:])
        loss = y.square().sum() + last.square().sum()
        results.append([t.cpu().double() for t in (y, last, *torch.autograd.grad(loss, tensors))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_compiled_whole():
    inputs = inputs_on("cuda", (70,), torch.bfloat16)
    segments = Segments.build((70,), "cuda")

    def scan(inputs):
        return ssd(**inputs, segments=segments, normalized=True)

    torch.testing.assert_close(torch.compile(scan, fullgraph=True)(inputs), scan(inputs))
