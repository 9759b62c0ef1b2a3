"""Runs `interpreted_*.py` in a process whose Triton interprets kernels: this one may have imported Triton already."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("triton", reason="Triton is for Linux")


def test_interpreted():
    files = [Path(__file__).with_name(f"interpreted_{kernels}.py") for kernels in ("scan", "decode", "model")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
