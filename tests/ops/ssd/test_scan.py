"""Every form of the selective scan against the recurrence, and the recurrence against a matrix written down here."""

from functools import partial

import pytest
import torch
from scans import HEADS, assert_same, make, run
from torch.utils._python_dispatch import TorchDispatchMode

from linmu_hf.ops.segments import Scan, Segments
from linmu_hf.ops.ssd import plain as ssd_torch
from linmu_hf.ops.ssd.plain import _count, _pieces, _superchunks, ssd_chunked, ssd_recurrence
from linmu_hf.ops.ssd.scan import PLAIN, ssd, ssd_pair, ssd_step


LENGTHS = [(1,), (63,), (64,), (65,), (200,), (1, 63, 64, 65, 200), (64, 64), (1, 1, 1)]
FAST = {
    "chunked": ssd_chunked,
    "superchunks of 48": partial(ssd_chunked, superchunk=48),
    "superchunks of 200": partial(ssd_chunked, superchunk=200),
    "pieces of 48 in superchunks of 200": partial(ssd_chunked, piece=48, superchunk=200),
    "one piece": partial(ssd_chunked, piece=10**6, superchunk=10**6),
}


def quadratic(x, dt, A, B, C, initial_states=None):
    """One segment as masked attention: y = (L o C B^T) diag(dt) x, with L the decay from one token to another."""
    n, h, s, g = len(x), C.shape[1], dt.shape[1], x.shape[1]
    state_of = torch.arange(h) // (h // s)
    group_of = torch.arange(s) // (s // g)
    a = torch.cumsum(dt * A, 0)[:, state_of]
    causal = torch.ones(n, n, dtype=torch.bool).tril()[..., None]
    weights = torch.exp((a[:, None] - a[None]).where(causal, -torch.inf)) * dt[None, :, state_of]
    weights = weights * torch.einsum("ihk,jhk->ijh", C, B[:, group_of[state_of]])
    y = torch.einsum("ijh,jhp->ihp", weights, x[:, group_of[state_of]])
    a = torch.cumsum(dt * A, 0)
    final = torch.einsum("js,jsp,jsk->spk", torch.exp(a[-1] - a) * dt, x[:, group_of], B[:, group_of])
    if initial_states is not None:
        y = y + torch.einsum("ihk,ih,hpk->ihp", C, torch.exp(a)[:, state_of], initial_states[0, state_of])
        final = final + torch.exp(a[-1])[:, None, None] * initial_states[0]
    return y, final[None]


@pytest.mark.parametrize("states", [False, True], ids=["from zero", "from states"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_recurrence_is_the_matrix_form(heads, states):
    inputs = make((37,), heads, states=states)
    expected = run(lambda segments, **kwargs: quadratic(**kwargs), inputs, (37,))
    assert_same(run(ssd_recurrence, inputs, (37,)), expected)


@pytest.mark.parametrize("states", [False, True], ids=["from zero", "from states"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("form", FAST.values(), ids=FAST)
def test_lengths(form, lengths, states):
    inputs = make(lengths, states=states)
    assert_same(run(form, inputs, lengths), run(ssd_recurrence, inputs, lengths))


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("form", FAST.values(), ids=FAST)
@pytest.mark.parametrize("sizes", [(4, 8), (8, 4), (1, 1)], ids="p, k = {0[0]}, {0[1]}".format)
def test_heads_and_sizes(form, heads, sizes):
    inputs = make((30, 70), heads, *sizes)
    assert_same(run(form, inputs, (30, 70)), run(ssd_recurrence, inputs, (30, 70)))


@pytest.mark.parametrize("chunk_size", [1, 16, 64, 256])
def test_chunk_size_does_not_matter(chunk_size):
    inputs = make((1, 65, 130))
    assert_same(run(ssd_chunked, inputs, (1, 65, 130), chunk_size), run(ssd_recurrence, inputs, (1, 65, 130)))


@pytest.mark.parametrize("form", FAST.values(), ids=FAST)
def test_float32_is_close_to_float64(form):
    lengths = (1, 63, 64, 65, 200)
    inputs = make(lengths)
    single = {name: tensor.detach().float().requires_grad_() for name, tensor in inputs.items()}
    expected = run(ssd_recurrence, inputs, lengths)
    assert_same({k: v.double() for k, v in run(form, single, lengths).items()}, expected, rtol=1e-5)


@pytest.mark.parametrize("form", [ssd_recurrence, *FAST.values()], ids=["recurrence", *FAST])
def test_gradcheck(form):
    inputs = make((3, 5), (2, 2, 1), 2, 3)
    segments = Segments.build((3, 5), chunk_size=2)

    def scan(*tensors):
        return form(segments=segments, **dict(zip(inputs, tensors)))

    assert torch.autograd.gradcheck(scan, tuple(inputs.values()))


@pytest.mark.parametrize("form", FAST.values(), ids=FAST)
def test_decays_over_a_thousand_tokens_stay_finite(form):
    """Strong decay: differences of running sums must be taken before the exponential."""
    inputs = make((1100,), states=False, dtype=torch.float32)
    inputs["A"] = (inputs["A"] * 50).detach().requires_grad_()
    result = run(form, inputs, (1100,))
    assert all(value.isfinite().all() for value in result.values())
    expected = run(ssd_recurrence, inputs, (1100,))
    assert_same(result, expected, rtol=1e-4)


# decay of one token, as powers of e: nothing at all, underflow within a chunk, underflow in one step, overflow of the
# sum of a chunk's steps taken in the wrong direction
DECAYS = {"none": 0.0, "slow": 1e-6, "exp(-64 x 2)": 2.0, "exp(-90)": 90.0, "exp(-1000)": 1000.0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
@pytest.mark.parametrize("form", FAST.values(), ids=FAST)
def test_extreme_decays(form, decay, dtype):
    """Values and gradients, of each head by itself: a head that remembers must not hide one that forgets."""
    lengths = (130, 70)
    inputs = make(lengths, (2, 2, 1), dtype=torch.float64)
    with torch.no_grad():
        inputs["dt"].fill_(1.0)
        inputs["A"].copy_(torch.tensor([-decay, -decay / 2]))
    expected = run(ssd_recurrence, inputs, lengths)
    actual = run(form, {name: t.detach().to(dtype).requires_grad_() for name, t in inputs.items()}, lengths)
    # what fp32 cannot hold is to be zero
    expected = {name: value.to(dtype) for name, value in expected.items()}
    assert_same(actual, expected, rtol={torch.float64: 1e-10, torch.float32: 2e-5}[dtype])


@pytest.mark.parametrize("form", FAST.values(), ids=FAST)
def test_decays_of_every_kind_in_one_chunk(form):
    """A token that wipes the state out between tokens that keep it, step sizes of zero among them."""
    lengths = (150,)
    inputs = make(lengths, (2, 2, 1))
    with torch.no_grad():
        inputs["dt"][::7] = 0.0
        inputs["dt"][::10] = 50.0
        inputs["A"].copy_(torch.tensor([-4.0, -0.01]))
    expected = run(ssd_recurrence, inputs, lengths)
    assert_same(run(form, inputs, lengths), expected)


@pytest.mark.parametrize("form", FAST.values(), ids=FAST)
def test_the_gradient_of_a_decay_that_leaves_nothing_is_nothing(form):
    """What a token adds to its own output does not decay; rounding there must not look like a gradient."""
    inputs = make((100,), (1, 1, 1), states=False, dtype=torch.float32)
    with torch.no_grad():
        inputs["dt"].fill_(1.0)
        inputs["A"].fill_(-200.0)
    assert run(form, inputs, (100,))["d A"].abs().max() < 1e-30


@pytest.mark.parametrize("form", FAST.values(), ids=FAST)
def test_only_some_gradients_are_asked_for(form):
    inputs = make((70,))
    expected = run(ssd_recurrence, inputs, (70,))
    segments = Segments.build((70,))
    for name in inputs:
        alone = {key: tensor.detach().requires_grad_(key == name) for key, tensor in inputs.items()}
        y, finals = form(segments=segments, **alone)
        generator = torch.Generator().manual_seed(1)
        loss = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in (y, finals))
        loss.backward()
        torch.testing.assert_close(alone[name].grad, expected[f"d {name}"])


@pytest.mark.parametrize("form", FAST.values(), ids=FAST)
def test_gradient_of_the_states_alone(form):
    inputs = make((70, 5))
    grads = [
        torch.autograd.grad(scan(segments=Segments.build((70, 5)), **inputs)[1].square().sum(), inputs["x"])[0]
        for scan in (form, ssd_recurrence)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("steps", [(1,), (3, 1, 1), (5,), (4, 4, 2), (7, 3, 3, 1)], ids=str)
@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_pieces_cover_the_chunks_in_their_order(steps, most):
    pieces = _pieces(steps, most)
    visited = [(row.start, row.stop) for piece in pieces for row in piece]
    assert all(0 < sum(row.stop - row.start for row in piece) <= most for piece in pieces)
    segments = [segment for start, stop in visited for segment in range(start, stop)]
    assert segments == [segment for count in steps for segment in range(count)]


@pytest.mark.parametrize("most", [1, 3, 100])
def test_superchunks_are_whole_pieces(most):
    pieces = _pieces((7, 3, 3, 1), 2)
    groups = _superchunks(pieces, most)
    assert [piece for group in groups for piece in group] == pieces
    assert all(len(group) == 1 or sum(map(_count, group)) <= most for group in groups)


def test_what_is_kept_for_the_backward_pass():
    """Besides the inputs one state for each superchunk, at any length; none for segments that begin at zero."""

    def kept(lengths, **how):
        """Bytes in all that are no inputs, and bytes of states."""
        inputs = make(lengths, (2, 2, 2), 3, 5, states=False, dtype=torch.float32)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            ssd_chunked(segments=Segments.build(lengths, chunk_size=64), superchunk=1024, **how, **inputs)
        states = sum(t.nbytes for t in saved if t.shape[1:] == (2, 3, 5))
        return sum(t.nbytes for t in saved) - sum(t.nbytes for t in inputs.values()), states

    state = 2 * 3 * 5 * 4
    for piece in (64, 512):
        found = [kept((n,), piece=piece) for n in (1024, 4096, 16384)]
        assert found == [(0, 0), (3 * state, 3 * state), (15 * state, 15 * state)]
    assert kept((64,) * 64)[1] == 0
    assert kept((128,) * 16)[1] == 16 * state  # the second chunks of 16 segments


def test_memory_between_inputs_and_outputs_does_not_grow():
    """Apart from those with a value for every token, the largest tensor is the same at four times the length."""
    sizes = {}
    for n in (16384, 32768):
        inputs = make((n,), (2, 2, 2), 3, 3, states=False, dtype=torch.float32)
        segments = Segments.build((n,), chunk_size=64)
        with Largest(below=n * 2) as watch, torch.no_grad():
            ssd_chunked(segments=segments, piece=128, **inputs)
        sizes[n] = watch.largest
    assert sizes[16384] == sizes[32768] > 0


class Largest(TorchDispatchMode):
    """Elements of the largest new tensor that is smaller than the step sizes."""

    def __init__(self, below):
        super().__init__()
        self.below, self.largest = below, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out._base is None and out.numel() < self.below:
            self.largest = max(self.largest, out.numel())
        return out


def test_step_is_the_recurrence():
    b, lengths = 3, (9, 9, 9)
    inputs = make(lengths, (8, 4, 2))
    y, finals = ssd_recurrence(segments=Segments.build(lengths), **inputs)
    states = inputs.pop("initial_states")
    A = inputs.pop("A")
    rows = {name: tensor.unflatten(0, (b, 9)) for name, tensor in inputs.items()}
    outputs = []
    for t in range(9):
        now = {name: tensor[:, t] for name, tensor in rows.items()}
        out, states = ssd_step(A=A, states=states, **now)
        outputs.append(out)
    torch.testing.assert_close(torch.stack(outputs, 1).flatten(0, 1), y)
    torch.testing.assert_close(states, finals)


@pytest.mark.parametrize("form", FAST.values(), ids=FAST)
def test_segments_do_not_see_one_another(form):
    lengths = (20, 70, 1, 33)
    inputs = make(lengths)
    packed, finals = form(segments=Segments.build(lengths), **inputs)
    start = 0
    for i, length in enumerate(lengths):
        rows = slice(start, start + length)
        alone = {name: tensor[rows] for name, tensor in inputs.items() if name not in ("A", "initial_states")}
        y, final = form(
            A=inputs["A"],
            initial_states=inputs["initial_states"][i : i + 1],
            segments=Segments.build([length]),
            **alone,
        )
        torch.testing.assert_close(packed[rows], y)
        torch.testing.assert_close(finals[i : i + 1], final)
        start += length


@pytest.fixture
def nan_filled_memory():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("form", FAST.values(), ids=FAST)
def test_uninitialised_memory_does_not_leak(form, nan_filled_memory):
    assert torch.empty(3).isnan().all()
    inputs = make((1, 63, 64, 65))
    assert_same(run(form, inputs, (1, 63, 64, 65)), run(ssd_recurrence, inputs, (1, 63, 64, 65)))


@pytest.mark.parametrize("backend", ["auto", *PLAIN])
def test_half_precision_in_and_out_states_in_float32(backend):
    inputs = make((40, 3), dtype=torch.float32)
    half = {name: t.detach().bfloat16() if name in "xBC" else t.detach() for name, t in inputs.items()}
    y, finals = ssd(segments=Segments.build((40, 3)), backend=backend, **half)
    assert (y.dtype, finals.dtype) == (torch.bfloat16, torch.float32)
    exact, exact_finals = ssd_recurrence(
        segments=Segments.build((40, 3)), **{name: t.double() for name, t in half.items()}
    )
    torch.testing.assert_close(finals.double(), exact_finals, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y.double(), exact, atol=1e-5, rtol=2**-8)


@pytest.mark.parametrize("backend", ["auto", *PLAIN])
def test_autocast_does_not_lower_the_precision_of_the_scan(backend):
    inputs = make((40, 70), dtype=torch.float32)
    segments = Segments.build((40, 70))
    with torch.autocast("cpu", torch.bfloat16):
        y, finals = ssd(segments=segments, backend=backend, **inputs)
    expected, expected_finals = ssd_recurrence(segments=segments, **inputs)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(finals, expected_finals, atol=1e-4, rtol=1e-4)


def test_autocast_does_not_lower_the_precision_of_a_step():
    inputs = make((3,), dtype=torch.float32)
    inputs["states"] = inputs.pop("initial_states").expand(3, -1, -1, -1)
    with torch.autocast("cpu", torch.bfloat16):
        actual = ssd_step(**inputs)
    torch.testing.assert_close(actual, ssd_step(**inputs))


@pytest.mark.parametrize("backend", ["auto", *PLAIN])
def test_normalized_is_a_channel_of_ones(backend):
    inputs = make((5, 70))
    states = torch.rand(2, 4, 6, 3, dtype=torch.float64)
    inputs["B"], inputs["C"] = inputs["B"].detach().abs(), inputs["C"].detach().abs()
    inputs["initial_states"] = states
    segments = Segments.build((5, 70))
    y, finals = ssd(**inputs, segments=segments, normalized=True, backend=backend)
    x = torch.cat([inputs["x"], torch.ones(75, 2, 1)], dim=-1)
    expected, expected_finals = ssd_recurrence(**{**inputs, "x": x}, segments=segments)
    torch.testing.assert_close(y, expected[..., :-1] / expected[..., -1:])
    torch.testing.assert_close(finals, expected_finals)

    steps = {name: inputs[name][:2] for name in ("x", "dt", "B", "C")}
    y, new_states = ssd_step(**steps, A=inputs["A"], states=states, normalized=True)
    expected, expected_states = ssd_step(**{**steps, "x": x[:2]}, A=inputs["A"], states=states)
    torch.testing.assert_close(y, expected[..., :-1] / expected[..., -1:])
    torch.testing.assert_close(new_states, expected_states)


def test_normalized_divides_in_full_precision():
    """A sum of 2048 ones is 2048 in bf16, and so is one of 2049."""
    n = 3000
    ones = torch.ones(n, 1, 1, dtype=torch.bfloat16)
    y, _ = ssd(ones, torch.ones(n, 1), torch.full((1,), -1e-9), ones, ones, Segments.build((n,)), normalized=True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, torch.ones_like(y), atol=0, rtol=0)


@pytest.mark.parametrize("products", ["of this CPU", "in float32"])
def test_normalized_in_bfloat16(products, monkeypatch):
    """Without gradients, and as positive features make it: products may be in bfloat16, states are in float32."""
    if products == "in float32":
        monkeypatch.setattr(ssd_torch, "multiplies_in_bfloat16", lambda x: False)
    lengths = (5, 300, 130)
    inputs = {name: t.detach() for name, t in make(lengths, p=16, k=32, states=False, dtype=torch.float32).items()}
    inputs |= {name: inputs[name].softmax(-1) for name in "BC"}
    half = inputs | {name: inputs[name].bfloat16() for name in "xBC"}
    segments = Segments.build(lengths)
    y, finals = ssd(segments=segments, backend="chunked", normalized=True, **half)
    exact, exact_finals = ssd(
        segments=segments, backend="recurrence", normalized=True, **{k: t.double() for k, t in half.items()}
    )
    assert (y.dtype, finals.dtype) == (torch.bfloat16, torch.float32)
    assert (y.double() - exact).norm() < 0.01 * exact.norm()
    assert (finals - exact_finals).norm() < (0.005 if products == "of this CPU" else 1e-5) * exact_finals.norm()


def test_normalized_is_the_same_with_and_without_gradients():
    inputs, segments = make((5, 70)), Segments.build((5, 70))
    inputs["initial_states"] = torch.rand(2, 4, 6, 3, dtype=torch.float64)
    inputs |= {name: inputs[name].detach().softmax(-1) for name in "BC"}
    with_gradients = ssd(segments=segments, backend="chunked", normalized=True, **inputs)
    with torch.no_grad():
        without = ssd(segments=segments, backend="chunked", normalized=True, **inputs)
    for one, other in zip(with_gradients, without):
        assert one.requires_grad and not other.requires_grad
        torch.testing.assert_close(one, other)


def test_a_pair_is_two_scans():
    inputs = [make(lengths) for lengths in ((5, 70), (64,))]
    scans = [Scan(segments=Segments.build(n), **one) for n, one in zip(((5, 70), (64,)), inputs)]
    for results, scan in zip(ssd_pair(*scans), scans):
        for actual, expected in zip(results, ssd(**scan._asdict())):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("lengths", [(1,), (64, 128), (5, 64, 1), (16, 32), (128,)], ids=str)
def test_segments_are_cut_into_whole_chunks(lengths):
    segments = Segments.build(lengths)
    assert segments.lengths == lengths and len(segments) == len(lengths)
    size = segments.chunk_size
    chunks = [-(-length // size) for length in lengths]
    assert segments.steps == tuple(sum(count > i for count in chunks) for i in range(max(chunks)))
    slots = list(range(sum(lengths))) if segments.slots is None else segments.slots.tolist()
    # chunk i of every segment is in block i, at the segment's place among the longest first
    longest_first = sorted(range(len(lengths)), key=lambda segment: -chunks[segment])
    expected = []
    for segment, length in enumerate(lengths):
        for t in range(length):
            block = sum(segments.steps[: t // size]) + longest_first.index(segment)
            expected.append(block * size + t % size)
    assert slots == expected
