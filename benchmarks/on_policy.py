"""
Whether a last stage learns more from the student's own answers than from given ones, for as many steps.

    python benchmarks/on_policy.py [--seeds 0 1] [--steps 30] [--questions 100] [--json FILE]

All students start as one: the testbed's teacher converted, and some teacher-fed steps. Rows of the last stage have one
question each, for the student answers the last one of a row alone. The table has the accuracy on held-out digits and
the CPU's seconds for a step, evaluation left out.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import AutoProcessor

from linmu_hf import LinMUForConditionalGeneration
from linmu_hf.conversion.convert import convert
from linmu_hf.conversion.teacher import load_teacher
from linmu_hf.distillation import DistillConfig, Stage, distill
from linmu_hf.testbed.ablations.plans import WINDOWS
from linmu_hf.testbed.check_teacher import TEACHERS, count_right
from linmu_hf.testbed.data import TASKS, evaluation_rows, to_row, training_rows, training_scenes


START = Stage("start", ("flex", "swin"), 40, 8e-3, muon=True, hid=0.02, hidden_input="teacher")
VARIANTS: dict[str, dict[str, float]] = {
    "given answers, L_tok and L_sup": {"tok": 0.5, "sup": 0.5},
    "given answers, L_tok": {"tok": 1.0},
    "given answers, reverse L_tok": {"tok": 1.0, "beta": 1.0},
    "its own answers, L_tok": {"tok": 1.0, "lmbda": 1.0},
    "its own answers, reverse L_tok": {"tok": 1.0, "lmbda": 1.0, "beta": 1.0},
}


def train(student, teacher, processor, rows: Sequence[dict], stage: Stage, seed: int) -> float:
    """Takes a student through one stage, in place; returns the seconds of the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        config = DistillConfig(
            output_dir=f"{folder}/run", per_device_train_batch_size=16, adam_beta2=0.98, seed=seed, use_cpu=True,
            max_completion_length=16, save_strategy="no", feature_cache_gb=6, report_to=[], disable_tqdm=True,
        )  # fmt: skip
        start = time.process_time()
        distill(config, student, teacher, rows, processor, stages=[stage])
        return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--questions", type=int, default=100, help="for each task")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    folder = str(TEACHERS["qwen"])
    teacher, processor = load_teacher(folder, dtype="float32"), AutoProcessor.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as init:
        convert(folder, init, mixer_options=WINDOWS, overwrite=True)
        start = LinMUForConditionalGeneration.from_pretrained(init, dtype="float32")
    train(start, teacher, processor, list(training_rows(0, 16 * START.max_steps)), START, seed=0)
    scenes = training_scenes(1, 16 * args.steps)
    rows = [to_row(scene, turns[:1], scene.kind) for scene, turns in islice(scenes, 16 * args.steps)]
    test = {task: list(evaluation_rows(task, args.questions)) for task in TASKS}

    def right(student) -> list[float]:
        counts = [count_right(student.eval(), processor, test[task], batch_size=25) for task in TASKS]
        return [count / args.questions for count in counts]

    found: dict[str, list[list[float]]] = {"before": [[*right(start), 0.0]]}
    print("before", found["before"][0], flush=True)
    for name, values in VARIANTS.items():
        stage = Stage("last", ("flex", "swin"), args.steps, 1.6e-3, muon=True, **values)
        for seed in args.seeds:
            student = copy.deepcopy(start)
            seconds = train(student, teacher, processor, rows, stage, seed)
            found.setdefault(name, []).append([*right(student), seconds])
            print(name, seed, found[name][-1], flush=True)
    print(f"\n| | {' | '.join(TASKS)} | mean | spread | seconds a step |\n|---|" + "---|" * (len(TASKS) + 3))
    for name, runs in found.items():
        *tasks, seconds = np.mean(runs, axis=0)
        spread = np.ptp([np.mean(run[:-1]) for run in runs])
        cells = [f"{value:.3f}" for value in (*tasks, np.mean(tasks), spread)]
        cells.append(f"{seconds / args.steps:.2f}" if seconds else "")
        print(f"| {name} | " + " | ".join(cells) + " |")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"tasks": list(TASKS), "steps": args.steps, "runs": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
