"""
The selective scan against causal attention, for any shape, backend and device, forward and with gradients.

    python benchmarks/ops.py [--shape 7b] [--lengths 4096 65536] [--dtype bfloat16] [--backward] [--json FILE]

Contestants are PyTorch's attention, the named backends of the scan, both directions of a layer in one launch of our
kernels, `mamba_chunk_scan_combined` of mamba-ssm on inputs that suit it, and `chunk_simple_gla` of
flash-linear-attention. What cannot run is listed with the reason. Times are the best of several runs taken in turns.

Each is also compared with the roofline of the device, whose speed in matrix products and in copying is measured first:
the time that its least arithmetic, or reading its inputs and writing its outputs once, would take at that speed.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from linmu_hf.commands.bench import DTYPES, machine
from linmu_hf.evaluation.loading import default_device, first_line, library_versions
from linmu_hf.evaluation.speed.measure import Clock
from linmu_hf.ops.backends import import_kernels, why_unavailable
from linmu_hf.ops.segments import Scan, Segments
from linmu_hf.ops.ssd.scan import ssd


BOTH = "ssd both directions"
# query heads, state heads, key/value heads, p, k, and whether the scan is normalised
SHAPES = {"small": (8, 8, 2, 64, 64, False), "tiny-wide": (8, 8, 2, 64, 128, True), "7b": (28, 28, 4, 128, 256, True)}


CHUNK = 64  # tokens between which the least arithmetic of a scan takes products
# the gradient of a product takes two
BACKWARD = 3


def scan_inputs(t, shape, dtype, device, gradients):
    h, s, g, p, k, normalized = shape
    x, B, C = (
        (torch.rand if normalized else torch.randn)(t, heads, size, dtype=dtype, device=device)
        for heads, size in ((g, p), (g, k), (h, k))
    )
    inputs = [x, torch.rand(t, s, device=device) * 0.1, -torch.rand(s, device=device) - 0.1, B, C * k**-0.5]
    return [tensor.requires_grad_(gradients) for tensor in inputs]


def scan(t, shape, backend, dtype, device, gradients):
    inputs = scan_inputs(t, shape, dtype, device, gradients)
    segments = Segments.build((t,), device)
    return lambda: ssd(*inputs, segments, normalized=shape[-1], backend=backend)[0], inputs


def both_directions(t, shape, dtype, device, gradients):
    """A scan of all tokens, and one backwards with decays, B and C of its own over the same x."""
    from linmu_hf.ops.ssd.triton import ssd_triton_pair

    reason = why_unavailable("triton", torch.empty(0, dtype=dtype, device=device))
    if reason:
        raise ValueError(reason)
    inputs = scan_inputs(t, shape, dtype, device, gradients)
    others = scan_inputs(t, shape, dtype, device, gradients)[1:]
    segments = Segments.build((t,), device)
    first = Scan(*inputs, segments)
    second = Scan(inputs[0].flip(0), *others, segments)

    def run():
        (y, _), (reverse, _) = ssd_triton_pair(first, second, shape[-1], final_states=False)
        return y + reverse

    return run, [*inputs, *others]


def mamba(t, shape, dtype, device, gradients):
    mamba_chunk_scan_combined = import_kernels("mamba_ssm").mamba_chunk_scan_combined
    h, _, _, p, k, _ = shape
    inputs = scan_inputs(t, (h, h, h, p, k, False), dtype, device, gradients)
    x, dt, A, B, C = inputs
    return lambda: mamba_chunk_scan_combined(x[None], dt[None], A, B[None], C[None], 128), inputs


def attention(t, shape, dtype, device, gradients):
    h, _, g, p, *_ = shape
    q, k, v = (torch.randn(1, heads, t, p, dtype=dtype, device=device) for heads in (h, g, g))
    inputs = [tensor.requires_grad_(gradients) for tensor in (q, k, v)]
    return lambda: scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True), inputs


def simple_gla(t, shape, dtype, device, gradients):
    from fla.ops.simple_gla import chunk_simple_gla

    h, _, _, p, k, _ = shape
    inputs = [torch.randn(1, t, h, size, dtype=dtype, device=device) for size in (k, k, p)]
    inputs.append(-torch.rand(1, t, h, device=device) * 0.1)
    inputs = [tensor.requires_grad_(gradients) for tensor in inputs]
    q, keys, v, decay = inputs
    return lambda: chunk_simple_gla(q, keys, v, g=decay, scale=1.0)[0], inputs


def least_work(name: str, t: int, shape, dtype: torch.dtype, backward: bool) -> tuple[float, float]:
    """Operations in matrix products, and bytes of inputs and outputs, of a contestant."""
    h, s, g, p, k, _ = shape
    if name == "sdpa":
        operations, elements = 2.0 * t * t * p * h, t * p * (2 * h + 2 * g)  # half of the pairs
    else:
        groups = h if name in ("mamba_ssm direct", "fla") else g
        operations = 2.0 * t * h * (CHUNK * (k + p) / 2 + p * k) + 2.0 * t * s * p * k
        elements = t * (groups * (p + k) + h * (k + p) + s)
        if name == BOTH:
            operations, elements = 2 * operations, 2 * elements
    factor = BACKWARD if backward else 1
    return factor * operations, factor * elements * dtype.itemsize


def peaks(dtype: torch.dtype, device: str) -> dict[str, float]:
    """What the device reaches: operations per second in a large matrix product, bytes per second in a copy."""
    size = 8192 if torch.device(device).type == "cuda" else 512
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    source = torch.empty(size * size * 16, dtype=torch.uint8, device=device)
    clock, target = Clock(device), torch.empty_like(source)
    with torch.no_grad():
        product = min(clock(lambda: a @ b)[0] for _ in range(10))
        copy = min(clock(lambda: target.copy_(source))[0] for _ in range(10))
    return {"operations_per_s": 2 * size**3 / product, "bytes_per_s": 2 * source.numel() / copy}


def step(function, inputs):
    """One training step of the operation."""
    y = function()
    torch.autograd.grad(y.sum(), inputs)


def contest(makers, arguments) -> dict[str, dict]:
    """Best seconds and peak memory of every contestant; the reason for those that cannot run."""
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
                results[name]["seconds"] = min(clock(call)[0], results[name]["seconds"])
    return results


def measure(t: int, arguments) -> dict[str, dict]:
    """The contest at one length, and what the roofline says of each."""
    common = (DTYPES[arguments.dtype], arguments.device, arguments.backward)
    shape = SHAPES[arguments.shape]
    makers = {"sdpa": partial(attention, t, shape, *common), "fla": partial(simple_gla, t, shape, *common)}
    makers |= {f"ssd {name}": partial(scan, t, shape, name, *common) for name in arguments.backends}
    makers |= {
        BOTH: partial(both_directions, t, shape, *common),
        "mamba_ssm direct": partial(mamba, t, shape, *common),
    }
    results = contest(makers, arguments)
    for name, result in results.items():
        if "seconds" in result:
            operations, moved = least_work(name, t, shape, common[0], arguments.backward)
            limit = max(operations / arguments.peaks["operations_per_s"], moved / arguments.peaks["bytes_per_s"])
            result |= {"roofline_s": limit, "of_roofline": limit / result["seconds"]}
            if "seconds" in results["sdpa"]:
                result["sdpa_over_this"] = results["sdpa"]["seconds"] / result["seconds"]
    return results


def parser_of(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description.strip().splitlines()[0])
    parser.add_argument("--shape", default="small", choices=list(SHAPES))
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--backward", action="store_true", help="forward and backward together")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="threads of PyTorch on the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def measure_all(measure: Callable, ratios: Callable[[dict], str], width: int, arguments) -> None:
    """
    Measures every length, prints a line for each contestant, and writes all, with the setting, where `--json` says.

    Args:
        measure (`Callable`): Gives the results of one length, by contestant.
        ratios (`Callable`): Returns the text to print after a result's time.
        width (`int`): Of the names.
    """
    rows = []
    for t in arguments.lengths:
        results = measure(t, arguments)
        for name, result in results.items():
            shown = result.get("error")
            if "seconds" in result:
                shown = f"{1e3 * result['seconds']:9.2f} ms {ratios(result)}"
            print(f"{t:8d} {name:{width}s} {shown}", flush=True)
        rows.append({"tokens": t, "contestants": results})
    if arguments.json:
        setting = {key: value for key, value in vars(arguments).items() if key != "json"}
        setting["heads"] = dict(zip(("h", "s", "g", "p", "k", "normalized"), SHAPES[arguments.shape], strict=True))
        result = {
            "setting": setting,
            "machine": machine(arguments.device),
            "versions": library_versions(),
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--backends", nargs="+", default=["auto"], metavar="NAME", help="as in `ssd`")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    arguments.peaks = peaks(DTYPES[arguments.dtype], arguments.device)
    print(f"{'tokens':>8} {'':20} {'':12} {'sdpa / this':>11} {'of roofline':>11}")
    ratios = "{sdpa_over_this:11.2f} {of_roofline:11.1%}".format_map
    measure_all(measure, lambda result: ratios({"sdpa_over_this": 0} | result), 20, arguments)


if __name__ == "__main__":
    main()
