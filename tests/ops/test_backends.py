"""Which implementation of the selective scan is chosen, and what is said when it cannot run."""

import pytest
import torch
from scans import make

from linmu_hf.ops import backends
from linmu_hf.ops.segments import Segments
from linmu_hf.ops.ssd import scan as ssd_module
from linmu_hf.ops.ssd.scan import BACKENDS, ENVIRONMENT, choose_backend, ssd


def test_auto_streams_only_what_is_long(monkeypatch):
    called = []
    for name, form in BACKENDS.items():
        monkeypatch.setitem(BACKENDS, name, lambda *args, form=form, name=name: called.append(name) or form(*args))
    for lengths in ((40,), (4096,), (2, 4097)):
        inputs = make(lengths, (1, 1, 1), 1, 1, states=False, dtype=torch.float32)
        ssd(segments=Segments.build(lengths), **inputs)
    assert called == ["chunked", "chunked", "streaming"]


def test_unknown_backend():
    expected = r"backend='fast' is unknown; choose one of \['auto', 'triton', 'mamba_ssm', 'chunked'"
    with pytest.raises(ValueError, match=expected):
        ssd(**make((2,), states=False), segments=Segments.build((2,)), backend="fast")


def test_environment_names_what_auto_stands_for(monkeypatch):
    x, segments = torch.zeros(5, 1, 1), Segments.build((5,))
    monkeypatch.setenv(ENVIRONMENT, "recurrence")
    assert choose_backend(x, segments) == "recurrence"
    assert choose_backend(x, segments, "chunked") == "chunked"
    monkeypatch.setenv(ENVIRONMENT, "fast")
    with pytest.raises(ValueError, match="LINMU_SSD_BACKEND=fast is unknown"):
        choose_backend(x, segments)


@pytest.mark.parametrize("name", ["triton", "mamba_ssm"])
def test_a_named_backend_that_is_missing_says_what_to_install(monkeypatch, name):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda package: None)
    monkeypatch.setattr(backends, "_probed", {})
    with pytest.raises(ValueError, match=rf"backend='{name}' cannot run: {name} is not installed: pip install"):
        choose_backend(torch.zeros(5, 1, 1), Segments.build((5,)), name)


def test_kernels_refuse_what_they_cannot_take(monkeypatch):
    monkeypatch.setattr(backends, "_import_error", lambda package: None)
    monkeypatch.setattr(backends, "_interprets", lambda: False)
    segments = Segments.build((5,))
    with pytest.raises(ValueError, match="x is on 'cpu', and the kernels need a GPU"):
        choose_backend(torch.zeros(5, 1, 1), segments, "triton")
    with pytest.raises(ValueError, match=r"x is torch.float64, and the kernels take"):
        choose_backend(torch.zeros(5, 1, 1, dtype=torch.float64), segments, "triton")


@pytest.mark.parametrize("works", [("triton", "mamba_ssm"), ("mamba_ssm",), ()], ids=str)
def test_auto_takes_the_first_that_runs_and_says_so_once(monkeypatch, caplog, works):
    class OnGPU:
        is_cuda, device = True, "cuda:0"

    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.setattr(ssd_module, "missing", lambda name, x: None if name in works else "not here")
    monkeypatch.setattr(ssd_module, "failed_trial", lambda device, kernels: None)
    expected = (*works, "chunked")[0]
    with caplog.at_level("INFO"):
        assert {choose_backend(OnGPU(), Segments.build((5,))) for _ in range(3)} == {expected}
    assert len(caplog.records) == 1
    assert expected in caplog.text or "triton: not here; mamba_ssm: not here" in caplog.text


@pytest.mark.parametrize("failed, taken", [(["triton"], "mamba_ssm"), (["triton", "mamba_ssm"], "chunked")])
def test_auto_passes_over_kernels_that_failed_their_trial(monkeypatch, failed, taken):
    """Where Triton does not work, the kernels of mamba-ssm, which are Triton's too, may not either."""

    class OnGPU:
        is_cuda, device = True, "cuda:0"

    monkeypatch.setattr(ssd_module, "missing", lambda name, x: None)
    monkeypatch.setattr(ssd_module, "failed_trial", lambda device, kernels: "wrong" if kernels in failed else None)
    assert choose_backend(OnGPU(), Segments.build((5,))) == taken
    assert choose_backend(OnGPU(), Segments.build((5,)), "triton") == "triton"  # a named one is not second-guessed
