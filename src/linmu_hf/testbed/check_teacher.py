"""Check a shipped teacher on held-out digits; exits with 1 if a task falls below 95%.

    python -m linmu_hf.testbed.check_teacher [--model qwen|nvila|FOLDER] [--samples 200] [--json FILE]

The Qwen2.5-VL is a plain Transformers checkpoint, and nothing of linmu_hf's models takes part. Of NVILA Transformers
knows no class: it runs as LinMU with full attention everywhere.
"""

import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from linmu_hf.conversion.teacher import load_processor, load_teacher
from linmu_hf.data import answer_text, encode_prompts

from ..commands.common import Parser
from ..evaluation.retention import wilson_interval
from .data import TASKS, evaluation_rows


TEACHER = Path(__file__).parent / "teacher"
TEACHERS = {"qwen": TEACHER, "nvila": Path(__file__).parent / "teacher_nvila"}
REQUIRED = 0.95
LONGEST_ANSWER = 2  # a digit and <|im_end|>


def is_nvila(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text()).get("model_type") == "llava_llama"


def load(folder: str | Path) -> tuple:
    """Loads model and processor of a teacher."""
    if is_nvila(Path(folder)):
        return load_teacher(folder), load_processor(folder)
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@torch.no_grad()
def count_right(model, processor, rows: list[dict], batch_size: int = 50) -> int:
    """Counts the rows that greedy `generate` answers right."""
    right = 0
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        prompts = encode_prompts(processor, chosen)
        tokens = model.generate(**prompts, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        texts = processor.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(text.strip() == answer_text(row) for text, row in zip(texts, chosen))
    return right


def check(model_path: str | Path, samples: int, seed: int = 0) -> dict[str, dict]:
    """Returns accuracy and interval of every task: `{task: {"accuracy", "low", "high", "samples"}}`."""
    model, processor = load(model_path)
    results = {}
    for task in tqdm(TASKS, desc="tasks", leave=False):
        right = count_right(model, processor, list(evaluation_rows(task, samples, seed)))
        low, high = wilson_interval(right, samples)
        results[task] = {"accuracy": right / samples, "low": low, "high": high, "samples": samples}
    return results


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="qwen", help=f"{', '.join(TEACHERS)}, or a folder")
    parser.add_argument("--samples", type=int, default=200, help="questions per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the table to this file")
    args = parser.parse_args()
    if args.samples < 1:
        parser.error(f"--samples {args.samples} must be at least 1")
    model = TEACHERS.get(args.model, Path(args.model))
    if not (model / "config.json").is_file():
        parser.error(f"--model {args.model} holds no config.json: name a teacher's folder")

    results = check(model, args.samples, args.seed)
    print(f"{'task':8}{'accuracy':>10}   95% interval     questions")
    for task, r in results.items():
        print(f"{task:8}{r['accuracy']:10.1%}   {r['low']:.1%} to {r['high']:.1%}   {r['samples']}")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")
    failed = [task for task, r in results.items() if r["accuracy"] < REQUIRED]
    if failed:
        sys.exit(f"below {REQUIRED:.0%}: {', '.join(failed)}")


if __name__ == "__main__":
    main()
