"""
Is every backend of the selective scan right on this device? Outputs, final states and gradients in fp32 and bf16
against the recurrence in float64. The backend `pair` is our kernels with two scans in one launch.

    python benchmarks/correctness.py [--device cuda] [--backends triton chunked] [--shapes 7b] [--json FILE]

Inputs in bf16 are rounded first, so that what is left is the error of the computation. Exits with 1 if a backend that
runs is wrong; one that cannot run is listed with the reason.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch

from linmu_hf.commands.bench import DTYPES, machine
from linmu_hf.evaluation.loading import default_device, first_line, library_versions
from linmu_hf.ops.backends import why_unavailable
from linmu_hf.ops.segments import Scan, Segments
from linmu_hf.ops.ssd.plain import ssd_recurrence
from linmu_hf.ops.ssd.scan import ssd


# query heads, state heads, key/value heads, p, k
SHAPES = {"small": (4, 4, 2, 64, 64), "7b": (7, 7, 1, 128, 256)}
LENGTHS = {"one": (130,), "packed": (1, 63, 64, 65), "long": (700,)}
DECAYS = {"slow": 0.01, "usual": 1.0, "strong": 100.0}
# error relative to the largest value; TF32 products and bf16 outputs have about three digits
LIMITS = {"float32": 3e-3, "bfloat16": 2e-2}


def make(shape, lengths, decay: float, dtype):
    """Inputs as the backend gets them, in float64 so that the recurrence sees the same values."""
    (h, s, g, p, k), n = shape, sum(lengths)
    generator = torch.Generator().manual_seed(0)
    random = {
        name: torch.randn(size, generator=generator).to(dtype).double()
        for name, size in {"x": (n, g, p), "B": (n, g, k), "C": (n, h, k)}.items()
    }
    random["C"] = (random["C"] * k**-0.5).to(dtype).double()
    steps = (torch.rand(n, s, generator=generator) * 0.1).double()
    rates = -(torch.rand(s, generator=generator) * decay + 1e-3).double()
    return {"x": random["x"], "dt": steps, "A": rates, "B": random["B"], "C": random["C"]}


def run(form, inputs, segments, gradients=True) -> dict[str, torch.Tensor]:
    y, states = form(*inputs.values(), segments)
    results = {"y": y, "states": states}
    if gradients:
        generator = torch.Generator().manual_seed(1)
        loss = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in (y, states))
        grads = torch.autograd.grad(loss, list(inputs.values()))
        results |= {f"d {name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return {name: value.detach().double().cpu() for name, value in results.items()}


def both(*args):
    """The same scan twice in one launch; half of every gradient comes through each."""
    from linmu_hf.ops.ssd.triton import ssd_triton_pair

    reason = why_unavailable("triton", args[0])
    if reason:
        raise ValueError(reason)
    (y, states), (other, _) = ssd_triton_pair(Scan(*args), Scan(*args))
    return (y.float() + other.float()) / 2, states


def errors(backend: str, truth, inputs, lengths, dtype, device: str) -> dict[str, float]:
    """Largest error of every result, relative to its largest value."""
    placed = {
        name: tensor.detach().to(device, dtype if name in "xBC" else torch.float32).requires_grad_()
        for name, tensor in inputs.items()
    }
    form = both if backend == "pair" else partial(ssd, backend=backend)
    actual = run(form, placed, Segments.build(lengths, device))
    scales = {name: max(value.abs().max().item(), 1e-30) for name, value in truth.items()}
    return {name: (actual[name] - truth[name]).abs().max().item() / scales[name] for name in truth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--backends", nargs="+", default=["auto"], metavar="NAME")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES, help="of the heads")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    worst: dict[str, dict[str, dict]] = {}
    for dtype_name, limit in LIMITS.items():
        dtype = DTYPES[dtype_name]
        for shape in map(SHAPES.__getitem__, arguments.shapes):
            for lengths in LENGTHS.values():
                for decay in DECAYS.values():
                    made = make(shape, lengths, decay, dtype)
                    inputs = {key: t.to(arguments.device).requires_grad_() for key, t in made.items()}
                    truth = run(ssd_recurrence, inputs, Segments.build(lengths, arguments.device))
                    for backend in arguments.backends:
                        entry = worst.setdefault(backend, {}).setdefault(dtype_name, {"limit": limit, "errors": {}})
                        try:
                            found = errors(backend, truth, inputs, lengths, dtype, arguments.device)
                        except Exception as error:
                            entry["failure"] = f"{type(error).__name__}: {first_line(error)}"
                            continue
                        for name, value in found.items():
                            entry["errors"][name] = max(value, entry["errors"].get(name, 0.0))
    wrong = []
    for backend, entries in worst.items():
        for dtype_name, entry in entries.items():
            largest = max(entry["errors"].values(), default=None)
            if entry["errors"]:
                entry["right"] = "failure" not in entry and all(e <= entry["limit"] for e in entry["errors"].values())
                wrong += [] if entry["right"] else [f"{backend} in {dtype_name}"]
            shown = "no result" if largest is None else f"largest error {largest:.1e} (limit {entry['limit']:.0e})"
            print(f"{backend:12s} {dtype_name:9s} {shown} {entry.get('failure', '')}")
    if arguments.json:
        result = {
            "backends": worst,
            "device": arguments.device,
            "machine": machine(arguments.device),
            "versions": library_versions(),
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if wrong:
        sys.exit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
