"""
`attn_implementation="torch_varlen"`: layers with full attention read packed rows by PyTorch's kernel for sequences of
any lengths, which needs neither the flash-attn package nor a mask of t x t. Everything else is as with `"sdpa"`.
"""

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ...ops.attention.varlen import varlen_attention, why_unfit


NAME = "torch_varlen"


def varlen_attention_forward(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, cu_seq_lens_q=None, max_length_q=None,
    **kwargs,
):  # fmt: skip
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
    return varlen_attention(q, k, v, cu_seq_lens_q, int(max_length_q), NAME, causal=True, scale=scaling)[None], None


AttentionInterface.register(NAME, varlen_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
