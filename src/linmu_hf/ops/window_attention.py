"""Softmax attention inside windows: the windows are a batch of short sequences for PyTorch's SDPA."""

from torch.nn.functional import scaled_dot_product_attention


def window_attention(q, k, v, index, mask, slots):
    """
    Attention of every token to the tokens of its own window (Sec. 3.1.2).

    Args:
        q (`torch.Tensor` of shape `[n, h, d]`): Queries of the vision tokens.
        k, v (`torch.Tensor` of shape `[n, g, d]`): Keys and values; h is a multiple of g.
        index (`torch.LongTensor` of shape `[windows, size]`): Tokens of each window; unused places repeat any token.
        mask (`torch.BoolTensor` of shape `[windows, size]`, *optional*): Places that hold a token; `None` if all do.
        slots (`torch.LongTensor` of shape `[n]`): Place of each token among the `windows * size`.

    Returns:
        `torch.Tensor` of shape `[n, h, d]`.
    """
    h, d = q.shape[1:]
    windows, size = index.shape
    q, k, v = (t.index_select(0, index.view(-1)).view(windows, size, t.shape[1], d).transpose(1, 2) for t in (q, k, v))
    if h != k.shape[1]:
        # windows hold a few hundred tokens: repeating their keys costs less than the slower kernel for grouped heads
        k, v = (t.repeat_interleave(h // t.shape[1], dim=1) for t in (k, v))
    y = scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])
    return y.transpose(1, 2).reshape(windows * size, h, d).index_select(0, slots)
