"""`linmu-convert`: a Qwen2.5-VL or NVILA checkpoint in, a LinMU checkpoint out."""

import argparse
import json
import sys
import types
import typing
from dataclasses import Field, fields
from functools import partial
from pathlib import Path

from ..conversion.choose_layers import AUTO
from ..conversion.convert import check_output, convert
from ..conversion.plan import FLOAT_DTYPES
from ..conversion.teacher import load_processor
from ..data import check_dataset, choose_split, encode_rows, load_rows
from ..files import check_report, write_text
from ..hub import find_origin, prepare_repo, push_folder, write_model_card
from ..modeling.configuration_linmu import MIXER_FIELDS, PRESETS, LinMUTextConfig
from .common import Parser, run_command, write_report


# Left in the output with --push_to_hub: which command wrote it, and its report. It is not uploaded.
RECORD = "conversion_command.json"
# Arguments that do not change what is written.
HOW = (
    "json", "push_to_hub", "hub_private_repo", "hub_revision", "overwrite_output_dir", "dry_run", *MIXER_FIELDS
)  # fmt: skip
# Flags of the release before.
RENAMED = {"--output": "--output_dir", "--overwrite": "--overwrite_output_dir", "--private": "--hub_private_repo"}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="linmu-convert",
        description="Replaces the self-attention of Qwen2.5-VL or NVILA by M-MATE blocks that reuse its weights.",
    )
    parser.renamed = RENAMED
    parser.add_argument("--teacher", required=True, help="folder, or model on the Hub")
    parser.add_argument("--output_dir", required=True, help="folder to be written")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--dtype", choices=sorted(FLOAT_DTYPES), help="default: the teacher's")
    parser.add_argument(
        "--keep_attention",
        type=_layers,
        default=(),
        metavar="LAYERS",
        help='layers such as 3,11, "all", or "auto:K" for the K whose replacement costs most, found by --calibrate',
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), default="default", help="choices inside M-MATE")
    parser.add_argument("--max_shard_size", default="2GB", help="largest weight file (default: %(default)s)")
    parser.add_argument("--calibrate", metavar="DATASET", help="closed-form start on samples of this dataset")
    parser.add_argument("--calibrate_samples", type=int, default=64, help="how many (default: %(default)s)")
    parser.add_argument(
        "--calibrate_steps", type=int, default=0,
        help="of Adam in each layer, for what the scan reads and how it is joined (default: none)",
    )  # fmt: skip
    parser.add_argument("--calibrate_split", help="of that dataset, by default train; a single file is read whole")
    parser.add_argument("--dry_run", action="store_true", help="check everything and report, write nothing")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace a model that is there")
    parser.add_argument("--json", metavar="FILE", help="write the report there too")
    parser.add_argument("--push_to_hub", metavar="ORG/NAME", help="upload the result to this model on the Hub")
    parser.add_argument("--hub_private_repo", action="store_true", default=None, help="with --push_to_hub: private")
    parser.add_argument("--hub_revision", metavar="BRANCH", help="with --push_to_hub: branch (default: main)")
    group = parser.add_argument_group("M-MATE options", "over the preset; lists as 16,4,4; none for None")
    kinds = {field.name: field for field in fields(LinMUTextConfig)}
    for name in MIXER_FIELDS:
        shown = f"default: {_shown(PRESETS['default'].get(name, kinds[name].default))}"
        group.add_argument(f"--{name}", type=_reader(kinds[name]), default=argparse.SUPPRESS, help=shown)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    options = {name: getattr(args, name) for name in MIXER_FIELDS if hasattr(args, name)}
    again = "; the same command takes it up again"
    return run_command("linmu-convert", lambda: write_report(args.json, run(args, options)), again)


def run(args: argparse.Namespace, options: dict) -> dict:
    record = {name: value for name, value in vars(args).items() if name not in HOW} | {"options": options}
    _check_push(args)
    _check_calibration(args)
    if options and args.keep_attention == "all":
        raise ValueError(f"--{next(iter(options))} has no effect with --keep_attention all: no layer gets M-MATE")
    if args.revision and Path(args.teacher).expanduser().is_dir():
        raise ValueError(f"--revision {args.revision} has no effect on the folder {args.teacher}: leave it out")
    finished = _finished(args, record)
    if finished is not None:
        print(f"{args.output_dir} was converted before, by the same command")
        _push(args, prepare_repo(args.push_to_hub, private=args.hub_private_repo, revision=args.hub_revision))
        return finished

    check_output(args.output_dir, args.overwrite_output_dir, args.teacher)
    check_report(args.json)
    settings = {
        "dtype": args.dtype,
        "keep_attention": args.keep_attention,
        "preset": args.preset,
        "mixer_options": options,
        "revision": args.revision,
        "max_shard_size": args.max_shard_size,
        "calibration_steps": args.calibrate_steps,
        "overwrite": args.overwrite_output_dir,
    }
    repo = None
    batches: list | None = [] if args.calibrate else None
    if str(args.keep_attention).startswith(AUTO) and (args.dry_run or not args.calibrate):
        raise ValueError(
            f"--keep_attention {args.keep_attention} is chosen on data: it needs --calibrate, and no --dry_run"
        )
    if args.calibrate or args.push_to_hub:
        # the teacher's errors before all others
        convert(args.teacher, args.output_dir, **settings, dry_run=True, calibration_batches=batches)
        batches = load_batches(args) if args.calibrate else None
    if args.push_to_hub:
        repo = prepare_repo(args.push_to_hub, private=args.hub_private_repo, revision=args.hub_revision)
    write_card = partial(write_model_card, origin=find_origin(args.teacher, args.revision))
    report = convert(
        args.teacher,
        args.output_dir,
        **settings,
        calibration_batches=batches,
        dry_run=args.dry_run,
        finish_folder=write_card,
    )
    print(report)
    if repo:
        text = json.dumps({"command": record, "report": report.to_dict()})
        write_text(Path(args.output_dir).expanduser() / RECORD, text)
        _push(args, repo)
    return report.to_dict()


def _check_push(args: argparse.Namespace) -> None:
    if args.push_to_hub is None and (args.hub_private_repo or args.hub_revision):
        raise ValueError("--hub_private_repo and --hub_revision are for --push_to_hub ORG/NAME: name the model too")
    if args.push_to_hub is not None and args.dry_run:
        raise ValueError("--dry_run writes nothing that --push_to_hub could upload: leave one of them out")


def _check_calibration(args: argparse.Namespace) -> None:
    for name in ("calibrate_samples", "calibrate_split", "calibrate_steps"):
        if args.calibrate is None and getattr(args, name) != build_parser().get_default(name):
            raise ValueError(f"--{name} {getattr(args, name)} is for --calibrate DATASET: name the dataset too")
    if args.calibrate_steps < 0:
        raise ValueError(f"--calibrate_steps {args.calibrate_steps} must be 0 or more")


def _push(args: argparse.Namespace, repo: str) -> None:
    print(push_folder(args.output_dir, repo, revision=args.hub_revision).commit_url)


def _finished(args: argparse.Namespace, record: dict) -> dict | None:
    """The report of a conversion by the same command, of which only the upload may be missing."""
    file = Path(args.output_dir).expanduser() / RECORD
    if args.push_to_hub is None or args.overwrite_output_dir or not file.is_file():
        return None
    earlier = json.loads(file.read_text(encoding="utf-8"))
    return earlier["report"] if earlier["command"] == json.loads(json.dumps(record)) else None


def load_batches(args: argparse.Namespace) -> list:
    """Loads the samples to calibrate on, encoded by the teacher's processor; the last batch is held out."""
    if args.calibrate_samples < 2:
        raise ValueError(f"--calibrate_samples {args.calibrate_samples} must be at least 2: some are held out")
    split = choose_split(args.calibrate, args.calibrate_split, "train", "--calibrate_split")
    dataset = load_rows(args.calibrate, split)
    rows = dataset.select(range(min(args.calibrate_samples, len(dataset))))
    processor = load_processor(args.teacher, revision=args.revision)
    check_dataset(rows, processor)
    size = max(1, min(8, len(rows) // 2))
    return [
        encode_rows(processor, [rows[i] for i in batch], batch)
        for batch in (range(first, min(first + size, len(rows))) for first in range(0, len(rows), size))
    ]


def _layers(text: str) -> tuple[int, ...] | str:
    if text == "all" or text.startswith(AUTO):
        return text
    try:
        return tuple(int(layer) for layer in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} must be layer numbers such as 3,11, "all" or "auto:K"') from None


def _reader(field: Field):
    """Turns a flag's text into a value of the field's type, taken from its annotation."""

    def read(text: str):
        try:
            return _parse(text, field.type)
        except (KeyError, ValueError):
            wanted = field.type.__name__ if isinstance(field.type, type) else str(field.type)
            example = _shown(field.default)
            raise argparse.ArgumentTypeError(f"{text!r} must be {wanted}, such as {example}") from None

    return read


def _parse(text: str, kind):
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if text.lower() == "none" and type(None) in inner:
            return None
        for choice in inner:
            try:
                return _parse(text, choice)
            except (KeyError, ValueError):
                continue
        raise ValueError(text)
    if origin in (list, tuple):
        return [_parse(entry, inner[0]) for entry in text.split(",")]
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if kind is type(None):
        raise ValueError(text)
    return kind(text)


def _shown(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value).lower()


if __name__ == "__main__":
    sys.exit(main())
