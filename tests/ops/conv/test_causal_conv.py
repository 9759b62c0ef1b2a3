"""The short convolution of packed sequences against PyTorch's, one sequence at a time."""

import pytest
import torch
from torch.nn.functional import conv1d

from linmu_hf.ops.conv.causal_conv import causal_conv
from linmu_hf.ops.segments import Segments


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("taps", [2, 4])
@pytest.mark.parametrize("lengths", [(1,), (9,), (7, 1, 2, 9)], ids=str)
@pytest.mark.parametrize("tails", [False, True], ids=["from zero", "from tails"])
def test_equals_the_definition(lengths, tails, taps, dtype):
    channels = 16
    inputs = [torch.randn(sum(lengths), channels), torch.randn(taps, channels)]
    inputs += [torch.randn(len(lengths), taps - 1, channels)] if tails else []
    inputs = [t.to(dtype).requires_grad_() for t in inputs]

    def by_definition(x, weight, segments, tail=None):
        outputs, last = [], []
        for i, part in enumerate(x.split(segments.lengths)):
            before = x.new_zeros(taps - 1, channels) if tail is None else tail[i]
            padded = torch.cat([before, part])
            outputs.append(conv1d(padded.t()[None], weight.t()[:, None], groups=channels)[0].t())
            last.append(padded[len(part) :])
        return torch.cat(outputs), torch.stack(last)

    def results(form):
        y, last = form(*inputs[:2], Segments.build(lengths), *inputs[2:])
        loss = (y * torch.arange(y.numel()).view_as(y).sin()).sum() + last.square().sum()
        return [y, last, *torch.autograd.grad(loss, inputs)]

    torch.testing.assert_close(results(causal_conv), results(by_definition))
