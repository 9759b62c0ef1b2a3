"""Our kernels, run in Python by Triton's interpreter, against the float64 recurrence: values and gradients.

Run with `make kernels-check`, or by `test_interpreted.py` in a process of its own: Triton reads TRITON_INTERPRET when
it is imported. Matrix products of bf16 are wrong in the interpreter of Triton 3.9, so the tests use fp16 instead.
"""

import os

import pytest
import tiny
import torch
from scans import HEADS, assert_same, make, run

from linmu_hf.ops.backends import use_kernels
from linmu_hf.ops.segments import Scan, Segments
from linmu_hf.ops.ssd import triton as module
from linmu_hf.ops.ssd.chunk_table import LaunchPlan, chunk_table
from linmu_hf.ops.ssd.scan import ssd, ssd_pair
from linmu_hf.ops.ssd.triton import ssd_triton, ssd_triton_pair


if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("these tests run in Triton's interpreter: make kernels-check, or TRITON_INTERPRET=1 pytest ...")

MIXED = (1, 63, 64, 65, 200)


@pytest.fixture(autouse=True)
def nan_filled_memory():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def scan(lengths, *args, form=ssd_triton, positive=False, dtype=torch.float32, rtol=1e-5, **kwargs):
    """Compares the kernels in `dtype` with the recurrence in float64 on the same numbers."""
    options = {name: kwargs.pop(name) for name in ("normalized",) if name in kwargs}
    inputs = make(lengths, *args, **kwargs)
    if options.get("normalized"):
        with torch.no_grad():
            inputs["B"].abs_()
            inputs["C"].abs_()
            if "initial_states" in inputs:
                m, s, p, k = inputs["initial_states"].shape
                inputs["initial_states"] = torch.rand(m, s, p + 1, k, dtype=torch.float64).requires_grad_()
    low = {n: t.detach().to(dtype if n in "xBC" else torch.float32).requires_grad_() for n, t in inputs.items()}
    inputs = {name: t.detach().double().requires_grad_() for name, t in low.items()}

    def truth(segments, **tensors):
        return ssd(segments=segments, backend="recurrence", **options, **tensors)

    def kernels(segments, **tensors):
        return form(segments=segments, **options, **tensors)

    expected = run(truth, inputs, lengths)
    actual = {name: value.double() for name, value in run(kernels, low, lengths).items()}
    assert_same(actual, expected, rtol=rtol)


@pytest.mark.parametrize("states", [False, True], ids=["from zero", "from states"])
@pytest.mark.parametrize("length", MIXED)
def test_lengths(length, states):
    scan((length,), (2, 2, 1), states=states)


@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "normalised"])
def test_mixed_segments(normalized):
    scan((65, 1, 64, 3), (2, 2, 1), normalized=normalized)


@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_heads(heads, normalized):
    scan((3, 20), heads, normalized=normalized)


@pytest.mark.parametrize("sizes", [(70, 40), (33, 16), (1, 2), (16, 80)], ids=str)
def test_sizes_of_several_tiles(sizes):
    scan((9, 70), (2, 2, 1), *sizes, normalized=True)


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_windows_of_chunks(monkeypatch, chunks):
    """States that enter a window from the one before; a segment over several windows, several segments in one."""
    lengths = (130, 3, 64, 70)
    monkeypatch.setattr(module, "WINDOW_BYTES", chunks * 2 * 6 * 3 * 4)
    plan = LaunchPlan(lengths, (4,), (True,), (True,), True, False)
    assert len(chunk_table(plan, chunks, torch.device("cpu")).windows) == -(-7 // chunks)
    scan(lengths, (2, 2, 1), normalized=True)


def pair(lengths, starts, normalized):
    """Inputs of two scans in fp32."""
    scans = []
    for length, start in zip(lengths, starts):
        inputs = make(length, (2, 2, 1), states=False, dtype=torch.float32)
        if normalized:
            inputs = {name: t.abs() if name in "BC" else t for name, t in inputs.items()}
        scan = Scan(*(t.detach().requires_grad_() for t in inputs.values()), segments=Segments.build(length))
        if start:
            scan = scan._replace(initial_states=torch.rand(len(length), 2, 5 + normalized, 3).requires_grad_())
        scans.append(scan)
    return scans


def outputs_and_gradients(form, scans):
    """y and final states of the first scan, y of the second, and the gradient of every tensor that needs one."""
    (y, finals), (other, _) = form(*scans)
    outputs = y, finals, other
    generator = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in outputs)
    leaves = {id(t): t for scan in scans for t in scan if isinstance(t, torch.Tensor) and t.requires_grad}
    return [*outputs, *torch.autograd.grad(loss, list(leaves.values()))]


@pytest.mark.parametrize(
    "starts, normalized",
    [((False, False), True), ((True, False), True), ((False, True), False), ((True, True), True)],
    ids=["from zero", "first from states", "second from states, plain", "both from states"],
)
def test_pair(starts, normalized):
    """Two scans in one launch: each as the recurrence in float64 has it."""
    scans = pair(((65, 3), (30, 7)), starts, normalized)
    exact = {id(t): t.detach().double().requires_grad_() for s in scans for t in s if isinstance(t, torch.Tensor)}
    doubles = [scan._make(exact.get(id(t), t) for t in scan) for scan in scans]

    def apart(*scans):
        return [ssd(**scan._asdict(), normalized=normalized, backend="recurrence") for scan in scans]

    actual = outputs_and_gradients(lambda *scans: ssd_triton_pair(*scans, normalized=normalized), scans)
    expected = outputs_and_gradients(apart, doubles)
    assert len(actual) == len(expected) >= 12
    for one, right in zip(actual, expected):
        torch.testing.assert_close(one.double(), right, rtol=0, atol=1e-5 * right.abs().max().item())


def test_pair_over_windows(monkeypatch):
    """A window may hold the end of one scan and the beginning of the other."""
    scans = pair(((66,), (3, 5)), (True, False), True)
    expected = outputs_and_gradients(lambda *s: ssd_triton_pair(*s, normalized=True), scans)
    monkeypatch.setattr(module, "WINDOW_BYTES", 2 * 2 * 6 * 3 * 4)
    actual = outputs_and_gradients(lambda *s: ssd_triton_pair(*s, normalized=True), scans)
    torch.testing.assert_close(actual, expected)


def test_pair_is_one_launch_of_each_kernel(monkeypatch):
    """As many as a single scan takes; and no final state is written that nobody asked for."""
    scans = pair(((65,), (30,)), (False, False), True)
    launched = []

    def counting(kernel, grid, *args, **options):
        launched.append((kernel.fn.__name__, options.get("HAS_FINALS")))
        kernel[grid](*args, **options)

    monkeypatch.setattr(module, "launch", counting)
    (y, finals), (reverse, others) = ssd_triton_pair(*scans, normalized=True, final_states=False)
    assert finals is None and others is None
    (y.sum() + reverse.sum()).backward()
    passing = ["pass_states_kernel"]
    gradients = [f"{name}_grad_kernel" for name in ("c", "b", "x", "dt")]
    assert [name for name, _ in launched if name != "slopes_kernel"] == [
        "chunk_states_kernel", *passing, "output_kernel",
        "chunk_states_kernel", *passing, "chunk_state_grads_kernel", *passing, *gradients,
    ]  # fmt: skip
    assert not any(finals for _, finals in launched)


def test_pair_of_different_heads_is_refused():
    one, other = (Scan(*make((5,), h, states=False).values(), Segments.build((5,))) for h in ((4, 4, 2), (4, 2, 2)))
    with pytest.raises(ValueError, match="must have the same data type and heads"):
        ssd_triton_pair(one, other)


@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "normalised"])
def test_half_precision(normalized):
    """Errors of a rounding of fp16, 2^-11, and of sums of such."""
    scan((70, 20), p=16, k=16, normalized=normalized, dtype=torch.float16, rtol=4e-3)


def test_states_in_half_precision(monkeypatch):
    """A model in bfloat16 without gradients. Sums over chunks stay in fp32: many chunks err like few."""
    monkeypatch.setattr(module, "WINDOW_BYTES", 8 * 2 * 17 * 16 * 2)
    inputs = make((700,), (2, 2, 1), 16, 16, dtype=torch.float32, states=False)
    inputs |= {name: inputs[name].detach().abs() for name in "BC"}
    x, dt, A, B, C = (value.detach() for value in inputs.values())
    segments = Segments.build((700,))
    y, finals, *_ = module.ssd_forward([x], [dt], [A], [B], [C], [], [700], [1], [False], [True], True, True)
    expected_y, expected = ssd(x, dt, A, B, C, segments, normalized=True, backend="recurrence")
    rounding = 2**-8
    torch.testing.assert_close(y, expected_y, rtol=0, atol=rounding * float(expected_y.abs().max()))
    torch.testing.assert_close(finals, expected, rtol=0, atol=rounding * float(expected.abs().max()))
    assert not torch.equal(finals, module.ssd_triton(x, dt, A, B, C, segments, normalized=True)[1])


@pytest.fixture(params=["ieee", "tf32"])
def precision(request):
    """Set as `TrainingArguments(tf32=True)` sets it, after which PyTorch answers no questions in older words."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("PyTorch before 2.9 has the older words alone")
    before, matmul.fp32_precision = matmul.fp32_precision, request.param
    yield request.param
    matmul.fp32_precision = before


def test_products_are_as_precise_as_those_of_pytorch(monkeypatch, precision):
    used = []

    def noting(kernel, grid, *args, **options):
        used.append(options.get("PRECISION", precision))
        kernel[grid](*args, **options)

    monkeypatch.setattr(module, "launch", noting)
    ssd_triton(**make((5,), dtype=torch.float32), segments=Segments.build((5,)))[0].sum().backward()
    assert set(used) == {precision}


def test_strong_decay_stays_finite():
    inputs = make((150,), (2, 2, 1), states=False, dtype=torch.float32)
    inputs["A"] = (inputs["A"] * 500).detach().requires_grad_()
    assert all(value.isfinite().all() for value in run(ssd_triton, inputs, (150,)).values())


def test_offsets_beyond_32_bits():
    """Rows so far apart that the last are more than 2^31 elements after the first."""
    n, far = 66, 2**31 // 64
    inputs = make((n,), (2, 2, 1), states=False, dtype=torch.float32)
    storage = torch.empty(0, dtype=torch.float16)
    torch.use_deterministic_algorithms(False)  # leaves the memory between the rows alone
    storage = torch.empty(far * n, dtype=torch.float16)
    x = storage.as_strided(inputs["x"].shape, (far, 5, 1))
    x.copy_(inputs["x"].detach())
    assert x.stride(0) * (n - 1) > 2**31
    near = {**inputs, "x": x.clone(), "B": inputs["B"].half(), "C": inputs["C"].half()}
    segments = Segments.build((n,))
    for actual, expected in zip(
        ssd_triton(**{**near, "x": x}, segments=segments), ssd_triton(**near, segments=segments)
    ):
        assert torch.equal(actual, expected)


SOUND = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("paired", [False, True], ids=["one", "pair"])
def test_the_scan_is_sound_for_compilation(paired):
    """Schema and fake implementation of forward and backward, autograd registration."""
    scans = pair(((66, 2), (3,)), (True, False), True)[: 1 + paired]
    tensors = [[getattr(scan, name) for scan in scans] for name in ("x", "dt", "A", "B", "C")]
    lengths, counts = ([66, 2, 3], [2, 1]) if paired else ([66, 2], [2])
    plan = lengths, counts, [True, False][: len(scans)], [True, False][: len(scans)], True, False
    inputs = (*tensors, [scans[0].initial_states], *plan)
    torch.library.opcheck(module.ssd_forward, inputs, test_utils=(*SOUND, "test_autograd_registration"))
    inputs = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, inputs)
    outputs = module.ssd_forward(*inputs)
    y, finals, entries, sums = module._split(outputs, len(scans))
    backward = ([torch.ones_like(one) for one in y], finals, *inputs[:5], list(y), entries, list(sums), *plan)
    torch.library.opcheck(module.ssd_backward, backward, test_utils=SOUND)


def test_the_scan_compiles_whole():
    inputs = make((66,), (2, 2, 1), dtype=torch.float32)
    x, dt, A, B, C, initial = inputs.values()
    segments = Segments.build((66,))

    def loss(x):
        y, finals = ssd(x, dt, A, B, C, segments, initial_states=initial, backend="triton")
        return y.square().sum() + finals.square().sum()

    expected = torch.autograd.grad(loss(x), x)
    actual = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(x), x)
    torch.testing.assert_close(actual, expected)


def test_a_model_compiles_whole():
    """Prefill and training step of a decoder on text, with kernels in place of the plain operations."""
    model = tiny.plain(num_hidden_layers=1).model.language_model
    embeds = torch.randn(1, 16, 32)  # one chunk: what packs several has shapes that depend on values

    def run(forward):
        leaf = embeds.clone().requires_grad_()
        hidden = forward(inputs_embeds=leaf, use_cache=False).last_hidden_state
        leaves = [leaf, *model.layers[0].parameters()]  # some serve vision tokens alone
        return hidden, *torch.autograd.grad(hidden.square().sum(), leaves, materialize_grads=True)

    torch._dynamo.reset()
    with use_kernels(ssd="triton"):
        compiled = run(torch.compile(model, backend="aot_eager", fullgraph=True))
        torch.testing.assert_close(compiled, run(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", ["span", "sequence"])
def test_a_model_that_sees_an_image(scope):
    """Both directions through the kernels, with gradients; the reverse one has tokens and decays of its own."""
    model = tiny.plain(num_hidden_layers=1, reverse_scope=scope)
    inputs = tiny.batch(tiny.Sample(3, ("image", 2, 3), 2), tiny.Sample(4), dtype=torch.float32)
    results = []
    for backend in ("recurrence", "triton"):
        with use_kernels(ssd=backend):
            logits = model(**inputs).logits[inputs["attention_mask"].bool()]
        leaves = [p for name, p in model.named_parameters() if "flex_ma" in name]
        results.append([logits, *torch.autograd.grad(logits.square().mean(), leaves)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"B": torch.zeros(5, 2, 4)}, r"B has shape \[5, 2, 4\] where x and C ask for \[5, 2, 3\]"),
        ({"dt": torch.zeros(5, 3)}, "4 query heads, 3 state heads, 2 key/value heads: each must be a multiple"),
        ({"initial_states": torch.zeros(1, 4, 6, 3)}, r"initial_states has shape \[1, 4, 6, 3\] .* \[1, 4, 5, 3\]"),
        ({"segments": Segments.build((4,))}, "x has 5 tokens and the segments 4"),
    ],
)
def test_shapes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        ssd_triton(**{**make((5,), dtype=torch.float32), "segments": Segments.build((5,)), **changes})


def test_backends(monkeypatch):
    inputs, segments = make((5,), dtype=torch.float32), Segments.build((5,))
    called = []
    for name in ("ssd_triton", "ssd_triton_pair"):
        monkeypatch.setattr(module, name, lambda *args, name=name, **kwargs: called.append(name))
    scans = [Scan(**inputs, segments=segments)] * 2
    ssd(**inputs, segments=segments)
    ssd_pair(*scans)
    assert not called
    ssd(**inputs, segments=segments, backend="triton")
    ssd_pair(*scans, backend="triton")
    with use_kernels(ssd="triton"):
        ssd(**inputs, segments=segments)
        ssd_pair(*scans)
    assert called == ["ssd_triton", "ssd_triton_pair"] * 2
