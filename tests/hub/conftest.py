"""Fixtures of `tests/hub`."""

from hub_fixtures import *  # noqa: F403
