"""Inputs of a selective scan, and its values and gradients."""

import torch

from linmu_hf.ops.segments import Segments


# query heads h, state heads s, key/value heads g
HEADS = {"s = h": (4, 4, 2), "s = g": (4, 2, 2), "g = h": (3, 3, 3), "g < s < h": (8, 4, 2), "one group": (6, 3, 1)}


def make(lengths, heads=(4, 4, 2), p=5, k=3, states=True, dtype=torch.float64):
    h, s, g = heads
    n = sum(lengths)
    inputs = {
        "x": torch.randn(n, g, p),
        "dt": torch.rand(n, s) * 0.3,
        "A": -torch.linspace(0.01, 4, s),
        "B": torch.randn(n, g, k),
        "C": torch.randn(n, h, k),
    }
    if states:
        inputs["initial_states"] = torch.randn(len(lengths), s, p, k)
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs.items()}


def run(form, inputs, lengths, chunk_size=None):
    """Values, final states and the gradients of a fixed random functional of both."""
    segments = Segments.build(lengths, chunk_size=chunk_size)
    y, finals = form(segments=segments, **inputs)
    generator = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in (y, finals))
    grads = torch.autograd.grad(loss, list(inputs.values()))
    return {"y": y, "finals": finals, **{f"d {name}": grad for name, grad in zip(inputs, grads)}}


def assert_same(actual, expected, rtol=1e-10):
    """Compares by the largest value of each; the gradient of A is a sum over all tokens, whose terms may cancel."""
    for name, value in expected.items():
        scale = value.abs().max().item() * (10 if name == "d A" else 1)
        torch.testing.assert_close(actual[name], value, atol=rtol * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
