"""
Logits in float32 from operands in half precision, through whatever module holds the head's weight.

Rounded to bfloat16, logits of size 10 are wrong by 0.02, and so are the log-probabilities made of them. The product's
sums are in float32 anyway: here they stay there, in the forward pass and, of the gradient, in the backward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


HALF = (torch.bfloat16, torch.float16)


class Float32Logits(TorchFunctionMode):
    """
    A context within which every linear map with half-precision operands, also by autocast, returns float32.

    It acts on `F.linear` itself, so that the head is called as a module: hooks that gather a sharded weight or bring
    it from another device run as ever, and adapters add up in float32. A head that multiplies in another way
    (quantised, `DTensor` weights) is left as it is.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            logits = _linear(*args, **(kwargs or {}))
            if logits is not None:
                return logits
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    device = input.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    plain = all(type(operand) in (Tensor, nn.Parameter) for operand in (input, weight))
    if dtype not in HALF or not plain or not input.is_floating_point():
        return None
    flat = input.reshape(-1, input.shape[-1]).to(dtype)
    logits = _Product.apply(flat, weight.to(dtype)).unflatten(0, input.shape[:-1])
    return logits if bias is None else logits + bias.float()


class _Product(torch.autograd.Function):
    """x [n, d], w [v, d] in half precision -> x w^T [n, v] in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return _multiply(x, w.T)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        grad_x = _multiply_float32(grad, w).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_w = _multiply_float32(grad.T, x).to(w.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """The product of half-precision matrices in float32."""
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda:
            try:
                return torch.mm(a, b, out_dtype=torch.float32)
            except TypeError:  # PyTorch before 2.8
                pass
        return a.float() @ b.float()


def _multiply_float32(a: Tensor, b: Tensor) -> Tensor:
    """The product of a float32 and a half-precision matrix; a GPU takes the first as a sum of two halves."""
    if not a.is_cuda or b.dtype is not torch.bfloat16:
        with torch.autocast(a.device.type, enabled=False):
            return a @ b.float()
    high = a.to(b.dtype)
    return _multiply(high, b) + _multiply((a - high.float()).to(b.dtype), b)
