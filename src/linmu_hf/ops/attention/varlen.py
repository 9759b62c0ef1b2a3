"""Softmax attention of sequences of any lengths in one call: by flash-attn, or by PyTorch's kernel of that name."""

import inspect
import math

import torch

from ..backends import why_unavailable


PACKAGES = {"flash_attn": "flash_attn", "torch_varlen": "torch.nn.attention.varlen"}

# what both kernels take
DTYPES = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, longest: int, backend: str,
    causal: bool = False, scale: float | None = None, with_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """
    Computes the attention of every token to the tokens of its own sequence.

    Args:
        q (`torch.Tensor` of shape `[n, h, d]`): Queries, sequence by sequence.
        k, v (`torch.Tensor` of shape `[n, g, d]`): Keys and values; h is a multiple of g.
        cu_seqlens (`torch.IntTensor` of shape `[m + 1]`): Where each sequence begins, and the end.
        longest (`int`): Tokens of the longest sequence.
        backend (`str`): `"flash_attn"` or `"torch_varlen"`.
        causal (`bool`, *optional*, defaults to `False`): To no later tokens.
        scale (`float`, *optional*): Factor of the scores, by default `d ** -0.5`.
        with_lse (`bool`, *optional*, defaults to `False`): Whether the log of the sum of exp(scores) is wanted too, of
            which the kernels give no gradient.

    Returns:
        `torch.Tensor` of shape `[n, h, d]`, or a tuple of it and lse `[n, h]` in fp32.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        result = flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest,
            softmax_scale=scale, causal=causal, deterministic=torch.are_deterministic_algorithms_enabled(),
            return_attn_probs=with_lse,
        )  # fmt: skip
        return (result[0], result[1].t()) if with_lse else result
    from torch.nn.attention.varlen import varlen_attn

    options = {"scale": scale, "window_size": (-1, 0 if causal else -1)}
    if q.shape[1] != k.shape[1]:
        if _knows("enable_gqa"):
            options["enable_gqa"] = True
        else:  # of torch 2.11 and older
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if with_lse:
        from torch.nn.attention.varlen import AuxRequest

        y, lse = varlen_attn(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, return_aux=AuxRequest(lse=True), **options
        )
        return y, lse.t()
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)


def why_unfit(backend: str, q: torch.Tensor) -> str | None:
    """Returns why a backend cannot take such queries; `None` if it can."""
    if backend not in PACKAGES:
        return None
    reason = why_unavailable(PACKAGES[backend], q, DTYPES, "sdpa")
    if reason is None and backend == "torch_varlen" and not _knows("window_size"):
        reason = "this PyTorch's varlen_attn knows no window_size: upgrade torch"
    if reason is None and (q.shape[-1] > LARGEST_HEAD or q.shape[-1] % 8):
        reason = f"heads of {q.shape[-1]} channels: it takes multiples of 8 up to {LARGEST_HEAD}, use 'sdpa'"
    return reason


@torch.compiler.assume_constant_result
def _knows(parameter: str) -> bool:
    """Whether this PyTorch's varlen_attn has such a parameter."""
    from torch.nn.attention.varlen import varlen_attn

    return parameter in inspect.signature(varlen_attn).parameters
