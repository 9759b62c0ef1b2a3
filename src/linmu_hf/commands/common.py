"""What the commands share: one flag style, one way to fail, one report."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

from ..files import write_text


# Exit codes; a traceback, which is a bug of ours, leaves 1.
DONE, REFUSED, INTERRUPTED = 0, 2, 130
DTYPES = ["auto", "float32", "bfloat16", "float16"]


class Parser(argparse.ArgumentParser):
    """
    A parser of flags in snake_case, as Transformers and TRL write them, that says in one line what is wrong.

    Earlier spellings, in kebab-case or in `renamed`, are taken with a note; `--help` omits them.
    """

    renamed: Mapping[str, str] = {}

    def error(self, message: str):
        self.exit(REFUSED, f"{self.prog}: error: {message}\n")

    def parse_known_args(self, args=None, namespace=None):
        given = [self._current(str(arg)) for arg in (sys.argv[1:] if args is None else args)]
        for flag, value in [*pairwise(given), *(arg.split("=", 1) for arg in given if "=" in arg)]:
            if flag in self._option_string_actions and value == "":
                self.error(f"{flag} is empty: give a value, or leave it out")
        return super().parse_known_args(given, namespace)

    def _current(self, arg: str) -> str:
        flag, equals, value = arg.partition("=")
        if flag in self._option_string_actions and value.startswith("~/"):  # which no shell expands there
            return f"{flag}={Path(value).expanduser()}"
        if not flag.startswith("--") or flag in self._option_string_actions or " " in flag:
            return arg
        new = "--" + flag[2:].replace("-", "_")
        new = self.renamed.get(new, new)
        if new != flag:
            note = f"{self.prog}: {flag} is written {new} now; the old spelling will go"
            print(note, file=sys.stderr)
        return f"{new}{equals}{value}"


class TypedParser(Parser, HfArgumentParser):
    """A parser of the flags of dataclasses, like `transformers.HfArgumentParser`, that shows one spelling of each."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for action in self._actions:
            action.option_strings = [flag for flag in action.option_strings if "-" not in flag[2:]]


def check_positive(arguments: argparse.Namespace, *names: str) -> None:
    """Raises a `ValueError` for the first of these numbers, or lists of numbers, that is given and below 1."""
    for name in names:
        value = getattr(arguments, name)
        lowest = min(value) if isinstance(value, list) else value
        if lowest is not None and lowest < 1:
            raise ValueError(f"--{name} {lowest} must be at least 1")


def run_command(prog: str, work: Callable[[], Any], after_interrupt: str = "") -> int:
    """
    Runs a command's work and returns its exit code; an error that a user can fix is one line, without a traceback.

    On a CPU, numbers too small for float32's ordinary form are taken as 0 meanwhile: trained features and decays can
    be full of them, and products with them take several times as long.
    """
    torch.set_flush_denormal(True)
    try:
        work()
    except (ImportError, OSError, ValueError, FloatingPointError) as error:
        print(f"{prog}: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"{prog}: interrupted{after_interrupt}", file=sys.stderr)
        return INTERRUPTED
    finally:
        torch.set_flush_denormal(False)
    return DONE


def write_report(file: str | Path | None, report: Mapping[str, Any]) -> None:
    """Writes `--json FILE`, which is either the old report or the whole new one."""
    if file is not None:
        write_text(Path(file).expanduser(), json.dumps(report, indent=2) + "\n")
