"""Which configuration a kernel runs with: found once, on scans long enough, never where a trial would do harm."""

import pytest
import torch


pytest.importorskip("triton", reason="Triton is for Linux")

from linmu_hf.ops import launch as tuning
from linmu_hf.ops.launch import CONFIGS, Config, choose, configurations
from linmu_hf.ops.ssd.triton_forward import output_kernel, pass_states_kernel


SLOW, FAST = Config(64, 64, 8, 2), Config(128, 64, 8, 2)
GPU = torch.device("cuda", 0)


@pytest.fixture
def timed(monkeypatch):
    """The configurations that were timed; `FAST` is the fastest."""
    runs = []

    def do_bench(run, **kwargs):
        run()
        return 1.0 if runs[-1] == FAST else 2.0

    monkeypatch.setattr(tuning, "_found", {})
    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return runs


def test_the_fastest_is_found_once_for_each_key(timed):
    for key in ("one", "one", "other"):
        assert choose([SLOW, FAST], (key,), 10**6, GPU, timed.append) == FAST
    assert timed == [SLOW, FAST] * 2


def test_short_scans_are_not_timed_but_use_what_was_found(timed):
    assert choose([SLOW, FAST], (), 4, GPU, timed.append) == SLOW and not timed
    choose([SLOW, FAST], (), 10**6, GPU, timed.append)
    assert choose([SLOW, FAST], (), 4, GPU, timed.append) == FAST and len(timed) == 2


@pytest.mark.parametrize("why", ["capturing", "deterministic", "cpu", "one"])
def test_where_nothing_is_timed(timed, monkeypatch, why):
    configs = [SLOW] if why == "one" else [SLOW, FAST]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: why == "capturing")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: why == "deterministic")
    device = torch.device("cpu") if why == "cpu" else GPU
    assert choose(configs, (), 10**6, device, timed.append) == SLOW
    assert not timed and not tuning._found


def test_no_tile_is_larger_than_a_head():
    assert configurations(output_kernel, 20, 5, torch.bfloat16) == [
        Config(32, 16, 8, 2), Config(32, 16, 8, 3), Config(32, 16, 4, 3)
    ]  # fmt: skip
    assert configurations(output_kernel, 128, 256, torch.bfloat16) == list(CONFIGS["output_kernel"])
    assert configurations(output_kernel, 128, 256, torch.float32) == [Config(64, 32, 8, 2)]


def test_only_kernels_that_bear_repetition_are_tuned():
    """One that works in place would go wrong in a trial."""
    assert pass_states_kernel.fn.__name__ not in CONFIGS
