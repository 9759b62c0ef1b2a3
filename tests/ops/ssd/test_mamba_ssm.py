"""The adapter to mamba-ssm against the recurrence; a stand-in for the package takes what its kernels take."""

import importlib
import sys
from types import ModuleType

import pytest
from scans import HEADS, assert_same, make, run

from linmu_hf.ops import backends
from linmu_hf.ops.segments import Segments
from linmu_hf.ops.ssd.mamba_ssm import check_offsets, ssd_mamba_ssm
from linmu_hf.ops.ssd.plain import ssd_recurrence


@pytest.fixture
def calls(monkeypatch):
    """Shapes of x in the calls of `mamba_chunk_scan_combined`."""
    shapes = []

    def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, initial_states=None, return_final_states=False):
        shapes.append(tuple(x.shape))
        b, t, h, _ = x.shape
        assert B.shape == C.shape and dt.shape == (b, t, h) and A.shape == (h,) and return_final_states
        assert initial_states.shape == (b, h, x.shape[-1], B.shape[-1]) and initial_states.is_contiguous()
        y, finals = ssd_recurrence(
            *(tensor.flatten(0, 1) for tensor in (x, dt)), A, *(tensor.flatten(0, 1) for tensor in (B, C)),
            Segments.build([t] * b), initial_states,
        )  # fmt: skip
        return y.unflatten(0, (b, t)), finals

    stand_in = ModuleType("mamba_ssm.ops.triton.ssd_combined")
    stand_in.mamba_chunk_scan_combined = mamba_chunk_scan_combined
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    return shapes


@pytest.mark.parametrize("states", [False, True], ids=["from zero", "from states"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_adapter(calls, heads, states):
    lengths = (7, 3, 7, 1, 3)
    inputs = make(lengths, heads, states=states)
    low = {name: tensor.detach().float().requires_grad_() for name, tensor in inputs.items()}
    actual = {name: value.double() for name, value in run(ssd_mamba_ssm, low, lengths).items()}
    assert_same(actual, run(ssd_recurrence, inputs, lengths), rtol=1e-5)
    assert [shape[:2] for shape in calls] == [(1, 1), (2, 3), (2, 7)]


def test_more_than_its_offsets_reach_is_refused(calls):
    """At a 7B model 599k tokens, and half of it with twice the state size; short segments fill chunks of their own."""
    check_offsets((599_000,), 28, 128, 128)
    check_offsets((297_000,), 28, 128, 256)
    for lengths, k in (((600_000,), 128), ((300_000,), 256), ((150_000, 150_000), 256), ((1,) * 2_400, 256)):
        with pytest.raises(ValueError, match=f"{sum(lengths)} tokens in .* use 'triton' or 'chunked'"):
            check_offsets(lengths, 28, 128, k)
    # heads of the model that the fault was reported with, from about 61k tokens
    check_offsets((61_000,), 256, 64, 128)
    with pytest.raises(ValueError, match="reach 511 chunks of 128 tokens at 256 heads"):
        check_offsets((66_000,), 256, 64, 128)
    inputs = make((3,), (2**20, 1, 1), 2, 2, states=False)
    with pytest.raises(ValueError, match="use 'triton' or 'chunked'"):
        ssd_mamba_ssm(segments=Segments.build((3,)), **inputs)
    assert not calls


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Writes a package `mamba_ssm` with the given `__init__` and kernels, and forgets it afterwards."""

    def write(init, kernels="mamba_chunk_scan_combined = 'the kernel'"):
        folder = tmp_path / "mamba_ssm" / "ops" / "triton"
        folder.mkdir(parents=True)
        (tmp_path / "mamba_ssm" / "__init__.py").write_text(init)
        for path in (folder.parent, folder):
            (path / "__init__.py").write_text("")
        (folder / "ssd_combined.py").write_text(kernels)
        importlib.invalidate_caches()

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
            del sys.modules[name]

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(backends, "_probed", {})
    forget()
    yield write
    forget()


@pytest.mark.parametrize("init", ["", "import an_extension_that_was_not_built"], ids=["whole", "without extension"])
def test_the_kernels_are_found(package, init):
    package(init)
    assert backends._import_error("mamba_ssm") is None
    assert backends.import_kernels("mamba_ssm").mamba_chunk_scan_combined == "the kernel"
    if init:  # a broken package stays broken for everybody else
        with pytest.raises(ModuleNotFoundError, match="an_extension_that_was_not_built"):
            importlib.import_module("mamba_ssm")


def test_a_package_that_imports_stays_when_its_kernels_do_not(package):
    package("", "import something_else")
    whole = importlib.import_module("mamba_ssm")
    assert "No module named 'something_else'" in backends._import_error("mamba_ssm")
    assert sys.modules["mamba_ssm"] is whole


def test_kernels_that_do_not_import_are_missing(package):
    package("import an_extension_that_was_not_built", "import something_else")
    assert "does not import (ModuleNotFoundError: No module named 'something_else'): pip install mamba-ssm" in (
        backends._import_error("mamba_ssm")
    )
