"""
The ratios that `make bench-cpu` prints: the scan against attention, and whole decoders, on one CPU thread.

    python benchmarks/cpu.py [--json FILE]

Times are seconds that the processor spent on the process, the best of several in turns; only the longest prompts are
measured once.
"""

import argparse
import json
from pathlib import Path

import torch
from ssd_vs_sdpa import HEADS, attention_of, best_seconds, scan_of

from linmu_hf.evaluation.benchmark import Variant, growth_exponent, measure, summarise
from linmu_hf.evaluation.benchmark_cli import machine, versions
from linmu_hf.evaluation.benchmark_model import BenchmarkDecoder, prompt_layout, text_config


# seconds for each length of the scan; name of a ratio: (goal, whether more is better)
SCANS = {256: 2.0, 4096: 4.0, 16384: 1.0}
GOALS = {
    "scan against attention, 256 tokens": (1.0, True),
    "scan against attention, 4096 tokens": (8.0, True),
    "scan against attention, 16384 tokens": (20.0, True),
    "TTFT, teacher over student, 16384 tokens": (5.0, True),
    "growth exponent of the student's TTFT, 4096 to 65536 tokens": (1.05, False),
    "decode step of the student, 16384 over 1024 tokens": (1.05, False),
}


def decoders() -> dict[str, Variant]:
    config = text_config("tiny-wide")
    attends = type(config).from_dict(config.to_dict() | {"layer_types": ["full_attention"] * config.num_hidden_layers})
    student = BenchmarkDecoder(config)
    return {"student": Variant(student), "teacher": Variant(BenchmarkDecoder(attends, shared=student))}


def layout_of(tokens: int):
    return prompt_layout(tokens, 0.95, (16, 16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ratios = {}
    with torch.inference_mode():
        for tokens, seconds in SCANS.items():
            scan, attention = best_seconds([scan_of(tokens, HEADS), attention_of(tokens)], seconds)
            ratios[f"scan against attention, {tokens} tokens"] = attention / scan

    variants = decoders()
    rows = measure(variants, [1024, 4096], layout_of=layout_of, repeats=3)
    rows += measure(variants, [16384], layout_of=layout_of, repeats=1)
    rows += measure({"student": variants["student"]}, [65536], layout_of=layout_of, repeats=1)
    student = {row["tokens"]: row for row in rows if row["model"] == "student"}
    teacher = {row["tokens"]: row for row in rows if row["model"] == "teacher"}
    long = (4096, 16384, 65536)
    ratios |= {
        "TTFT, teacher over student, 16384 tokens": teacher[16384]["ttft_s"] / student[16384]["ttft_s"],
        "growth exponent of the student's TTFT, 4096 to 65536 tokens": growth_exponent(
            long, [student[tokens]["ttft_s"] for tokens in long]
        ),
        "decode step of the student, 16384 over 1024 tokens": (
            student[16384]["decode"]["1"]["step_s"] / student[1024]["decode"]["1"]["step_s"]
        ),
    }
    for name, value in ratios.items():
        goal, more = GOALS[name]
        met = value >= goal if more else value <= goal
        print(f"{name:62s} {value:7.2f}   goal {'>=' if more else '<='} {goal:<5} {'met' if met else 'not met'}")
    if arguments.json:
        result = {"ratios": ratios, "rows": rows, **summarise(rows), "machine": machine(), "versions": versions()}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
