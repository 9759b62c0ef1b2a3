"""One process of several that share gradients, notes and a clock, as the suite's training does; prints what it got."""

import json

import torch

from linmu_hf.testbed.suite import parallel


def main():
    process, processes = parallel.start()
    everywhere, here = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    everywhere.grad = torch.tensor([1.0, 2.0]) * (process + 1)
    here.grad = torch.tensor([4.0, 0.0]) if process == 0 else None
    parallel.mean_gradients([everywhere, here])
    gradients = [parameter.grad.tolist() for parameter in (everywhere, here)]
    print(json.dumps([processes, gradients, parallel.of_all({"process": process}), parallel.of_first(process + 0.5)]))
