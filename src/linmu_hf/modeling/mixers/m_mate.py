"""The M-MATE block (Algorithm 1): two branches side by side in place of self-attention."""

import math

import torch
from torch import nn
from transformers import initialization as init

from ..layout.token_layout import TextStep
from .flex_ma import FlexMA, ScanDirection, ZeroLinear, state_shape
from .local_swin import LocalSwin


class MMate(nn.Module):
    """
    Sums Flex-MA (global context) and Local-Swin (neighbours) with a learned weight per token.

    Args:
        config (`LinMUTextConfig`): Sizes and options.
        layer_idx (`int`): Picks the scan order and whether windows are shifted.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.flex_ma = FlexMA(config, layer_idx)
        self.local_swin = LocalSwin(config, layer_idx)
        self.fusion_proj = ZeroLinear(config.hidden_size, 1)
        self.output_norm = nn.Identity()
        if config.output_norm == "layer_norm":
            self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)

    state_shape = staticmethod(state_shape)

    @staticmethod
    def flops_per_token(config, past: int = 0) -> int:
        """Returns the multiplications and additions of the matrix products of a decode step, whatever the `past`."""
        h, g, p, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        features = 2 * (h + g) * p * config.state_size if config.bc_feature_map == "softmax" else 0
        return 2 * d * (2 * (h + g) * p + h) + features + 2 * math.prod(state_shape(config))

    def reset_new_parameters(self):
        """Sets every parameter that does not come from the teacher (Eq. 4 and 5), in place and deterministically."""
        for module in self.modules():
            if isinstance(module, (ScanDirection, ZeroLinear)):
                module.reset_new_parameters()
        for name, parameter in self.output_norm.named_parameters():
            init.constant_(parameter, 1.0 if name == "weight" else 0.0)

    def branches(self, hidden_states, rope, layout, cache_layer=None):
        """
        Returns both branches before their output projections.

        Args:
            hidden_states (`torch.Tensor` of shape `[b, t, d]`): Block input.
            rope (`tuple[torch.Tensor, torch.Tensor]`): cos and sin, each `[b, t, p]`.
            layout (`TokenLayout`): Scan orders, segments and windows.
            cache_layer (`MMateCacheLayer`, *optional*): Recurrent state; updated.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: Flex-MA `[n, h * p]` in scan order, Local-Swin `[v, h * p]`
            (`None` without vision tokens).
        """
        tokens, rope = hidden_states.flatten(0, 1), [table.flatten(0, 1) for table in rope]
        flex = self.flex_ma(*self._in_scan_order(layout, tokens, rope), layout, cache_layer)
        return flex, None if layout.vision is None else self.local_swin(tokens, rope, layout)

    def _in_scan_order(self, layout, tokens, rope):
        order = layout.orders[self.config.scan_order(self.layer_idx)]
        return tokens.index_select(0, order), [table.index_select(0, order) for table in rope]

    def smallest_normalizer(self, hidden_states, rope, layout) -> float:
        """Returns [`FlexMA.smallest_normalizer`] of the same tokens; arguments as in `branches`."""
        tokens, rope = hidden_states.flatten(0, 1), [table.flatten(0, 1) for table in rope]
        u, in_order = self._in_scan_order(layout, tokens, rope)
        return self.flex_ma.smallest_normalizer(u, in_order, layout)

    def forward(self, hidden_states, rope, layout, cache_layer=None):
        """
        Returns the block output `[b, t, d]`; arguments as in `branches`, or a [`TextStep`] for the layout. Rows of
        padding hold no meaningful values.
        """
        if isinstance(layout, TextStep):
            token, rope = hidden_states[:, 0], tuple(t[:, 0] for t in rope)
            flex = self.flex_ma.step(token, rope, layout.mask, cache_layer)
            return self.output_norm(self.flex_ma.o_proj(flex))[:, None]
        flex, swin = self.branches(hidden_states, rope, layout, cache_layer)
        tokens = hidden_states.flatten(0, 1)
        order = layout.orders[self.config.scan_order(self.layer_idx)]
        y = torch.zeros_like(tokens).index_copy_(0, order, self.flex_ma.o_proj(flex).to(tokens.dtype))
        if swin is not None:
            vision = layout.vision
            fusion = torch.sigmoid(self.fusion_proj(tokens).index_select(0, vision))  # lambda_t, which is 1 on text
            swin = self.local_swin.o_proj(swin).to(tokens.dtype)
            y.index_copy_(0, vision, torch.lerp(swin, y.index_select(0, vision), fusion))
        return self.output_norm(y).view_as(hidden_states)
