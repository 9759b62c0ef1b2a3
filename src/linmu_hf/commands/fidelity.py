"""`linmu-fidelity`: where a student differs from its teacher inside, layer by layer and by distance."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig

from ..conversion.source import read_raw_config
from ..conversion.teacher import check_pair, check_teacher, check_tokenizers, load_teacher
from ..data import bad_rows, choose_split, encode_rows, load_rows
from ..evaluation.fidelity.measure import Fidelity
from ..evaluation.fidelity.plots import format_report, plot_report
from ..evaluation.loading import check_device, check_model, library_versions, load_model, load_processor
from ..files import check_report
from ..modeling.configuration_linmu import LinMUConfig
from .common import DTYPES, Parser, check_positive, run_command, write_report
from .evaluate import first_of_every_task, name_tasks


REPORT = "fidelity.json"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="linmu-fidelity", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--model", required=True, help="student, folder or Hub id")
    parser.add_argument("--teacher", required=True, help="teacher that it was converted from, folder or Hub id")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dataset", help="rows with images, videos or text, as of linmu-eval")
    what.add_argument("--text", type=Path, metavar="FILE", help="plain text instead, read in pieces")
    parser.add_argument("--split", help="of the dataset, by default test; a single file is read whole")
    parser.add_argument(
        "--limit", type=int, default=20, help="at most this many rows of every task, or pieces of text"
    )
    parser.add_argument("--max_length", type=int, help="tokens of a piece of text, 1024 by default")
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--device", help="by default a GPU if there is one")
    parser.add_argument("--output", type=Path, default=Path("runs/fidelity"), help="folder for fidelity.json and maps")
    return parser.parse_args(argv)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raises what is wrong with the arguments before any weights are read."""
    check_positive(arguments, "limit", "max_length")
    check_device(arguments.device)
    if arguments.max_length and arguments.dataset:
        raise ValueError(f"--max_length {arguments.max_length} has no effect on rows: leave it out, or give --text")
    if arguments.split and arguments.text:
        raise ValueError(f"--split {arguments.split} has no effect on --text: leave it out")
    if arguments.text and not arguments.text.is_file():
        raise FileNotFoundError(f"--text {arguments.text} is not there: give a file of plain text")
    for path in (arguments.model, arguments.teacher):
        check_model(path)
    if read_raw_config(arguments.model).get("model_type") != LinMUConfig.model_type:
        raise ValueError(f"--model {arguments.model} is no LinMU model: give one that linmu-convert has written")
    if read_raw_config(arguments.teacher).get("model_type") == LinMUConfig.model_type:
        check_teacher(AutoConfig.from_pretrained(arguments.teacher))
    if arguments.output.exists() and not arguments.output.is_dir():
        raise ValueError(f"--output {arguments.output} is a file: give a folder")
    output = arguments.output.absolute()
    check_report(next(folder for folder in (output, *output.parents) if folder.is_dir()) / REPORT, "--output")


def read_text(processor, file: Path, length: int, limit: int) -> list[dict[str, torch.Tensor]]:
    """Returns the first pieces of a text, as model inputs of `length` tokens each; of a short text its only one."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--text {file} is no text in UTF-8 ({error.reason} at byte {error.start}): convert it"
        ) from None
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise ValueError(f"--text {file} is empty")
    pieces = [piece for piece in ids.split(length, dim=1) if piece.shape[1] == length] or [ids]
    return [{"input_ids": piece} for piece in pieces[:limit]]


def read_rows(processor, dataset: str, split: str, limit: int) -> tuple[int, Iterator[dict[str, Any]]]:
    """Returns how many rows there are, `limit` of every task at most, and the model inputs of each with its answer."""
    rows = load_rows(dataset, split)
    numbers = first_of_every_task(name_tasks(rows), limit)
    chosen = set(numbers)
    for number, error in bad_rows(rows, processor):
        if number in chosen:
            raise error
    return len(numbers), (encode_rows(processor, [rows[number]], [number]) for number in numbers)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the report of a student and its teacher."""
    check_arguments(arguments)
    processor = load_processor(arguments.model)
    check_tokenizers(processor.tokenizer, load_processor(arguments.teacher).tokenizer)
    if arguments.text:
        texts = read_text(processor, arguments.text, arguments.max_length or 1024, arguments.limit)
        total, batches = len(texts), iter(texts)
    else:
        split = choose_split(arguments.dataset, arguments.split, "test")
        total, batches = read_rows(processor, arguments.dataset, split, arguments.limit)
    student, _ = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    teacher = load_teacher(arguments.teacher, dtype=student.dtype, device=student.device)
    check_pair(student.config, teacher.config)
    fidelity = Fidelity(student, teacher)
    for batch in tqdm(batches, "comparing", total=total, unit="row"):
        fidelity.add(batch)
    given = {name: str(value) for name, value in vars(arguments).items() if value is not None}
    return {"arguments": given, "versions": library_versions(), **fidelity.report()}


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)

    def run() -> None:
        report = measure(arguments)
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_report(arguments.output / REPORT, report)
        print(format_report(report))
        try:
            files = plot_report(report, arguments.output)
        except ImportError as error:
            raise ImportError(f'{arguments.output} has no maps: pip install "linmu-hf[train]"') from error
        print(f"maps: {', '.join(map(str, files))}")

    return run_command("linmu-fidelity", run)


if __name__ == "__main__":
    sys.exit(main())
