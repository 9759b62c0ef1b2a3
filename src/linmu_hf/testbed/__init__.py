"""A task, teachers and students of a million parameters: everything this package does, on a laptop."""

from importlib.util import find_spec


if find_spec("datasets") is None:
    raise ImportError('the testbed needs datasets: pip install "linmu-hf[testbed]"')
