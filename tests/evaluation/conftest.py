"""Fixtures of `tests/evaluation`."""

from evaluation_fixtures import *  # noqa: F403
