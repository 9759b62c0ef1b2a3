"""The kernels where they belong: on a GPU, against the float64 recurrence, at the sizes of a 7B model."""

import pytest
import tiny
import torch
from scans import assert_same, make, run
from torch._dynamo.utils import counters

from linmu_hf.ops import launch as tuning
from linmu_hf.ops.attention.varlen import PACKAGES, varlen_attention, why_unfit
from linmu_hf.ops.attention.window import by_size
from linmu_hf.ops.conv.causal_conv import causal_conv
from linmu_hf.ops.segments import Scan, Segments
from linmu_hf.ops.ssd.scan import ssd, ssd_step


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


@pytest.mark.parametrize("backend", PACKAGES)
def test_windows_in_one_call(backend):
    """The kernels of flash-attn and of PyTorch, against PyTorch's attention in float64."""
    q, k, v = (torch.randn(3 + 3 + 70, heads, 128) for heads in (28, 4, 4))
    offsets, weight = torch.tensor([0, 3, 6, 76], device="cuda", dtype=torch.int32), torch.randn(76, 28, 128)
    if reason := why_unfit(backend, q.cuda().bfloat16()):
        pytest.skip(reason)
    results = []
    for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float64)):
        tensors = [t.bfloat16().to(device, dtype).requires_grad_() for t in (q, k, v)]
        if device == "cuda":
            y = varlen_attention(*tensors, offsets, 70, backend)
        else:
            y = by_size(*tensors, [(2, 3), (1, 70)])
        grads = torch.autograd.grad((y * weight.to(y)).sum(), tensors)
        results.append({str(i): t.detach().cpu().double() for i, t in enumerate((y, *grads))})
    assert_same(*results, rtol=2e-2)


def test_compiled_whole():
    inputs = inputs_on("cuda", (70,), torch.bfloat16)
    segments = Segments.build((70,), "cuda")

    def scan(inputs):
        return ssd(**inputs, segments=segments, normalized=True)

    torch.testing.assert_close(torch.compile(scan, fullgraph=True)(inputs), scan(inputs))


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_pair(dtype, rtol):
    """Both directions of a layer in one launch, the second backwards over the same x."""
    from linmu_hf.ops.ssd.triton import ssd_triton_pair

    lengths = (65, 200)
    first = {name: t.requires_grad_() for name, t in inputs_on("cuda", lengths, dtype).items()}
    torch.manual_seed(1)
    second = {name: t.requires_grad_() for name, t in inputs_on("cuda", lengths, dtype, states=False).items()}
    segments, backwards = Segments.build(lengths, "cuda"), Segments.build(lengths[::-1], "cuda")
    leaves = [*first.values(), *(second[name] for name in ("dt", "A", "B", "C"))]

    def results(form):
        (y, states), (other, _) = form()
        loss = sum(
            (t.double() * torch.arange(t.numel(), device="cuda").view_as(t).sin()).sum() for t in (y, states, other)
        )
        names = ("y", "states", "other", *map(str, range(len(leaves))))
        return dict(zip(names, (y, states, other, *torch.autograd.grad(loss, leaves))))

    def apart():
        second["x"] = first["x"].flip(0)
        one = ssd(**first, segments=segments, normalized=True, backend="triton")
        return one, ssd(**second, segments=backwards, normalized=True, backend="triton")

    def together():
        second["x"] = first["x"].flip(0)
        scans = Scan(**first, segments=segments), Scan(**second, segments=backwards)
        return ssd_triton_pair(*scans, normalized=True)

    assert_same(results(together), results(apart), rtol=rtol)


def test_long_scans_are_tuned_once_and_stay_right(monkeypatch):
    """Every configuration of every kernel gives what the default gives."""
    monkeypatch.setattr(tuning, "_found", {})
    inputs = {name: t.requires_grad_() for name, t in inputs_on("cuda", (4096,), torch.bfloat16).items()}

    def run_it():
        return run(lambda segments, **t: ssd(segments=segments, normalized=True, **t), inputs, (4096,))

    tuned = run_it()
    assert {key[0] for key in tuning._found} == set(tuning.CONFIGS)
    monkeypatch.setattr(tuning, "choose", lambda configs, *_: configs[0])
    expected = run_it()
    assert_same(tuned, expected, rtol=2e-2)
    for choice in range(1, max(map(len, tuning.CONFIGS.values()))):
        monkeypatch.setattr(tuning, "choose", lambda configs, *_, i=choice: configs[min(i, len(configs) - 1)])
        assert_same(run_it(), expected, rtol=2e-2)


def test_a_graph_is_captured_without_tuning(monkeypatch):
    inputs = inputs_on("cuda", (4096,), torch.bfloat16)
    segments = Segments.build((4096,), "cuda")

    def scan():
        return ssd(**inputs, segments=segments, normalized=True)[0]

    monkeypatch.setattr(tuning, "choose", lambda configs, *_: configs[0])
    expected = scan()  # compiles
    monkeypatch.undo()
    monkeypatch.setattr(tuning, "_found", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = scan()
    assert not tuning._found
    graph.replay()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("layer_types", [["m_mate"] * 2, ["m_mate", "full_attention"]], ids=["linear", "hybrid"])
def test_generate_decodes_in_a_cuda_graph(layer_types):
    """`cache_implementation="static"` is all it takes; one graph serves every step, and none is given up."""
    model = tiny.plain(layer_types=layer_types, num_hidden_layers=2).cuda()
    sample = tiny.Sample(5, ("image", 2, 3), 4)
    inputs = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in tiny.batch(sample, dtype=torch.float32).items()
    }
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **how)
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **how, cache_implementation="static"), expected)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert not counters["inductor"]["cudagraph_skips"]
