"""A pre-trained decoder of 135 million parameters, converted and distilled on a laptop.

    python -m benchmarks.real --output runs/real [--quick]

Run again after it was killed, it skips what is finished and takes up the rest. docs/real.md says what comes out.
"""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging

from linmu_hf.commands.convert import build_parser as convert_parser
from linmu_hf.files import write_text
from linmu_hf.modeling.configuration_linmu import MIXER_FIELDS, PRESETS
from linmu_hf.testbed.quickstart import Way

from .bench import Bench, summary
from .plots import plot_results
from .settings import DEFAULT, QUICK, Settings, change_step, select_steps


def run(bench: Bench, only: str | None = None) -> None:
    """
    Goes through all parts; with `only`, through those that this part needs, and measures it alone.

    Raises:
        `ValueError`: the folder holds a run of other settings, or there is no such part.
    """
    steps = bench.settings.steps
    names = ["teacher", "conversion", *(step.name for step in steps)]
    if only is not None and only not in names:
        raise ValueError(f"--only {only}: the parts of this run are {names}")
    way = Way(bench.output, bench.settings.to_dict())
    way.run("build teacher", bench.build_teacher)
    way.run("build text", bench.build_text)
    makers = {"conversion": bench.convert} | {step.name: lambda step=step: bench.take(step) for step in steps}
    for name in names:
        if name in makers:
            way.run(name, makers[name])
        if only in (None, name):
            way.run(f"measure {name}", lambda name=name: bench.measure(name))
        if name == only:
            print("\n" + summary({name: json.loads(bench.figures_file(name).read_text())}))
            return
    results = bench.results(way.seconds)
    plot_results(results, bench.output / "results.png")
    write_text(bench.output / "results.json", json.dumps(results, indent=2) + "\n")
    print("\n" + summary(results))
    print("\n" + ", ".join(f"{part} {seconds:.0f} s" for part, seconds in results["seconds"].items()))
    print(f"\n{bench.output / 'results.json'}\n{bench.output / 'results.png'}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/real"), help="folder of the run")
    parser.add_argument("--base", type=Path, help="folder of downloads, teacher and text (default: the output)")
    parser.add_argument("--quick", action="store_true", help="ten minutes instead of an hour")
    parser.add_argument("--only", metavar="PART", help="teacher, conversion or a step: measure this part alone")
    parser.add_argument("--rows", type=int, help="held-out rows to compare on")
    parser.add_argument("--length", type=int, help="their tokens")
    parser.add_argument("--questions", type=int, help="of the recall, for each distance")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="default", help="choices inside M-MATE")
    parser.add_argument(
        "--keep_attention", "--keep-attention", metavar="LAYERS", help='layers such as 3,11, "all", or "auto:K"'
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help=f"M-MATE option: {', '.join(MIXER_FIELDS)}"
    )
    parser.add_argument("--steps", metavar="NAMES", help="those of the steps to take, such as calibration,final")
    parser.add_argument(
        "--set", action="append", default=[], metavar="STEP.FIELD=VALUE", help="such as final.steps=100"
    )
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier run in --output, not its base")
    return parser


def read_settings(arguments: argparse.Namespace) -> Settings:
    """Returns the settings that a command line asks for; mixer options are read as by `linmu-convert`."""
    settings = QUICK if arguments.quick else DEFAULT
    given = {name: getattr(arguments, name) for name in ("rows", "length", "questions") if getattr(arguments, name)}
    words = ["--teacher", "-", "--output_dir", "-"]
    for option in arguments.option:
        name, equals, value = option.partition("=")
        if not equals or name not in MIXER_FIELDS:
            raise ValueError(f"--option {option}: give NAME=VALUE with a name out of {list(MIXER_FIELDS)}")
        words += [f"--{name}", value]
    if arguments.keep_attention:
        words += ["--keep_attention", arguments.keep_attention]
    read = convert_parser().parse_args(words)
    settings = replace(
        settings,
        **given,
        preset=arguments.preset,
        keep_attention=read.keep_attention,
        mixer_options=tuple((name, getattr(read, name)) for name in MIXER_FIELDS if hasattr(read, name)),
    )
    if arguments.steps:
        settings = select_steps(settings, arguments.steps.split(","))
    for change in arguments.set:
        settings = change_step(settings, change)
    return settings


def main(argv: list[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    logging.disable_progress_bar()  # those of loading and saving; ours stay
    torch.set_flush_denormal(True)  # as the commands do
    try:
        settings = read_settings(arguments)
        if arguments.overwrite and (arguments.output / "progress.json").exists():
            kept = {"downloads", "teacher", "text"}
            for path in arguments.output.iterdir():
                if path.name not in kept:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        run(Bench(arguments.output, arguments.base or arguments.output, settings), arguments.only)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"benchmarks.real: error: {error}")


if __name__ == "__main__":
    main()
