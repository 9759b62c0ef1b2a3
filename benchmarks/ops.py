"""
The selective scan against causal attention, for any shape, backend and device, forward and with gradients.

    python benchmarks/ops.py [--shape 7b] [--lengths 4096 65536] [--dtype bfloat16] [--backward] [--json FILE]

Contestants are PyTorch's attention, the named backends of the scan, and `chunk_simple_gla` of flash-linear-attention
if it is installed. What cannot run is listed with the reason. Times are the best of several runs taken in turns.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from linmu_hf.evaluation.benchmark import Clock
from linmu_hf.evaluation.benchmark_cli import DTYPES, machine, versions
from linmu_hf.evaluation.loading import default_device, first_line
from linmu_hf.ops.ssd import Segments, ssd


# query heads, state heads, key/value heads, p, k
SHAPES = {"small": (8, 8, 2, 64, 64), "tiny-wide": (8, 8, 2, 65, 128), "7b": (28, 28, 4, 129, 256)}


def scan(t, shape, backend, dtype, device, gradients):
    h, s, g, p, k = shape
    x, B, C = (torch.randn(t, heads, size, dtype=dtype, device=device) for heads, size in ((g, p), (g, k), (h, k)))
    inputs = [x, torch.rand(t, s, device=device) * 0.1, -torch.rand(s, device=device) - 0.1, B, C * k**-0.5]
    segments = Segments.build((t,), device)
    inputs = [tensor.requires_grad_(gradients) for tensor in inputs]
    return lambda: ssd(*inputs, segments, backend=backend)[0], inputs


def attention(t, shape, dtype, device, gradients):
    h, _, g, p, _ = shape
    d = p - p % 2  # a scan with a normaliser has one channel more than its attention
    q, k, v = (torch.randn(1, heads, t, d, dtype=dtype, device=device) for heads in (h, g, g))
    inputs = [tensor.requires_grad_(gradients) for tensor in (q, k, v)]
    return lambda: scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True), inputs


def simple_gla(t, shape, dtype, device, gradients):
    from fla.ops.simple_gla import chunk_simple_gla

    h, _, _, p, k = shape
    inputs = [torch.randn(1, t, h, size, dtype=dtype, device=device) for size in (k, k, p)]
    inputs.append(-torch.rand(1, t, h, device=device) * 0.1)
    inputs = [tensor.requires_grad_(gradients) for tensor in inputs]
    q, keys, v, decay = inputs
    return lambda: chunk_simple_gla(q, keys, v, g=decay, scale=1.0)[0], inputs


def step(function, inputs):
    """One training step of the operation."""
    y = function()
    torch.autograd.grad(y.sum(), inputs)


def measure(t: int, arguments) -> dict[str, dict]:
    """Best seconds and peak memory of every contestant at one length; the reason for those that cannot run."""
    common = (DTYPES[arguments.dtype], arguments.device, arguments.backward)
    shape = SHAPES[arguments.shape]
    makers = {"sdpa": partial(attention, t, shape, *common), "fla": partial(simple_gla, t, shape, *common)}
    makers |= {f"ssd {name}": partial(scan, t, shape, name, *common) for name in arguments.backends}
    calls, results = {}, {}
    clock = Clock(arguments.device)
    with torch.set_grad_enabled(arguments.backward):
        for name, make in makers.items():
            try:
                function, inputs = make()
                calls[name] = partial(step, function, inputs) if arguments.backward else function
                seconds, peak, _ = clock(calls[name])
                results[name] = {"seconds": seconds, "peak_bytes": peak}
            except Exception as error:
                results[name] = {"error": f"{type(error).__name__}: {first_line(error)}"}
                calls.pop(name, None)
        for _ in range(arguments.repeats):
            for name, call in calls.items():
                seconds, peak, _ = clock(call)
                results[name]["seconds"] = min(seconds, results[name]["seconds"])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--shape", default="small", choices=list(SHAPES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--backends", nargs="+", default=["auto"], metavar="NAME", help="as in linmu_hf.ops.ssd.ssd")
    parser.add_argument("--backward", action="store_true", help="forward and backward together")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="threads of PyTorch on the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    for t in arguments.lengths:
        results = measure(t, arguments)
        sdpa = results["sdpa"].get("seconds")
        for name, result in results.items():
            if sdpa and "seconds" in result:
                result["sdpa_over_this"] = sdpa / result["seconds"]
            shown = result.get("error") or f"{1e3 * result['seconds']:9.2f} ms {result.get('sdpa_over_this', 0):7.2f}"
            print(f"{t:8d} {name:16s} {shown}", flush=True)
        rows.append({"tokens": t, "contestants": results})
    if arguments.json:
        setting = {key: value for key, value in vars(arguments).items() if key != "json"}
        setting["heads"] = dict(zip(("h", "s", "g", "p", "k"), SHAPES[arguments.shape], strict=True))
        result = {"setting": setting, "machine": machine(), "versions": versions(), "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
