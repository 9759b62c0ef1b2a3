"""
Which last step brings a real decoder back soonest: one value of it changed at a time, for the same number of tokens.

    python -m benchmarks.real.recipes --base runs/real [--recipes "rate 1e-3" Muon] [--seeds 0 1] [--tokens 16384]

Takes the teacher, the text and the calibrated student of `make real`, and trains a copy of it by each recipe; a seed
is other rows of text. KL, agreement and perplexity are those of held-out rows of 1,024 tokens. What is measured
is kept in `--output`, and not done again.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm.auto import tqdm

from linmu_hf.distillation.stages import FLEX, SWIN
from linmu_hf.files import write_text

from .bench import Bench
from .measure import evaluate
from .settings import DEFAULT, FINAL, Train
from .text import TextRows
from .train import train


START = "calibration"
LENGTH = DEFAULT.length
ALIGN = {"fed": "teacher", "hidden": 1.0}
# The changes of each step of a recipe; several steps share the tokens.
RECIPES: dict[str, Sequence[dict[str, Any]]] = {
    "as `make real` has it": [{}],
    "rate 5e-4": [{"learning_rate": 5e-4}],
    "rate 1e-3": [{"learning_rate": 1e-3}],
    "rate 4e-3": [{"learning_rate": 4e-3}],
    "rate 8e-3": [{"learning_rate": 8e-3}],
    "2 rows a step": [{"batch_size": 2}],
    "4 rows a step": [{"batch_size": 4}],
    "2 rows of 512 tokens": [{"batch_size": 2, "length": 512}],
    "KL alone": [{"hidden": 0.0}],
    "hidden states at weight 1": [{"hidden": 1.0}],
    "hidden states alone": [{"kl": 0.0, "hidden": 1.0}],
    "fed by the teacher": [ALIGN],
    "half of it fed by the teacher": [ALIGN, {}],
    "Muon": [{"muon": True}],
    "Muon, rate 8e-3": [{"muon": True, "learning_rate": 8e-3}],
    "all of the mixers, rate 1e-4": [{"trains": (FLEX, SWIN), "learning_rate": 1e-4}],
}
FIGURES = ("kl", "agreement", "perplexity")


def steps_of(changes: Sequence[dict[str, Any]], tokens: int) -> list[Train]:
    """Returns the steps of a recipe that read so many tokens between them."""
    steps = [replace(FINAL, name=f"step-{number}", **change) for number, change in enumerate(changes)]
    return [replace(step, steps=max(1, tokens // len(steps) // (step.batch_size * step.length))) for step in steps]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--base", type=Path, default=Path("runs/real"), help="folder of `make real`")
    parser.add_argument("--output", type=Path, default=Path("runs/recipes.json"))
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--tokens", type=int, default=16 * LENGTH, help="that a recipe trains on")
    parser.add_argument("--rows", type=int, default=6, help="held-out rows")
    arguments = parser.parse_args(argv)
    if not (arguments.base / START).is_dir():
        parser.error(f"--base {arguments.base} has no folder {START!r}: run `make real`, or its first step, before")
    torch.set_flush_denormal(True)
    bench = Bench(arguments.base, arguments.base, DEFAULT)
    held_out = TextRows(bench.base / "text", "held_out", bench.tokenizer, LENGTH)
    rows = [held_out[i] for i in range(arguments.rows)]
    budget = {"tokens": arguments.tokens, "rows": arguments.rows}
    found = json.loads(arguments.output.read_text()) if arguments.output.exists() else {**budget, "results": []}
    if {name: found[name] for name in budget} != budget:
        parser.error(f"--output {arguments.output} is of other --tokens or --rows: name another file")
    wanted = [("start", 0), *((name, seed) for seed in arguments.seeds for name in arguments.recipes)]
    known = {(one["recipe"], one["seed"]) for one in found["results"]}
    for name, seed in tqdm([one for one in wanted if one not in known], desc="recipes"):
        student = bench.load(START)
        for number, step in enumerate(steps_of(RECIPES.get(name, []), arguments.tokens)):
            text = TextRows(bench.base / "text", "train", bench.tokenizer, step.length, seed=100 * (seed + 1) + number)
            with tempfile.TemporaryDirectory() as folder:
                train(student, bench.teacher, text, step, Path(folder) / "checkpoint")
        figures = evaluate(student, bench.teacher, rows)
        found["results"].append({"recipe": name, "seed": seed, **{key: figures[key] for key in FIGURES}})
        print(found["results"][-1], flush=True)
        write_text(arguments.output, json.dumps(found, indent=2) + "\n")
    print(table(found["results"]))


def table(results: Sequence[dict[str, Any]]) -> str:
    """Returns the figures of every seed of every recipe, by the mean of their KL, as Markdown."""
    recipes: dict[str, list[dict[str, Any]]] = {}
    for one in results:
        recipes.setdefault(one["recipe"], []).append(one)
    lines = ["| last step | KL | same first choice | perplexity |", "|---|---|---|---|"]
    for name, seeds in sorted(recipes.items(), key=lambda item: mean(one["kl"] for one in item[1])):
        cells = (
            ", ".join(f"{one['kl']:.4f}" for one in seeds),
            ", ".join(f"{one['agreement']:.1%}" for one in seeds),
            ", ".join(f"{one['perplexity']:.2f}" for one in seeds),
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
