"""Which kernels are chosen, and what is said when they cannot run."""

import pytest
import torch
from scans import make

from linmu_hf.ops import backends
from linmu_hf.ops.backends import read_environment, use_kernels
from linmu_hf.ops.segments import Segments
from linmu_hf.ops.ssd import scan as ssd_module
from linmu_hf.ops.ssd.scan import PLAIN, choose_backend, ssd, use_triton_kernels


class OnGPU:
    is_cuda, device, dtype = True, "cuda:0", torch.float32


X = torch.zeros(5, 1, 1)


def test_unknown_kernels_are_told_from_known_ones():
    with pytest.raises(ValueError, match=r"ssd=fast are unknown; choose from ssd=auto\|triton\|mamba_ssm\|chunked"):
        ssd(**make((2,), states=False), segments=Segments.build((2,)), backend="fast")
    with pytest.raises(ValueError, match="conv=triton are unknown"), use_kernels(conv="triton"):
        pass


def test_kernels_are_named_for_a_while():
    with use_kernels(ssd="recurrence"):
        assert choose_backend(X) == "recurrence"
        assert choose_backend(X, "chunked") == "chunked"
        with use_kernels(window="sdpa", ssd="chunked"):
            assert choose_backend(X) == "chunked"
        assert choose_backend(X) == "recurrence"
    with pytest.raises(KeyError), use_kernels(ssd="recurrence"):
        raise KeyError
    assert choose_backend(X) == "chunked"


def test_the_environment_names_kernels(monkeypatch):
    monkeypatch.delenv("LINMU_KERNELS", raising=False)
    assert read_environment() == {"ssd": "auto", "window": "auto"}
    monkeypatch.setenv("LINMU_KERNELS", "ssd=chunked, window=sdpa")
    assert read_environment() == {"ssd": "chunked", "window": "sdpa"}
    for wrong in ("ssd=fast", "chunked"):
        monkeypatch.setenv("LINMU_KERNELS", wrong)
        with pytest.raises(ValueError, match=f"{wrong}.* unknown; choose from"):
            read_environment()


@pytest.mark.parametrize("name", ["triton", "mamba_ssm"])
def test_named_kernels_that_are_missing_say_what_to_install(monkeypatch, name):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda package: None)
    monkeypatch.setattr(backends, "_probed", {})
    with pytest.raises(ValueError, match=rf"ssd={name} cannot run: {name} is not installed: pip install"):
        choose_backend(X, name)


def test_kernels_refuse_what_they_cannot_take(monkeypatch):
    monkeypatch.setattr(backends, "_import_error", lambda package: None)
    monkeypatch.setattr(backends, "_interprets", lambda: False)
    with pytest.raises(ValueError, match="x is on 'cpu', and the kernels need a GPU"):
        choose_backend(X, "triton")
    with pytest.raises(ValueError, match=r"x is torch.float64, and the kernels take"):
        choose_backend(X.double(), "triton")


@pytest.mark.parametrize("missing, wrong", [(None, None), ("not here", None), (None, "wrong on cuda:0")])
def test_auto_takes_kernels_that_run_and_are_right_and_says_so_once(monkeypatch, caplog, missing, wrong):
    monkeypatch.setattr(backends, "_logged", set())
    monkeypatch.setattr(ssd_module, "why_unavailable", lambda name, x: missing)
    monkeypatch.setattr(ssd_module, "failed_self_check", lambda kernels, device: wrong)
    expected = "chunked" if missing or wrong else "triton"
    with caplog.at_level("INFO"):
        assert {choose_backend(OnGPU()) for _ in range(3)} == {expected}
        assert use_triton_kernels(OnGPU()) == (expected == "triton")
    assert len(caplog.records) == 1
    assert f"ssd: {expected}" in caplog.text and (missing or wrong or "") in caplog.text
    if missing is None:  # named ones are not second-guessed
        assert choose_backend(OnGPU(), "triton") == "triton"


def test_other_kernels_that_are_named_leave_ours_out_altogether(monkeypatch):
    monkeypatch.setattr(ssd_module, "why_unavailable", lambda name, x: None)
    for name in ("mamba_ssm", *PLAIN):
        with use_kernels(ssd=name):
            assert not use_triton_kernels(OnGPU())
    with use_kernels(ssd="triton"):
        assert use_triton_kernels(OnGPU()) and not use_triton_kernels(X)
