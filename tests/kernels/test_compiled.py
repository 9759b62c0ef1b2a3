"""
Every kernel at the sizes of a 7B model, compiled for Hopper: fits into shared memory, does not spill, and multiplies
bfloat16 by the instructions of warp groups.
"""

import os

import pytest
import torch


pytest.importorskip("triton", reason="Triton is for Linux")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from sm90 import SHARED_LIMIT, compile_launch

from linmu_hf.ops import decode_triton
from linmu_hf.ops import launch as tuning
from linmu_hf.ops.conv import triton as conv_triton
from linmu_hf.ops.segments import Scan, Segments
from linmu_hf.ops.ssd import triton as ssd_triton
from linmu_hf.ops.ssd import triton_step as ssd_triton_step


BF16, FP32 = torch.bfloat16, torch.float32
# dtype, query heads h, state heads s, key/value heads g, p, k, normalised
SIZES = {
    "softmax features": (BF16, 28, 28, 4, 128, 256, True),
    "no features": (BF16, 28, 28, 4, 128, 128, False),
    "state per key/value head": (BF16, 28, 4, 4, 128, 128, True),
    "small": (BF16, 8, 8, 2, 32, 64, True),
    "fp32": (FP32, 28, 28, 4, 128, 256, True),
}
# Bytes a thread may spill. In fp32 products do not run on tensor cores ("ieee"), and every operand is in registers:
# it is there to compare with, not to be fast.
SPILL_BUDGET = {BF16: 0, FP32: 512}


def launches(monkeypatch, dtype, h, s, g, p, k, normalized, masked=False, paired=False, choice=0):
    """
    What a forward and backward pass, a decode step and a convolution would launch, with the configuration `choice` of
    every kernel that has so many; nothing is run.
    """
    calls = []
    for module in (ssd_triton, ssd_triton_step, conv_triton, decode_triton):
        monkeypatch.setattr(
            module, "launch", lambda kernel, grid, *args, **options: calls.append((kernel, args, options))
        )
    monkeypatch.setattr(tuning, "choose", lambda configs, *_: configs[min(choice, len(configs) - 1)])
    n = 128
    segments = Segments.build((n,))
    dt, A = torch.zeros(n, s), torch.zeros(s)

    def scan():
        sizes = ((g, p), (g, k), (h, k))
        x, B, C = (torch.zeros(n, *size, dtype=dtype, requires_grad=True) for size in sizes)
        return Scan(x, dt, A, B, C, segments)

    if paired:
        (y, finals), (reverse, _) = ssd_triton.ssd_triton_pair(scan(), scan(), normalized)
        (y.sum() + finals.sum() + reverse.sum()).backward()
    else:
        x, dt, A, B, C, *_ = scan()
        y, finals = ssd_triton.ssd_triton(x, dt, A, B, C, segments, normalized=normalized)
        (y.sum() + finals.sum()).backward()
    with torch.no_grad():
        x, _, _, B, C, *_ = scan()
        ssd_triton.ssd_triton(x, dt, A, B, C, segments, normalized=normalized)  # states in the other dtype
        states = torch.zeros(n, s, p + normalized, k)
        ssd_triton_step.ssd_step_triton(x, dt, A, B, C, states, normalized=normalized)
    channels = (h + 2 * g) * p
    if s == h:
        tokens = (torch.zeros(n, heads * p, dtype=dtype) for heads in (g, g, h))
        rope = torch.zeros(2, n, p, dtype=dtype)
        directions = (torch.zeros(heads, p, k // 2, dtype=dtype) for heads in (g, h)) if normalized else (None, None)
        decode_triton.decode_triton(
            *tokens, torch.zeros(n, 3, channels, dtype=dtype), torch.zeros(4, channels), *rope, *directions,
            dt, A, A, A, torch.ones(n) if masked else None, states, 1.0,
        )  # fmt: skip
    mixed, tail = torch.zeros(n, channels, dtype=dtype, requires_grad=True), torch.zeros(1, 3, channels, dtype=dtype)
    y, _ = conv_triton.causal_conv_triton(mixed, torch.zeros(4, channels), segments, tail)
    y.sum().backward()
    unique = {
        (kernel.fn.__name__, *_dtypes(args), *sorted(options.items())): (kernel, args, options)
        for kernel, args, options in calls
    }
    return list(unique.values())


def _dtypes(args):
    return [arg.dtype for arg in args if isinstance(arg, torch.Tensor)]


@pytest.fixture
def fits(monkeypatch):
    """Compiles what `launches` gives; what spills, takes too much shared memory or has products of single warps."""

    def over(*sizes, choice=0, **how):
        found, names = [], set()
        dtype, h, s, _, p, *_ = sizes
        for kernel, args, options in launches(monkeypatch, *sizes, choice=choice, **how):
            name = kernel.fn.__name__
            names.add(name)
            if choice and choice >= len(tuning.CONFIGS.get(name, ())):
                continue
            compiled = compile_launch(kernel, args, options)
            tiles = [options[size] for size in ("BP", "BK", "num_warps", "num_stages") if size in options]
            print(f"{name:26} {tiles!s:18} {compiled}")
            slow = dtype == BF16 and p >= 64 and compiled.products[1]  # a warp group multiplies 64 rows
            if compiled.shared > SHARED_LIMIT or compiled.spilled_bytes > SPILL_BUDGET[dtype] or slow:
                found.append((name, tiles, compiled))
        assert len(names) >= 11 + (h == s), "a kernel was not launched"
        return found

    return over


CASES = [("softmax features", {"masked": True, "paired": True}), *((sizes, {}) for sizes in SIZES)]
USUAL = ("softmax features, masked, paired", "no features")
OTHERS = [
    pytest.param(sizes, marks=pytest.mark.all_configurations) for sizes in ("no features", "state per key/value head")
]


def name_of(sizes, how):
    return ", ".join((sizes, *how))


@pytest.mark.parametrize(
    "sizes, how",
    [pytest.param(*c, marks=() if name_of(*c) in USUAL else pytest.mark.all_configurations) for c in CASES],
    ids=[name_of(*case) for case in CASES],
)
def test_fits_on_hopper(fits, sizes, how):
    assert not fits(*SIZES[sizes], **how)


@pytest.mark.parametrize("choice", range(1, max(map(len, tuning.CONFIGS.values()))))
@pytest.mark.parametrize("sizes", ["softmax features", *OTHERS])
def test_every_configuration_fits_on_hopper(fits, sizes, choice):
    assert not fits(*SIZES[sizes], masked=True, paired=True, choice=choice)


def test_spills_are_seen(monkeypatch):
    """With half the warps the gradient of B does not fit into registers."""
    calls = launches(monkeypatch, *SIZES["softmax features"])
    kernel, args, options = next(call for call in calls if call[0].fn.__name__ == "b_grad_kernel")
    assert compile_launch(kernel, args, {**options, "num_warps": 4}).spilled_bytes > 0
