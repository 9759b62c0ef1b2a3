"""
The ratios that `make bench-cpu` prints: the scan against attention, and whole decoders, on one CPU thread.

    python benchmarks/cpu.py [--json FILE]

Times are seconds that the processor spent on the process, the best of several in turns; only the longest prompts are
measured once. docs/speed.md says what the figures mean.
"""

import argparse
import json
from pathlib import Path

import torch
from ssd_vs_sdpa import HEADS, attention_of, best_seconds, scan_of
from torch.utils.flop_counter import FlopCounterMode

from linmu_hf.commands.bench import machine
from linmu_hf.evaluation.loading import library_versions
from linmu_hf.evaluation.speed.measure import Variant, growth_exponent, measure, summarise
from linmu_hf.evaluation.speed.models import BenchmarkDecoder, prompt_layout, text_config


# seconds for each length of the scan; name of a ratio: (goal, whether more is better)
SCANS = {256: 2.0, 4096: 4.0, 16384: 1.0}
GOALS = {
    "scan against attention, 256 tokens": (1.0, True),
    "scan against attention, 4096 tokens": (8.0, True),
    "scan against attention, 16384 tokens": (20.0, True),
    "TTFT, teacher over student, 16384 tokens": (5.0, True),
    "TTFT, teacher over student, 16384 tokens, bfloat16": (5.0, True),
    "growth exponent of the student's TTFT, 4096 to 65536 tokens": (1.05, False),
    "decode step of the student, 16384 over 1024 tokens": (1.05, False),
}


def decoders(dtype=torch.float32) -> dict[str, Variant]:
    config = text_config("tiny-wide")
    attends = type(config).from_dict(config.to_dict() | {"layer_types": ["full_attention"] * config.num_hidden_layers})
    student = BenchmarkDecoder(config, dtype)
    return {"student": Variant(student), "teacher": Variant(BenchmarkDecoder(attends, dtype, shared=student))}


def layout_of(tokens: int):
    return prompt_layout(tokens, 0.95, (16, 16))


def least_seconds(student: BenchmarkDecoder, tokens: int = 4096) -> tuple[float, float, float]:
    """
    What a token takes the student at least: its matrix products alone, at the speed of those of an MLP, and these with
    the norms and activations that Transformers computes for both models. Then that speed, in FLOP/s; all measured now,
    with a prompt of `tokens`.
    """
    layers = student.text.layers
    mlp = layers[0].mlp
    embeds = torch.randn(1, tokens, mlp.gate_proj.in_features, dtype=mlp.gate_proj.weight.dtype)
    with FlopCounterMode(display=False) as counted:
        student.prefill(embeds, layout_of(tokens))

    def products():
        return mlp.up_proj(embeds), mlp.down_proj(mlp.gate_proj(embeds))

    def outside_the_mixer():
        y = embeds + layers[0].input_layernorm(embeds)
        return y + mlp(layers[0].post_attention_layernorm(y))

    alone, both = (seconds / tokens for seconds in best_seconds([products, outside_the_mixer], 1.5))
    speed = 2 * sum(weight.numel() for weight in mlp.parameters()) / alone
    least = counted.get_total_flops() / tokens / speed
    return least, least + len(layers) * (both - alone), speed


def passes_at(goal: float, rows: list[dict]) -> float | None:
    """
    The length at which teacher / student reaches `goal`, if the student takes c n seconds and the teacher a n + b n^2,
    with a and b from its two longest prompts; `None` if none does.
    """
    teacher = [(row["tokens"], row["ttft_s"] / row["tokens"]) for row in rows if row["model"] == "teacher"]
    (n, short), (m, long) = teacher[-2:]
    student = next(row["ttft_s"] / m for row in rows if row["model"] == "student" and row["tokens"] == m)
    slope = (long - short) / (m - n)
    return (goal * student - long) / slope + m if slope > 0 else None


def ttft(name: str, rows: list[dict], student: BenchmarkDecoder, tokens: int = 16384) -> dict:
    """The ratio at `tokens`, the most that it could be, and the length at which it passes the goal."""
    seconds = {row["model"]: row["ttft_s"] for row in rows if row["tokens"] == tokens}
    *least, speed = least_seconds(student)
    of_products, ceiling = (seconds["teacher"] / tokens / one for one in least)
    return {
        "ratio": seconds["teacher"] / seconds["student"],
        "us_per_token_and_layer": {k: 1e6 * v / tokens / len(student.text.layers) for k, v in seconds.items()},
        "ceiling_of_products": of_products,
        "ceiling": ceiling,
        "gflops": speed / 1e9,
        "passes_goal_at_tokens": passes_at(GOALS[name][0], rows),
    }


def explain(result: dict) -> str:
    """Explains a ratio in three lines."""
    per_token, passes = result["us_per_token_and_layer"], result["passes_goal_at_tokens"]
    return "\n    ".join(
        (
            f"    us per token and layer: student {per_token['student']:.1f}, teacher {per_token['teacher']:.1f}",
            f"at most {result['ceiling_of_products']:.2f} with its matrix products alone, at {result['gflops']:.0f} "
            f"GFLOP/s, and {result['ceiling']:.2f} with the norms and activations that both have",
            "never passes the goal" if passes is None else f"passes the goal at about {round(passes, -3):.0f} tokens",
        )
    )


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
    # the longest first: what is measured once shall not be what pays for the pages of a heap that grows
    rows += measure({"student": variants["student"]}, [65536], layout_of=layout_of, repeats=1)
    rows += measure(variants, [16384], layout_of=layout_of, repeats=1)
    half = decoders(torch.bfloat16)
    half_rows = measure(half, [4096, 16384], layout_of=layout_of, repeats=1, batches=())
    names = [name for name in GOALS if name.startswith("TTFT")]
    with torch.inference_mode():
        measured = {
            name: ttft(name, found, models["student"].decoder)
            for name, found, models in zip(names, (rows, half_rows), (variants, half), strict=True)
        }
    student = {row["tokens"]: row for row in rows if row["model"] == "student"}
    long = (4096, 16384, 65536)
    ratios |= {name: result["ratio"] for name, result in measured.items()}
    ratios |= {
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
        if name in measured:
            print(explain(measured[name]))
    if arguments.json:
        result = {"ratios": ratios, "ttft": measured, "rows": rows, "rows_bfloat16": half_rows, **summarise(rows)}
        result |= {"machine": machine(), "versions": library_versions()}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
