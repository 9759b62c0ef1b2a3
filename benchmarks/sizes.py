"""
How often students and teachers are right at sizes that they were not trained on.

    python benchmarks/sizes.py --models qwen runs/quickstart/student [--questions 100] [--json FILE]

Mosaics of n x n cells, one of which is asked for (training saw 4x4 to 8x8), and clips whose frames are shown once to
four times as long ("which came first?"). Digits are held out. The first model is what the others are compared with.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from linmu_hf.evaluation.retention import wilson_interval
from linmu_hf.testbed.check_teacher import TEACHERS, count_right, load
from linmu_hf.testbed.data import FULL_SIZES, ask, compose, to_row


MOSAICS = (2, 3, 4, 6, 8, 9, 10, 12)
LENGTHS = (1, 2, 3, 4)


def mosaic_rows(size: int, n: int) -> list[dict]:
    """Returns `n` mosaics of size x size cells, with one question each."""
    rows = []
    for i in range(n):
        rng = np.random.default_rng((10**7, size, i))
        scene = compose(rng, "large", "test", (1, size, size))
        rows.append(to_row(scene, [ask(rng, scene, "large")], f"{size}x{size}"))
    return rows


def clip_rows(times: int, n: int) -> list[dict]:
    """Returns `n` clips with every frame shown `times` times, with one question each."""
    rows = []
    for i in range(n):
        rng = np.random.default_rng((10**7 + 1, times, i))
        scene = compose(rng, "clip", "test", FULL_SIZES["clip"])
        turn = ask(rng, scene, "first")
        row = to_row(scene, [turn], f"clip x{times}")
        rows.append(row | {"videos": [[frame for frame in row["videos"][0] for _ in range(times)]]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--models", nargs="+", default=["qwen"], help="folders, or qwen and nvila")
    parser.add_argument("--questions", type=int, default=100, help="for each size")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    sets = {f"{size}x{size}": mosaic_rows(size, args.questions) for size in MOSAICS}
    sets |= {f"clip x{times}": clip_rows(times, args.questions) for times in LENGTHS}
    right: dict[str, dict[str, int]] = {name: {} for name in sets}
    with tqdm(total=len(args.models) * len(sets), desc="sizes") as bar:
        for name in args.models:
            model, processor = load(TEACHERS.get(name, name))
            for key, rows in sets.items():
                right[key][name] = count_right(model, processor, rows, batch_size=25)
                bar.update()
    print("| size | " + " | ".join(args.models) + " |\n|" + "---|" * (len(args.models) + 1))
    for key, counts in right.items():
        shown = []
        for name, count in counts.items():
            low, high = wilson_interval(count, args.questions)
            ratio = "" if name == args.models[0] else f", {count / max(counts[args.models[0]], 1):.0%}"
            shown.append(f"{count / args.questions:.0%} [{low:.0%}, {high:.0%}]{ratio}")
        print(f"| {key} | " + " | ".join(shown) + " |")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"questions": args.questions, "right": right}, indent=2) + "\n")


if __name__ == "__main__":
    main()
