import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parent / "helpers"))  # tiny models, synthetic teachers, a Hub on this machine

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    # the longest first, so that one worker does not end minutes after the other
    items.sort(key=lambda item: "test_interpreted" not in item.nodeid)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
