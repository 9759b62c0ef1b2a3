"""The M-MATE block (Algorithm 1): two branches side by side in place of self-attention.

code       paper        meaning
flex       y^Flex       Flex-MA: what is far, in a state
near       y^LS         Local-Swin: what is near, exact
share      lambda_t     weight of the far branch, per head
"""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..cache import MMateCacheLayer
from ..configuration_linmu import LinMUTextConfig
from ..layout.token_layout import TextStep, TokenLayout
from .flex_ma import FlexMA, ScanDirection, ZeroLinear, state_shape
from .local_swin import LocalSwin
from .projection import Rope


# lambda is 0.05 on text at the start: what is near is exact then, what is far has to be learned.
TEXT_FUSION_START = -3.0


def slot_count(config: LinMUTextConfig) -> int:
    """Returns how many text tokens of a sequence the cache keeps."""
    return config.sink_tokens + config.text_window


class MMate(nn.Module):
    """
    The sum of Flex-MA (global context) and Local-Swin (neighbours) with a learned weight per token.

    Args:
        config (`LinMUTextConfig`): Sizes and options.
        layer_idx (`int`): Picks the scan order and whether windows are shifted.
    """

    def __init__(self, config: LinMUTextConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.flex_ma = FlexMA(config, layer_idx)
        self.local_swin = LocalSwin(config, layer_idx)
        self.fusion_proj = ZeroLinear(config.hidden_size, config.num_attention_heads if config.text_window else 1)
        if config.text_window:
            self.text_fusion_proj = ZeroLinear(config.hidden_size, config.num_attention_heads, start=TEXT_FUSION_START)
        self.output_norm = nn.Identity()
        if config.output_norm == "layer_norm":
            self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)

    @staticmethod
    def state_shapes(config: LinMUTextConfig) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of what the cache holds of a sequence: the scan's state, and the slots of text tokens."""
        shapes: dict[str, tuple[int, ...]] = {"state": state_shape(config)}
        if config.text_window:
            h, g, p, slots = (
                config.num_attention_heads,
                config.num_key_value_heads,
                config.head_dim,
                slot_count(config),
            )
            assert p is not None
            shapes |= dict.fromkeys(("keys", "values", "x"), (slots, g, p))
            shapes |= {"B": (slots, g, shapes["state"][-1]), "dt": (slots, h)}
        return shapes

    @staticmethod
    def flops_per_token(config: LinMUTextConfig, past: int = 0) -> int:
        """Returns the multiplications and additions of the matrix products of a decode step, whatever the `past`."""
        h, g, p, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        features = 2 * (h + g) * p * config.state_size if config.bc_feature_map == "softmax" else 0
        far = 2 * d * (2 * (h + g) * p + h) + features + 2 * math.prod(state_shape(config))
        near = 2 * d * (2 * (h + g) * p + h) + 4 * h * p * slot_count(config)
        return far + near if config.text_window else far

    def reset_new_parameters(self) -> None:
        """Sets every parameter that does not come from the teacher (Eq. 4 and 5), in place and deterministically."""
        for module in self.modules():
            if isinstance(module, (ScanDirection, ZeroLinear)):
                module.reset_new_parameters()
        for name, parameter in self.output_norm.named_parameters():
            init.constant_(parameter, 1.0 if name == "weight" else 0.0)

    def branches(
        self, hidden_states: Tensor, rope: Rope, layout: TokenLayout, cache_layer: MMateCacheLayer | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """
        Returns what the output projections of both branches read: the branches, weighted by lambda and 1 - lambda.

        Args:
            hidden_states (`torch.Tensor` of shape `[b, t, d]`): Block input.
            rope (`tuple[torch.Tensor, torch.Tensor]`): cos and sin, each `[b, t, p]`.
            layout (`TokenLayout`): Scan orders, segments and windows.
            cache_layer (`MMateCacheLayer`, *optional*): Recurrent state; updated.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: Flex-MA and Local-Swin `[b * t, h p]`, 0 where a token has no
            such branch; `None` if no token has the second.
        """
        flex, near, share = self.parts(hidden_states, rope, layout, cache_layer)
        if near is None:
            return flex.flatten(1), None
        return (flex * share).flatten(1), (near * (1 - share)).flatten(1)

    def parts(
        self, hidden_states: Tensor, rope: Rope, layout: TokenLayout, cache_layer: MMateCacheLayer | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """
        Returns Flex-MA and Local-Swin `[b * t, h, p]` and lambda `[b * t, h or 1, 1]`; `None` twice if no token has
        the second branch. Arguments as in `branches`.
        """
        tokens, rope = hidden_states.flatten(0, 1), [table.flatten(0, 1) for table in rope]
        order = layout.orders[self.config.scan_order(self.layer_idx)]
        u, *in_order = (tensor.index_select(0, order) for tensor in (tokens, *rope))
        flex = self.flex_ma(u, in_order, layout, cache_layer)
        flex = flex.new_zeros(len(tokens), flex.shape[1]).index_copy(0, order, flex)
        flex = flex.unflatten(1, (-1, self.config.head_dim))
        if layout.near is None and layout.vision is None:
            return flex, None, None
        near = self.local_swin(tokens, rope, layout, cache_layer).to(flex.dtype)
        if layout.near is None:  # lambda is 1 on text
            near = torch.zeros_like(flex).index_copy(0, layout.vision, near)
            share = flex.new_ones(len(tokens), 1)
        else:
            scanned = layout.near.scanned.new_zeros(len(tokens)).index_copy(0, order, layout.near.scanned)
            share = self._text_share(tokens, scanned).to(flex.dtype)
        if layout.vision is not None:
            vision = torch.sigmoid(self.fusion_proj(tokens.index_select(0, layout.vision)))
            share = share.index_copy(0, layout.vision, vision.to(flex.dtype))
        return flex, near, share[..., None]

    def _text_share(self, tokens: Tensor, scanned: Tensor) -> Tensor:
        """lambda of text tokens [n, h], which is 0 before anything is scanned."""
        return torch.sigmoid(self.text_fusion_proj(tokens)) * scanned[:, None]

    def smallest_normalizer(self, hidden_states: Tensor, rope: Rope, layout: TokenLayout) -> float:
        """Returns [`FlexMA.smallest_normalizer`] of the same tokens; arguments as in `branches`."""
        order = layout.orders[self.config.scan_order(self.layer_idx)]
        u, *in_order = (tensor.flatten(0, 1).index_select(0, order) for tensor in (hidden_states, *rope))
        return self.flex_ma.smallest_normalizer(u, in_order, layout)

    def forward(
        self, hidden_states: Tensor, rope: Rope, layout: TokenLayout | TextStep,
        cache_layer: MMateCacheLayer | None = None,
    ) -> Tensor:  # fmt: skip
        """
        Returns the block output `[b, t, d]`; arguments as in `branches`, or a [`TextStep`] for the layout. Rows of
        padding hold no meaningful values.
        """
        if isinstance(layout, TextStep):
            assert cache_layer is not None
            token, rope = hidden_states[:, 0], tuple(t[:, 0] for t in rope)
            flex, near = self.flex_ma.step(token, rope, layout.mask, cache_layer, layout.near), None
            if layout.near is not None:
                near = self.local_swin.step(token, rope, cache_layer, layout.near)
                share = self._text_share(token, layout.near.scanned)[..., None].to(flex.dtype)
                flex, near = (flex.unflatten(1, near.shape[1:]) * share).flatten(1), (near * (1 - share)).flatten(1)
        else:
            flex, near = self.branches(hidden_states, rope, layout, cache_layer)
        y = self.flex_ma.o_proj(flex)
        if near is not None:
            y = y + self.local_swin.o_proj(near)
        return self.output_norm(y.to(hidden_states.dtype)).view_as(hidden_states)
