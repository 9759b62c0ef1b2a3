"""Model cards, the check before an upload, and the upload itself."""

from .check import check_folder
from .model_card import Origin, add_retention, find_origin, write_model_card
from .push import prepare_repo, push_folder


__all__ = [
    "Origin",
    "add_retention",
    "check_folder",
    "find_origin",
    "prepare_repo",
    "push_folder",
    "write_model_card",
]
