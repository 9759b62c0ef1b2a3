"""The short convolution in front of a scan (Mamba2), over packed sequences."""

from typing import Any

import torch
from torch.nn.functional import conv2d

from ..backends import multiplies_in_bfloat16
from ..segments import Segments
from ..ssd.scan import use_triton_kernels


def causal_conv(
    xbc: torch.Tensor, weight: torch.Tensor, segments: Segments, tail: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Computes the depthwise causal convolution of packed sequences, on a GPU by our Triton kernel.

    Args:
        xbc (`torch.Tensor` of shape `[n, c]`): Packed tokens.
        weight (`torch.Tensor` of shape `[w, c]`): Taps, oldest token first.
        segments (`Segments`): The sequences.
        tail (`torch.Tensor` of shape `[m, w - 1, c]`, *optional*): The tokens before each sequence; zeros if absent.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Output `[n, c]`, and the last `w - 1` inputs of every sequence.
    """
    if use_triton_kernels(xbc):
        from .triton import causal_conv_triton

        return causal_conv_triton(xbc, weight, segments, tail)
    halo, m = weight.shape[0] - 1, len(segments)
    device = xbc.device
    if m == 1:
        before = xbc.new_zeros(halo, xbc.shape[1]) if tail is None else tail[0].to(xbc.dtype)
        padded = torch.cat([before, xbc])
        return Taps.apply(padded, weight.to(xbc.dtype)), padded[len(xbc) :][None]
    lengths = torch.tensor(segments.lengths, device=device)
    first = lengths.cumsum(0) - lengths
    # each sequence comes after its halo
    shift = (torch.arange(1, m + 1, device=device) * halo).repeat_interleave(lengths, output_size=len(xbc))
    places = torch.arange(len(xbc), device=device) + shift
    padded = xbc.new_zeros(len(xbc) + m * halo, xbc.shape[1]).index_copy(0, places, xbc)
    heads = (first + torch.arange(m, device=device) * halo)[:, None] + torch.arange(halo, device=device)
    if tail is not None:
        padded = padded.index_copy(0, heads.flatten(), tail.flatten(0, 1).to(padded.dtype))
    y = Taps.apply(padded, weight.to(padded.dtype))
    return y.index_select(0, places - halo), padded[heads + lengths[:, None]]


def _has_fast_depthwise(x: torch.Tensor) -> bool:
    """Whether oneDNN convolves such an x in one pass; PyTorch's own depthwise convolution is slower than the taps."""
    single = x.dtype == torch.float32 and x.device.type == "cpu" and _has_onednn()
    return single or multiplies_in_bfloat16(x)


@torch.compiler.assume_constant_result
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available()


class Taps(torch.autograd.Function):
    """The convolution, tap by tap or by oneDNN; spares autograd a tensor of zeros for each tap."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        n = len(x) - len(weight) + 1
        if _has_fast_depthwise(x):
            pixels = x.view(1, 1, *x.shape).permute(0, 3, 1, 2)  # an image of one row, channels last
            return conv2d(pixels, weight.t()[:, None, None], groups=x.shape[1])[0, :, 0].t()
        y = x[:n] * weight[0]
        for tap in range(1, len(weight)):
            y.addcmul_(x[tap : tap + n], weight[tap])
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        n = len(grad)
        grad_x = torch.zeros_like(x)
        for tap in range(len(weight)):
            grad_x[tap : tap + n].addcmul_(grad, weight[tap])
        grad_weight = torch.stack([(x[tap : tap + n] * grad).sum(0) for tap in range(len(weight))])
        return grad_x, grad_weight
