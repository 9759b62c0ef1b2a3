"""
The selective scan against causal attention: one forward pass on one CPU thread, fp32, 8 query heads of 64, 2 key/value
heads.

    python benchmarks/ssd_vs_sdpa.py [--json FILE]

One scan against one attention: projections are left out on both sides, and so are the reverse scan and the window
attention of a whole M-MATE block. Each time is the best of several runs, taken in turns, in seconds that the processor
spent on it: other programs on the machine do not count. `ops.py` beside it knows more shapes, backends and gradients.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from linmu_hf.ops.segments import Segments
from linmu_hf.ops.ssd.scan import ssd


HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 16384)


def scan_of(t: int, state_heads: int):
    x, B = torch.randn(2, t, KV_HEADS, HEAD_DIM)
    C = torch.randn(t, HEADS, HEAD_DIM) * HEAD_DIM**-0.5
    dt = torch.rand(t, state_heads) * 0.1
    A = -torch.rand(state_heads) - 0.1
    segments = Segments.build((t,))
    return lambda: ssd(x, dt, A, B, C, segments)[0]


def attention_of(t: int):
    q = torch.randn(1, HEADS, t, HEAD_DIM)
    k, v = torch.randn(2, 1, KV_HEADS, t, HEAD_DIM)
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def best_seconds(functions, budget: float) -> list[float]:
    """The best time of each function, called in turns for about `budget` seconds and at least three times."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + budget
    while len(times[0]) < 3 or time.perf_counter() < end:
        for function, measured in zip(functions, times):
            start = time.process_time()
            function()
            measured.append(time.process_time() - start)
    return [min(measured) for measured in times]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--state_heads", type=int, default=HEADS, choices=[KV_HEADS, HEADS])
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each length")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    rows = []
    print(f"{'tokens':>7} {'ssd ms':>9} {'sdpa ms':>9} {'sdpa / ssd':>11}")
    for t in arguments.lengths:
        scan, attention = best_seconds([scan_of(t, arguments.state_heads), attention_of(t)], arguments.seconds)
        rows.append({"tokens": t, "ssd_ms": 1e3 * scan, "sdpa_ms": 1e3 * attention, "ratio": attention / scan})
        print(f"{t:7d} {1e3 * scan:9.2f} {1e3 * attention:9.2f} {attention / scan:11.2f}")
    if arguments.json:
        setting = {"heads": HEADS, "kv_heads": KV_HEADS, "state_heads": arguments.state_heads, "head_dim": HEAD_DIM}
        result = {"setting": setting | {"threads": 1, "dtype": "float32"}, "torch": torch.__version__, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
