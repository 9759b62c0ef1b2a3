"""
The suite's tasks where text is concerned: charts, tables, pages, videos and conversations told in words.

    python -m benchmarks.real.suite --output runs/real [--models teacher conversion final] [--samples 50]

Takes the models that `make real` has left. The answer is begun for them ("total:" to "total?"), and it is right if
each of its tokens is a model's first choice after those before. What is measured is kept in `figures/suite/` and not
done again.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm.auto import tqdm

from linmu_hf.commands.common import check_positive
from linmu_hf.evaluation.retention import wilson_interval
from linmu_hf.files import write_text
from linmu_hf.testbed.suite.data import Turns, evaluation_scenes
from linmu_hf.testbed.suite.in_words import TOLD_TASKS, begun_answer, in_words

from .bench import Bench
from .settings import DEFAULT


SPLITS = ("test", "beyond")
Figures = dict[str, dict[str, Any]]


def to_tokens(turns: Turns, begun: str, tokenizer) -> tuple[list[int], list[int]]:
    """Returns the tokens before the last answer, its beginning among them, and its own."""
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    before, after = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text + begun, f" {turns[-1][1]}")
    )
    return before, after


@torch.no_grad()
def answers(model, prompt: Sequence[int], answer: Sequence[int]) -> bool:
    """Returns whether the model, greedily, goes on with the answer."""
    hidden = model.model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).last_hidden_state
    return model.lm_head(hidden[0, -len(answer) - 1 : -1]).argmax(-1).tolist() == list(answer)


def measure(model, tokenizer, split: str, samples: int) -> Figures:
    """Returns for each task how many answers are right, and the mean number of tokens before them."""
    figures = {}
    for task in tqdm(TOLD_TASKS, desc=split):
        scenes = evaluation_scenes(task, samples, split)
        rows = [to_tokens(in_words(scene, turns), begun_answer(scene, turns), tokenizer) for scene, turns in scenes]
        right = sum(answers(model, *row) for row in rows)
        figures[task] = {"right": right, "samples": samples, "tokens": mean(len(prompt) for prompt, _ in rows)}
    return figures


def table(found: dict[str, Figures]) -> str:
    """Returns the accuracies of all models, percent with 95% intervals, as Markdown; a line for each task."""
    lines = [f"| task | tokens | {' | '.join(found)} |", "|---|---|" + "---|" * len(found)]
    for task in TOLD_TASKS:
        cells = []
        for figures in found.values():
            right, n = figures[task]["right"], figures[task]["samples"]
            low, high = wilson_interval(right, n)
            cells.append(f"{right / n:.0%} ({low:.0%} to {high:.0%})")
        tokens = next(iter(found.values()))[task]["tokens"]
        lines.append(f"| {task} | {tokens:.0f} | {' | '.join(cells)} |")
    means = (mean(one["right"] / one["samples"] for one in figures.values()) for figures in found.values())
    return "\n".join([*lines, f"| mean | | {' | '.join(f'{share:.1%}' for share in means)} |"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--output", type=Path, default=Path("runs/real"), help="folder of a run of `make real`")
    parser.add_argument("--base", type=Path, help="folder of its teacher (default: the output)")
    parser.add_argument("--models", nargs="+", default=["teacher", "conversion", "calibration", "final"])
    parser.add_argument("--samples", type=int, default=50, help="questions per task and split")
    arguments = parser.parse_args(argv)
    base = arguments.base or arguments.output
    folders = [(base if name == "teacher" else arguments.output) / name for name in arguments.models]
    missing = [str(folder) for folder in folders if not (folder / "config.json").is_file()]
    if missing:
        parser.error(f"--models: no model in {', '.join(missing)}; run `make real` before, or name those that it left")
    try:
        check_positive(arguments, "samples")
    except ValueError as error:
        parser.error(str(error))
    torch.set_flush_denormal(True)
    bench = Bench(arguments.output, base, DEFAULT)
    for split in SPLITS:
        found = {}
        for name in arguments.models:
            file = arguments.output / "figures" / "suite" / f"{name}-{split}-{arguments.samples}.json"
            if not file.is_file():
                figures = measure(bench.load(name), bench.tokenizer, split, arguments.samples)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_text(file, json.dumps(figures, indent=2) + "\n")
            found[name] = json.loads(file.read_text())
        print(
            f"\n{split}: percent right of {arguments.samples} questions per task, with 95% intervals\n\n{table(found)}"
        )


if __name__ == "__main__":
    main()
