"""
lmms-eval with our model and rows: `make lmms-check`, in an environment of its own.

The same questions must have the same accuracy by `linmu-eval --dataset`, by `linmu-eval --tasks rows`, by that on two
processes, and by the command of lmms-eval itself, which finds the model by its entry point.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import linmu_hf.testbed
from linmu_hf.testbed.make_data import make_data


TESTBED = Path(linmu_hf.testbed.__file__).parent


def run(*words: str, processes: int = 1) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", *words]
    print(f"$ {' '.join(command[1:])}", flush=True)
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=os.environ | settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/lmms-check"), help="an empty folder")
    parser.add_argument("--rows", type=int, default=6, help="questions of every task")
    args = parser.parse_args()
    data, out = args.output / "data", args.output
    make_data(data, 4, args.rows)
    models = ["--model", str(TESTBED / "student"), "--teacher", str(TESTBED / "teacher")]
    rows = ["linmu_hf.commands.evaluate", *models, "--dataset", str(data), "--device", "cpu"]
    run(*rows, "--json", str(out / "own.json"))
    by_lmms = [*rows, "--tasks", "rows", "--batch_size", "4"]
    run(*by_lmms, "--output", str(out / "one"), "--json", str(out / "one.json"))
    run(*by_lmms, "--output", str(out / "two"), "--json", str(out / "two.json"), processes=2)

    own, one, two = (json.loads((out / f"{name}.json").read_text()) for name in ("own", "one", "two"))
    for task, name in [(task, entry["title"]) for task, entry in one["tasks"].items()]:
        for model in ("teacher", "student"):
            scores = [
                own["models"][model]["accuracy"]["tasks"][name]["accuracy"],
                *(each["tasks"][task]["models"][model]["score"] for each in (one, two)),
            ]
            print(f"{name:12}  {model:8}  {'  '.join(f'{100 * score:5.1f}' for score in scores)}")
            if max(scores) - min(scores) > 1e-9:
                sys.exit(f"{model} has other accuracies on {name} by lmms-eval: {scores}")

    task = next(iter(one["tasks"]))
    run(
        "lmms_eval", "--model", "linmu", "--model_args", f"pretrained={TESTBED / 'student'}", "--device", "cpu",
        "--tasks", task, "--include_path", str(out / "one" / "rows"), "--output_path", str(out / "lmms"),
        "--log_samples", "--verbosity", "ERROR",
    )  # fmt: skip
    (report,) = (out / "lmms").rglob("*_results.json")
    score = json.loads(report.read_text())["results"][task]["score,none"]
    if abs(score - one["tasks"][task]["models"]["student"]["score"]) > 1e-9:
        sys.exit(f"lmms-eval's own command gives {score} on {task}")
    print("the same accuracies by all ways")


if __name__ == "__main__":
    main()
