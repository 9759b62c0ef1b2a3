import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "benchmarks" / "convert_memory.py"


@pytest.mark.slow
def test_the_peak_is_far_below_the_checkpoint(tmp_path):
    report = tmp_path / "report.json"
    command = [sys.executable, SCRIPT, "--gigabytes", "1.6", "--folder", tmp_path, "--json", report]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1] / "src")})
    assert json.loads(report.read_text())["peak_bytes"] < 1.1e9
