"""`linmu-push`: a saved model, checked, to the Hub in one commit."""

import argparse
import json
import sys
from pathlib import Path

from huggingface_hub.utils import validate_repo_id

from ..files import write_text
from ..hub.check import check_folder
from ..hub.eval_results import write_eval_results
from ..hub.model_card import CARD, Origin, add_retention, render_model_card
from ..hub.push import files_to_upload, push_folder
from .common import Parser, run_command


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="linmu-push", description=__doc__.split(": ", 1)[1])
    parser.add_argument("folder", type=Path, help="what linmu-convert, linmu-distill or save_pretrained left")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="model on the Hub, created if it is not there")
    parser.add_argument("--private", action="store_true", default=None, help="create a private model")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, created if it is not there (default: main)")
    parser.add_argument("--commit_message", default="Upload LinMU model", help="default: %(default)s")
    parser.add_argument(
        "--retention", type=Path, metavar="FILE", help="results of linmu-eval --json, for the card and the Hub's page"
    )
    parser.add_argument("--dry_run", action="store_true", help="check the folder and list what would be uploaded")
    return parser


def run(args: argparse.Namespace) -> str:
    validate_repo_id(args.repo_id)
    check_folder(args.folder)
    if args.retention:
        card = args.folder / CARD
        text = card.read_text(encoding="utf-8") if card.is_file() else render_model_card(args.folder, Origin())
        results = _read_json(args.retention)
        text = add_retention(text, results, str(args.folder))
        if not args.dry_run:
            write_text(card, text)
            write_eval_results(args.folder, results)
    if args.dry_run:
        return "\n".join(files_to_upload(args.folder))
    commit = push_folder(
        args.folder,
        args.repo_id,
        private=args.private,
        revision=args.revision,
        commit_message=args.commit_message,
    )
    return commit.commit_url


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    again = "; the same command sends what is not there yet"
    return run_command("linmu-push", lambda: print(run(args)), again)


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"--retention {file}: there is no such file") from None
    except ValueError as error:
        raise ValueError(f"--retention {file} is no JSON ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
