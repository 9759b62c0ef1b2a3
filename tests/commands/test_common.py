"""One flag style, one way to fail, one report: what the commands share."""

import importlib
import json
import re

import pytest
import torch

from linmu_hf.commands.common import Parser, TypedParser, check_positive, run_command, write_report


COMMANDS = ("bench", "chat", "convert", "distill", "evaluate", "push")


@pytest.fixture
def parser():
    parser = Parser(prog="linmu-do")
    parser.renamed = {"--output": "--output_dir"}
    parser.add_argument("--output_dir")
    parser.add_argument("--max_new_tokens", type=int)
    parser.add_argument("question", nargs="?")
    return parser


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_one_flag_style(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"linmu_hf.commands.{name}").main(["--help"])
    assert stopped.value.code == 0
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out))
    assert flags and not {flag for flag in flags if "-" in flag[2:]}


@pytest.mark.parametrize("given", [["--output_dir", ""], ["--output_dir="], ["--output", ""]])
def test_an_empty_value_is_refused(parser, given, capsys):
    """As that of a variable of the shell which is not set."""
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(given)
    assert stopped.value.code == 2
    assert "--output_dir is empty: give a value, or leave it out" in capsys.readouterr().err


def test_home_is_found_behind_an_equals_sign(parser, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert parser.parse_args(["--output_dir=~/models/a"]).output_dir == "/home/someone/models/a"


def test_new_spellings_are_silent(parser, capsys):
    args = parser.parse_args(["--output_dir", "here", "--max_new_tokens", "3", "what --is-this -- it"])
    assert (args.output_dir, args.max_new_tokens, args.question) == ("here", 3, "what --is-this -- it")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("given", [["--output", "a", "--max-new-tokens", "3"], ["--output=a", "--max-new-tokens=3"]])
def test_old_spellings_are_taken_with_a_note(parser, given, capsys):
    args = parser.parse_args(given)
    assert (args.output_dir, args.max_new_tokens) == ("a", 3)
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 2 and "--output_dir" in notes[0] and "--max_new_tokens" in notes[1]


@pytest.mark.parametrize("flags", [["--unknown", "1"], ["--max_new_tokens", "many"]])
def test_usage_errors_are_one_line(parser, flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("linmu-do: error: ") and error.count("\n") == 1


def test_typed_flags_too(capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("linmu_hf.commands.distill").main(["--model", "here"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "--dataset" in error and error.count("\n") == 1
    assert issubclass(TypedParser, importlib.import_module("transformers").HfArgumentParser)


def test_exit_codes(capsys):
    def fail(error):
        raise error

    assert run_command("linmu-do", lambda: None) == 0
    assert run_command("linmu-do", lambda: fail(ValueError("two\nlines"))) == 2
    assert capsys.readouterr().err == "linmu-do: error: two lines\n"
    assert run_command("linmu-do", lambda: fail(KeyboardInterrupt()), "; go on") == 130
    assert capsys.readouterr().err == "linmu-do: interrupted; go on\n"
    with pytest.raises(ZeroDivisionError):  # a bug of ours: its traceback is wanted
        run_command("linmu-do", lambda: 1 / 0)


def test_counts_must_be_positive(parser):
    args = parser.parse_args(["--max_new_tokens", "0"])
    with pytest.raises(ValueError, match="--max_new_tokens 0 must be at least 1"):
        check_positive(args, "max_new_tokens")
    check_positive(parser.parse_args([]), "max_new_tokens")


def test_a_report_is_old_or_new(tmp_path):
    file = tmp_path / "report.json"
    write_report(file, {"accuracy": 1})
    with pytest.raises(TypeError):
        write_report(file, {"accuracy": object()})
    assert json.loads(file.read_text()) == {"accuracy": 1}
    write_report(None, {})


def test_numbers_too_small_for_their_ordinary_form_are_zero_while_a_command_runs():
    small = torch.tensor(1e-40)
    seen = []
    assert run_command("linmu-x", lambda: seen.append((small * 1).item())) == 0
    assert seen == [0.0] and (small * 1).item() > 0
