import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent))

import synthetic


@pytest.fixture(scope="session")
def processor():
    return synthetic.make_processor()
