"""A command prints nothing but what it has to say, although Transformers imports a torchao that complains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import linmu_hf


COMMANDS = ("convert", "distill", "evaluate", "chat", "bench", "push")


@pytest.mark.extras
def test_commands_and_imports_leave_stderr_empty():
    pytest.importorskip("torchao")
    script = f"""
import importlib, sys
for name in {COMMANDS}:
    try:
        importlib.import_module("linmu_hf.commands." + name).main(["--help"])
    except SystemExit as exit:
        assert not exit.code
import logging
logging.getLogger("torchao").warning("Failed to load on purpose")
"""
    environment = os.environ | {"PYTHONPATH": str(Path(linmu_hf.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == len(COMMANDS)
    assert done.stderr == "Failed to load on purpose\n"  # what others log later is seen
