"""Local-Swin: exact attention to what is near, by the teacher's own q, k and v (Eq. 5).

A vision token sees its 3D window, shifted in every other layer (Sec. 3.1.2). With `text_window`, text tokens see the
last text tokens, and both see the first ones, the attention sinks; vision tokens also see the text just before them.
"""

import math

import torch
from torch import Tensor, nn

from ...ops.attention.banded import banded_attention, join, masked_softmax
from ...ops.attention.window import window_attention
from ..cache import MMateCacheLayer
from ..configuration_linmu import LinMUTextConfig
from ..layout.near import NearStep
from ..layout.token_layout import TokenLayout, Windows
from .projection import Rope, joint_linear, rotate


class LocalSwin(nn.Module):
    """
    The Local-Swin branch. With the teacher's weights it is the teacher's attention restricted to what is near.
    """

    def __init__(self, config: LinMUTextConfig, layer_idx: int):
        super().__init__()
        h, g, p, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        assert p is not None
        self.heads, self.groups, self.head_dim = h, g, p
        self.shift = config.shifts_windows(layer_idx)
        self.text_window, self.sinks = config.text_window, config.sink_tokens
        self.q_proj = nn.Linear(d, h * p)
        self.k_proj = nn.Linear(d, g * p)
        self.v_proj = nn.Linear(d, g * p)
        self.o_proj = nn.Linear(h * p, d, bias=False)

    def forward(
        self, tokens: Tensor, rope: Rope, layout: TokenLayout, cache_layer: MMateCacheLayer | None = None
    ) -> Tensor:
        """
        Attends to what is near each token.

        Args:
            tokens (`torch.Tensor` of shape `[b * t, d]`): The flattened batch.
            rope (`tuple[torch.Tensor, torch.Tensor]`): cos and sin of the same tokens, each `[b * t, p]`.
            layout (`TokenLayout`): Its vision tokens and their windows, and with `text_window` its `near`.
            cache_layer (`MMateCacheLayer`, *optional*): Keys and values of the text before; updated.

        Returns:
            `torch.Tensor`: The branch before its output projection, `[b * t, h, p]`; without `text_window` of shape
            `[v, h, p]`, for `layout.vision`.
        """
        windows = None if layout.vision is None else layout.windows[self.shift]
        if layout.near is None:
            assert windows is not None
            # taken window by window, nothing has to be moved for the attention
            places = layout.vision.index_select(0, _in_windows(windows))
            q, k, v = self._project(tokens.index_select(0, places), tuple(t.index_select(0, places) for t in rope))
            y = window_attention(q, k, v, [group.shape for group in windows.groups], windows.offsets)
            return y.index_select(0, windows.slots)

        q, k, v = self._project(tokens, rope)
        near = layout.near
        keys, values = (t.index_select(0, near.text) for t in (k, v))
        if cache_layer is not None:
            before = cache_layer.load_slots(("keys", "values"), near.cached)
            stay = (t.index_select(0, near.stay) for t in (keys, values))
            cache_layer.store_slots(
                near.slots, self.sinks + self.text_window, layout.batch, **dict(zip(("keys", "values"), stay))
            )
            if near.cached is not None:
                keys, values = (torch.cat([old.to(new.dtype), new]) for old, new in zip(before, (keys, values)))
        y = torch.zeros_like(q)
        if near.text_blocks is not None:
            text = q.index_select(0, near.text)
            text = banded_attention(text, keys, values, near.text_blocks, self.text_window, self.sinks)
            y = y.index_copy(0, near.text, text)
        if windows is not None:
            y = y.index_copy(0, layout.vision, self._vision(q, k, v, keys, values, layout, windows))
        return y

    def _project(self, tokens: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [n, h, p], keys and values [n, g, p] of tokens [n, d]."""
        qkv = joint_linear(tokens, self.q_proj, self.k_proj, self.v_proj)
        qk, v = qkv.unflatten(-1, (-1, self.head_dim)).split([self.heads + self.groups, self.groups], dim=1)
        return *rotate(qk, rope).split([self.heads, self.groups], dim=1), v

    def _vision(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, layout: TokenLayout, windows: Windows
    ) -> Tensor:
        """Vision tokens see their window, and of the text before their span as much as a text token would."""
        places = layout.vision.index_select(0, _in_windows(windows))
        qw, kw, vw = (t.index_select(0, places) for t in (q, k, v))
        y, lse = window_attention(
            qw, kw, vw, [group.shape for group in windows.groups], windows.offsets, with_lse=True
        )
        y, lse = (t.index_select(0, windows.slots) for t in (y, lse))
        assert layout.near is not None and layout.near.vision_blocks is not None
        context = banded_attention(
            q.index_select(0, layout.vision), keys, values, layout.near.vision_blocks, self.text_window, self.sinks,
            with_lse=True,
        )  # fmt: skip
        return join(y, lse, *context)[0]

    def step(self, token: Tensor, rope: Rope, cache_layer: MMateCacheLayer, near: NearStep) -> Tensor:
        """
        Returns the branch before its output projection `[b, h, p]`, for one text token of every row.

        Args:
            token (`torch.Tensor` of shape `[b, d]`): The tokens.
            rope (`tuple[torch.Tensor, torch.Tensor]`): Their cos and sin, each `[b, p]`.
            cache_layer (`MMateCacheLayer`): Keys and values before; updated.
            near (`NearStep`): Where the tokens go.
        """
        q, k, v = self._project(token, rope)
        cache_layer.exchange(near.slot, near.real, near.filled.shape[1], keys=k, values=v)
        keys, values = (cache_layer.slots[name].to(q.dtype).transpose(1, 2) for name in ("keys", "values"))
        q = q.unflatten(1, (self.groups, -1))  # [b, g, r, p]
        scores = q @ keys.transpose(-1, -2) / math.sqrt(self.head_dim)
        return masked_softmax(scores, near.filled[:, None, None], values)[0].flatten(1, 2)


def _in_windows(windows: Windows) -> Tensor:
    return torch.cat([group.flatten() for group in windows.groups])
