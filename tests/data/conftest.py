import pytest
import synthetic


@pytest.fixture(scope="session")
def processor():
    return synthetic.make_processor()
