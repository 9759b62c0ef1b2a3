"""
What numbers too small for float32's ordinary form cost a model on a CPU, and what flushing them to 0 changes.

    python benchmarks/denormals.py [--model MODEL] [--rows 16]

Reads rows of the testbed forward and backward, with and without `torch.set_flush_denormal`, in turns, on one thread;
prints the seconds of the fastest of three, and the largest difference of the logits.
"""

import argparse
import time

import torch
from transformers import AutoProcessor

from linmu_hf import LinMUForConditionalGeneration
from linmu_hf.commands.chat import SHIPPED_STUDENT
from linmu_hf.data import encode_rows
from linmu_hf.testbed.data import training_rows


def seconds(model, inputs, flush: bool) -> tuple[float, float, torch.Tensor]:
    """Seconds forward and backward, and the logits."""
    torch.set_flush_denormal(flush)
    start = time.perf_counter()
    logits = model(**inputs, use_cache=False).logits
    middle = time.perf_counter()
    logits.square().mean().backward()
    end = time.perf_counter()
    torch.set_flush_denormal(False)
    return middle - start, end - middle, logits.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=str(SHIPPED_STUDENT), help="by default the testbed's student")
    parser.add_argument("--rows", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = LinMUForConditionalGeneration.from_pretrained(arguments.model).train()
    processor = AutoProcessor.from_pretrained(arguments.model)
    inputs = encode_rows(processor, list(training_rows(0, arguments.rows)))
    inputs.pop("labels")
    found: dict[bool, list] = {False: [], True: []}
    for _ in range(4):
        for flush in found:
            found[flush].append(seconds(model, inputs, flush))
    for flush, runs in found.items():
        forward, backward = (min(run[part] for run in runs[1:]) for part in (0, 1))
        print(f"{'flushed' if flush else 'as they are':12} forward {forward:.2f} s, backward {backward:.2f} s")
    difference = (found[False][-1][2] - found[True][-1][2]).abs().max()
    print(f"largest difference of the logits {difference:.1e}")


if __name__ == "__main__":
    main()
