"""Local-Swin: attention of the vision tokens inside small 3D windows, shifted in every other layer (Sec. 3.1.2)."""

from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import rotate_half

from ..ops.window_attention import window_attention


class LocalSwin(nn.Module):
    """
    The Local-Swin branch. With the teacher's weights (Eq. 5) it is the teacher's attention restricted to the windows.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        h, g, p, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        self.head_dim = p
        self.shift = config.shifts_windows(layer_idx)
        self.q_proj = nn.Linear(d, h * p)
        self.k_proj = nn.Linear(d, g * p)
        self.v_proj = nn.Linear(d, g * p)
        self.o_proj = nn.Linear(h * p, d, bias=False)

    def forward(self, z, rope, layout):
        """
        Args:
            z (`torch.Tensor` of shape `[v, d]`): The vision tokens of the batch.
            rope (`tuple[torch.Tensor, torch.Tensor]`): cos and sin of the same tokens, each `[v, p]`.
            layout (`TokenLayout`): Its windows.

        Returns:
            `torch.Tensor` of shape `[v, h * p]`: the branch before its output projection.
        """
        cos, sin = (t[:, None] for t in rope)
        q, k, v = (proj(z).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (t * cos + rotate_half(t) * sin for t in (q, k))
        windows = layout.windows[self.shift]
        return window_attention(q, k, v, windows.groups, windows.slots).flatten(1)
