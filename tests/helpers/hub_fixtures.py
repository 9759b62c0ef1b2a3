"""A Hub on this machine, and the shipped student as users save it."""

from pathlib import Path

import pytest
from fake_hub import TOKEN, FakeHub
from huggingface_hub import constants
from huggingface_hub.utils import _http
from transformers import AutoProcessor
from transformers.utils import hub as transformers_hub

import linmu_hf
from linmu_hf import LinMUForConditionalGeneration


STUDENT = Path(linmu_hf.__file__).parent / "testbed" / "student"


@pytest.fixture
def server():
    with FakeHub() as server:
        yield server


@pytest.fixture
def hub(server, monkeypatch):
    """A Hub on this machine, to which huggingface_hub is connected as a user who has logged in."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol is not public: the fake speaks LFS
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)  # made once, for the real endpoint
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between tries
    return server


def save_student(folder):
    """Saves the testbed's student as users save it."""
    LinMUForConditionalGeneration.from_pretrained(STUDENT).save_pretrained(folder)
    AutoProcessor.from_pretrained(STUDENT).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    return save_student(tmp_path_factory.mktemp("hub") / "student")
