"""Fixtures of `tests/distillation`."""

from distillation_fixtures import *  # noqa: F403
