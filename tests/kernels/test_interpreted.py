"""Runs `interpreted_*.py` in processes whose Triton interprets kernels: this one may have imported Triton already."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("triton", reason="Triton is for Linux")


@pytest.mark.parametrize("kernels", ["scan", "decode", "model"])
def test_interpreted(kernels):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        Path(__file__).parent / f"interpreted_{kernels}.py",
    ]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
