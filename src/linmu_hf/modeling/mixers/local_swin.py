"""Local-Swin: attention of the vision tokens inside small 3D windows, shifted in every other layer (Sec. 3.1.2)."""

import torch
from torch import nn

from ...ops.attention.window import window_attention
from .projection import joint_linear, rotate


class LocalSwin(nn.Module):
    """
    The Local-Swin branch. With the teacher's weights (Eq. 5) it is the teacher's attention restricted to the windows.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        h, g, p, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        self.heads, self.groups, self.head_dim = h, g, p
        self.shift = config.shifts_windows(layer_idx)
        self.q_proj = nn.Linear(d, h * p)
        self.k_proj = nn.Linear(d, g * p)
        self.v_proj = nn.Linear(d, g * p)
        self.o_proj = nn.Linear(h * p, d, bias=False)

    def forward(self, tokens, rope, layout):
        """
        Args:
            tokens (`torch.Tensor` of shape `[b * t, d]`): The flattened batch.
            rope (`tuple[torch.Tensor, torch.Tensor]`): cos and sin of the same tokens, each `[b * t, p]`.
            layout (`TokenLayout`): Its vision tokens and their windows.

        Returns:
            `torch.Tensor` of shape `[v, h * p]`: the branch before its output projection, for `layout.vision`.
        """
        windows = layout.windows[self.shift]
        # taken window by window, nothing has to be moved for the attention
        places = layout.vision.index_select(0, torch.cat([group.flatten() for group in windows.groups]))
        qkv = joint_linear(tokens.index_select(0, places), self.q_proj, self.k_proj, self.v_proj)
        qk, v = qkv.unflatten(-1, (-1, self.head_dim)).split([self.heads + self.groups, self.groups], dim=1)
        qk = rotate(qk, tuple(t.index_select(0, places) for t in rope))
        q, k = qk.split([self.heads, self.groups], dim=1)
        y = window_attention(q, k, v, [group.shape for group in windows.groups], windows.offsets)
        return y.flatten(1).index_select(0, windows.slots)
