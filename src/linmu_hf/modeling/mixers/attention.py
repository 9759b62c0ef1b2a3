"""
`attn_implementation="torch_varlen"`: layers with full attention read packed rows by PyTorch's kernel for sequences of
any lengths, which needs neither the flash-attn package nor a mask of t x t. Everything else is as with `"sdpa"`.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...ops.attention.varlen import varlen_attention, why_unfit


NAME = "torch_varlen"
BY_SEQUENCE = "sdpa_by_sequence"  # packed rows without a mask of t x t, on any device


def varlen_attention_forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None, max_length_q: int | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """
    Attends by Transformers' contract: query `[b, h, t, p]`, key and value `[b, g, t, p]`.

    Returns:
        `tuple[torch.Tensor, None]`: `[b, t, h, p]`, and no attention weights.

    Raises:
        `ValueError`: A row is packed, and the kernel cannot take it; the message says why.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    # a rotary embedding in float32 leaves queries in another type than values
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    reason = why_unfit(NAME, q)
    if reason is None and dropout:
        reason = f"attention_dropout={dropout}: it has no dropout, set that to 0 or use 'sdpa'"
    if reason:
        raise ValueError(f"attn_implementation={NAME!r} cannot read a packed row: {reason}")
    assert max_length_q is not None
    y: torch.Tensor = varlen_attention(q, k, v, cu_seq_lens_q, int(max_length_q), NAME, causal=True, scale=scaling)
    return y[None], None


def by_sequence_forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, dropout: float = 0.0, scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None, max_length_q: int | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """
    Attends as `varlen_attention_forward` where its kernel can, else by `"sdpa"` one sequence of a packed row after the
    other. Arguments and result are the same.
    """
    if cu_seq_lens_q is None or (why_unfit(NAME, query[0].transpose(0, 1)) is None and not dropout):
        return varlen_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, cu_seq_lens_q, max_length_q, **kwargs
        )
    parts, bounds = [], cu_seq_lens_q.tolist()
    for start, end in pairwise(bounds):
        own = (states[:, :, start:end] for states in (query, key, value))
        parts.append(sdpa_attention_forward(module, *own, None, dropout=dropout, scaling=scaling, **kwargs)[0])
    return torch.cat(parts, dim=1), None


for name, forward in ((NAME, varlen_attention_forward), (BY_SEQUENCE, by_sequence_forward)):
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)
