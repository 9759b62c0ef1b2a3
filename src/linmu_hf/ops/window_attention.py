"""Softmax attention inside windows: the windows are a batch of short sequences for PyTorch's SDPA."""

import torch
from torch.nn.functional import scaled_dot_product_attention


def window_attention(q, k, v, groups, slots):
    """
    Attention of every token to the tokens of its own window (Sec. 3.1.2).

    Args:
        q (`torch.Tensor` of shape `[n, h, d]`): Queries of the vision tokens.
        k, v (`torch.Tensor` of shape `[n, g, d]`): Keys and values; h is a multiple of g.
        groups (`Sequence[torch.LongTensor]`, each of shape `[windows, size]`): Tokens of the windows of one size.
        slots (`torch.LongTensor` of shape `[n]`): Place of each token when the groups are laid end to end.

    Returns:
        `torch.Tensor` of shape `[n, h, d]`.
    """
    y = torch.cat([_attend(q, k, v, index) for index in groups])
    return y.index_select(0, slots)


def _attend(q, k, v, index):
    """Windows of one size, [windows * size, h, d]."""
    h, d = q.shape[1:]
    windows, size = index.shape
    q, k, v = (t.index_select(0, index.view(-1)).view(windows, size, t.shape[1], d).transpose(1, 2) for t in (q, k, v))
    if h != k.shape[1]:
        # windows hold a few hundred tokens: repeating their keys costs less than the slower kernel for grouped heads
        k, v = (t.repeat_interleave(h // t.shape[1], dim=1) for t in (k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(windows * size, h, d)
