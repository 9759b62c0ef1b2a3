"""`linmu-pseudo-targets`: what a teacher answers to a dataset, decoded once for `linmu-distill --pseudo_targets`."""

import argparse
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..conversion.source import open_source, read_processor
from ..conversion.teacher import check_tokenizers, load_processor, load_teacher
from ..data import check_dataset, choose_split, load_training_rows
from ..evaluation.loading import check_device, check_model, library_versions
from ..files import check_report
from .common import DTYPES, Parser, check_positive, run_command, write_report


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="linmu-pseudo-targets", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--teacher", required=True, help="folder or Hub id")
    parser.add_argument("--teacher_model_revision", help="branch, tag or commit on the Hub")
    parser.add_argument(
        "--processor", help="folder or Hub id, by default the teacher's; a student with other settings"
    )
    parser.add_argument("--dataset", required=True, help="as in linmu-distill")
    parser.add_argument("--dataset_train_split", help="by default train; a single file is read whole")
    parser.add_argument("--streaming", action="store_true", help="read rows as they are needed")
    parser.add_argument("--seed", type=int, default=42, help="that of linmu-distill: it picks the rows of a mixture")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder of the answers; begun ones go on")
    parser.add_argument("--max_completion_length", type=int, default=128, help="longest answer, in tokens")
    parser.add_argument("--top_k", type=int, help="also store log-probabilities of the K likeliest tokens, such as 64")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_bad_rows", type=int, default=0, help="unreadable rows of a share that are left out")
    parser.add_argument("--shard", metavar="I/N", help="decode the share I of N, from 0; by default that of torchrun")
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--attn_implementation", help="of the teacher, such as flash_attention_2")
    parser.add_argument("--device", help="by default a GPU if there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was done here too")
    return parser.parse_args(argv)


def find_share(shard: str | None) -> tuple[int, int]:
    """Returns this process's share and the number of shares: from `--shard`, or as torchrun and accelerate say it."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if shard is None:
        return rank, world
    if world > 1:
        raise ValueError(f"--shard {shard} has no effect: a launcher has started {world} processes; leave one out")
    given = re.fullmatch(r"(\d+)/(\d+)", shard)
    if given is None or not int(given[1]) < int(given[2]):
        raise ValueError(f"--shard {shard} must be I/N with I from 0 to N - 1, such as 0/4")
    return int(given[1]), int(given[2])


def find_device(name: str | None) -> str:
    device = check_device(name)
    if name is None and device.type == "cuda" and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return str(device)


def decode(arguments: argparse.Namespace) -> dict[str, Any]:
    from ..distillation.targets.fill import decode_pseudo_targets
    from ..distillation.targets.store import PseudoTargets

    check_positive(arguments, "max_completion_length", "top_k", "batch_size")
    share, device = find_share(arguments.shard), find_device(arguments.device)
    teacher_path, revision = arguments.teacher, arguments.teacher_model_revision
    check_model(teacher_path)
    split = choose_split(arguments.dataset, arguments.dataset_train_split, "train", "--dataset_train_split")
    rows = load_training_rows(arguments.dataset, split, streaming=arguments.streaming, seed=arguments.seed)
    processor = load_processor(teacher_path, revision=revision)
    if arguments.processor:
        teachers = processor.tokenizer
        processor = read_processor(arguments.processor)
        check_tokenizers(processor.tokenizer, teachers)
    if not arguments.streaming and not arguments.max_bad_rows:
        check_dataset(rows, processor)
    dtype = None if arguments.dtype == "auto" else arguments.dtype
    teacher = load_teacher(teacher_path, dtype=dtype, revision=revision, device=device)
    if arguments.attn_implementation:
        teacher.set_attn_implementation(arguments.attn_implementation)
    about = {"teacher": teacher_path, "revision": revision, "dtype": str(teacher.dtype).removeprefix("torch.")}
    if not Path(teacher_path).expanduser().exists():
        about["revision"] = open_source(teacher_path, revision, allow_linmu=True).folder.name  # the commit
    start = time.perf_counter()
    counts = decode_pseudo_targets(
        teacher,
        processor,
        rows,
        arguments.output_dir,
        max_new_tokens=arguments.max_completion_length,
        batch_size=arguments.batch_size,
        top_k=arguments.top_k or 0,
        shard=share,
        max_bad_rows=arguments.max_bad_rows,
        about=about,
    )
    return {
        "output_dir": str(arguments.output_dir),
        "teacher": teacher_path,
        "dataset": arguments.dataset,
        "share": "/".join(map(str, share)),
        "seconds": round(time.perf_counter() - start, 1),
        **asdict(counts),
        "rows_in_store": len(PseudoTargets(arguments.output_dir)),
        "versions": library_versions(),
    }


def describe(report: dict[str, Any], limit: int) -> str:
    """Describes what was done in one line."""
    share = "" if report["share"] == "0/1" else f", share {report['share']}"
    done = f"{report['rows']:,} rows in {report['seconds']} s, {report['found']:,} of them known before"
    done += f" and {report['bad_rows']:,} left out" if report["bad_rows"] else ""
    new = f"{report['answers']:,} new answers, {report['answers_cut']:,} of them cut at {limit} tokens"
    return f"{report['output_dir']}{share}: {done}; {new}"


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)

    def work() -> None:
        check_report(arguments.json)
        report = decode(arguments)
        if report["share"].startswith("0/"):
            write_report(arguments.json, report)
        print(describe(report, arguments.max_completion_length))

    return run_command("linmu-pseudo-targets", work, "; the same command takes it up again")


if __name__ == "__main__":
    sys.exit(main())
