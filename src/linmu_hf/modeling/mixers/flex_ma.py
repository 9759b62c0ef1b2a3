"""Flex-MA: a masked bidirectional Mamba2 over the scan-ordered tokens (Sec. 3.1.1).

code                  paper                     meaning
u                     u_t                       block input in scan order
b_proj, c_proj        W_B, W_C (and tilde)      from the teacher's k and q projections (Eq. 4)
x_proj, o_proj        W_X, W_O,Flex             from the teacher's v and o projections (Eq. 4)
dt, A                 A_t = exp(dt A)           decay of a token (Eq. 1)
gate                  g_t                       forward against reverse (Eq. 3)
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import initialization as init

from ...ops.conv.causal_conv import causal_conv
from ...ops.segments import Scan, Segments
from ...ops.ssd.scan import ssd, ssd_pair, ssd_step, use_triton_kernels
from ..cache import MMateCacheLayer
from ..configuration_linmu import LinMUTextConfig
from ..layout.near import NearStep
from ..layout.token_layout import TokenLayout
from .projection import Rope, joint_linear, rotate


def softmax_features(x: Tensor, weight: Tensor) -> Tensor:
    """
    Returns positive features (LoLCATs): softmax of z and of -z, with z = x W per head.

    Args:
        x (`torch.Tensor` of shape `[n, h, p]`): B or C.
        weight (`torch.Tensor` of shape `[h, p, k / 2]`): W.

    Returns:
        `torch.Tensor` of shape `[n, h, k]`.
    """
    # one product and one softmax write both halves in place; heads stay in front until the end
    z = x.transpose(0, 1) @ torch.cat([weight, -weight], dim=-1)
    return z.unflatten(-1, (2, -1)).softmax(-1).flatten(-2).transpose(0, 1)


def initial_feature_weight(p: int, k: int) -> Tensor:
    """Returns the start of W [p, k]: the coordinates themselves, then fixed random rotations of them."""
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.eye(p, dtype=torch.float32, device="cpu")]
    while len(blocks) * p < k:
        blocks.append(torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=torch.float32, device="cpu")).Q)
    return torch.cat(blocks, dim=1)[:, :k]


# Bias of a channel of B or C above which it is scaled down: its softmax would have one weight near 1, the others and
# all gradients near 0. Teachers hold biases of 30 to 400 in single channels beside ordinary ones below 3.
LARGEST_BIAS = 3.0


def feature_scale(bias: Tensor, rotated: bool) -> Tensor:
    """
    Returns the temperature of each channel: 1 up to `LARGEST_BIAS`, so that ordinary channels stay as they are.

    Args:
        bias (`torch.Tensor` of shape `[..., p]`): Of the projection to B or C, by head.
        rotated (`bool`): Whether a rotary embedding turns channel i and i + p / 2 into each other.
    """
    size = torch.hypot(bias, bias.roll(bias.shape[-1] // 2, -1)) if rotated else bias.abs()
    return LARGEST_BIAS / size.clamp_min(LARGEST_BIAS)


# Parameters that stay in float32 whatever the model is cast to: rounding a decay rate moves every later state.
FP32_PARAMETERS = ("A_log", "dt_bias", "D")


class ZeroLinear(nn.Linear):
    """
    A linear map to zero at the start, or to `start`, so that a gate or step size does not depend on the token at
    first.
    """

    def __init__(self, *args: Any, start: float = 0.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.start = start

    def forward(self, x: Tensor) -> Tensor:
        # a model in half precision may keep these small weights in float32
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)

    def reset_new_parameters(self) -> None:
        init.zeros_(self.weight)
        if self.bias is not None:
            init.constant_(self.bias, self.start)


def state_shape(config: LinMUTextConfig) -> tuple[int, int, int]:
    """Returns the shape of the scan's state per sequence; the normaliser has a row of its own."""
    h, p = config.num_attention_heads, config.head_dim
    assert p is not None
    return (h, p + 1, config.state_size) if config.bc_feature_map == "softmax" else (h, p, p)


class ScanDirection(nn.Module):
    """
    The parameters of one direction of the scan: B, C, step size, decay and convolution (Eq. 1 or 2).

    Args:
        config (`LinMUTextConfig`): Sizes and options.
    """

    def __init__(self, config: LinMUTextConfig):
        super().__init__()
        self.config = config
        h, g, p, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        assert p is not None
        self.heads, self.groups, self.head_dim = h, g, p
        self.normalized = config.bc_feature_map == "softmax"
        self.c_proj = nn.Linear(d, h * p)
        self.b_proj = nn.Linear(d, g * p)
        self.state_shape = state_shape(config)
        if self.normalized:
            self.c_features = nn.Parameter(torch.empty(h, p, config.state_size // 2))
            self.b_features = nn.Parameter(torch.empty(g, p, config.state_size // 2))
        self.dt_proj = ZeroLinear(d, h, bias=False)
        precise = torch.promote_types(torch.get_default_dtype(), torch.float32)
        for name in FP32_PARAMETERS:
            self.register_parameter(name, nn.Parameter(torch.empty(h, dtype=precise)))
        if config.conv_kernel > 1:
            # taps over x, B and C together, oldest token first, as in Mamba2
            self.conv_weight = nn.Parameter(torch.empty(config.conv_kernel, (h + 2 * g) * p))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """`.to`, `.half`, `.cuda` and their like move `FP32_PARAMETERS` but never cast them below float32."""
        parameters = [self.get_parameter(name) for name in FP32_PARAMETERS]
        precise = [*parameters, *(parameter.grad for parameter in parameters if parameter.grad is not None)]

        def apply(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype.itemsize < 4 and any(tensor is one for one in precise):
                return tensor.to(result.device, torch.float32)  # not back up from the rounded values
            return result

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(apply, recurse=False)

    def reset_new_parameters(self) -> None:
        """Sets the parameters that no teacher has: a convolution that does nothing, decays, step sizes, no skip."""
        rate, step = self._initial_timescales()
        init.copy_(self.A_log, rate.log())
        init.copy_(self.dt_bias, step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) = step
        init.zeros_(self.D)
        if self.normalized:
            weight = initial_feature_weight(self.head_dim, self.config.state_size // 2)
            for features, proj in ((self.c_features, self.c_proj), (self.b_features, self.b_proj)):
                scale = torch.ones(features.shape[:2])
                if not proj.bias.is_meta:  # known at conversion, or loaded with the other weights
                    bias = proj.bias.detach().float().cpu().view(-1, self.head_dim)
                    scale = feature_scale(bias, self.config.scan_rope)
                init.copy_(features, scale[..., None] * weight)
        if self.config.conv_kernel > 1:
            identity = torch.zeros(self.conv_weight.shape)
            identity[-1] = 1.0
            init.copy_(self.conv_weight, identity)

    def forward(
        self, u: Tensor, x: Tensor, rope: Rope, segments: Segments | None, *, bc: Tensor | None = None,
        tail: Tensor | None = None, states: Tensor | None = None, keep: Tensor | None = None,
        exchange: Callable[..., list[Tensor]] | None = None,
    ) -> tuple[Scan, Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        """
        Returns the arguments of the scan (Eq. 1 or 2), its skip D and the tail of its convolution.

        All that reads this module's parameters runs inside `__call__`, so that accelerate and DeepSpeed hooks load
        them first.

        Args:
            u (`torch.Tensor` of shape `[n, d]`): Packed tokens in the order of the scan.
            x (`torch.Tensor` of shape `[n, g p]`): Their projection by W_X.
            rope (`tuple[torch.Tensor, torch.Tensor]`): Their cos and sin, each `[n, p]`.
            segments (`Segments` or `None`): The packed sequences; `None` is a decode step of one token per row, which
                returns y `[n, h, p]`, tail and states.
            bc (`torch.Tensor` of shape `[n, (g + h) p]`, *optional*): B and C where they were projected beside x.
            tail (`torch.Tensor` of shape `[m, w - 1, c]`, *optional*): x, B and C before each sequence.
            states (`torch.Tensor`, *optional*): States before each sequence, `[m, *state_shape]`.
            keep (`torch.Tensor` of shape `[n, 1]`, *optional*): 0 at tokens that bring no input (M_V of Eq. 2), and in
                a decode step at rows whose state stays as it is.
            exchange (`Callable`, *optional*): In a decode step takes x, B and dt of the token, and returns those of
                the one to scan, with 0 where there is none.

        Returns:
            `tuple[Scan, torch.Tensor, torch.Tensor | None]`
        """
        if segments is None:
            return self._step(u, x, rope, tail, states, keep, exchange)
        if bc is None:
            bc = joint_linear(u, self.b_proj, self.c_proj)
        if keep is not None:
            x, bc = x * keep, bc * keep  # before the convolution, which would carry text over to its neighbours
        if self.config.conv_kernel > 1:
            widths = [x.shape[-1], bc.shape[-1]]
            tails = (None, None) if tail is None else tail.split(widths, dim=-1)
            (x, x_tail), (bc, bc_tail) = (
                causal_conv(tokens, taps, segments, before)
                for tokens, taps, before in zip((x, bc), self.conv_weight.split(widths, dim=-1), tails)
            )
            tail = torch.cat([x_tail, bc_tail], dim=-1)
        x, dt, A, B, C = self.scan_inputs(u, x, bc, rope)
        if keep is not None:
            x, B = x * keep[..., None], B * keep[..., None]  # without B, text does not reach the normaliser either
        return Scan(x, dt, A, B, C, segments, states), self.D.clone(), tail

    def _step(
        self, u: Tensor, x: Tensor, rope: Rope, tail: Tensor | None, states: Tensor | None, keep: Tensor | None,
        exchange: Callable[..., list[Tensor]] | None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
        """One token per row, without a shape that depends on the values: y, tail and states."""
        b, taps = len(u), self.config.conv_kernel
        tokens = x, self.b_proj(u), self.c_proj(u)
        if states is None:
            states = u.new_zeros(b, *self.state_shape, dtype=torch.promote_types(u.dtype, torch.float32))
        if tail is None and taps > 1:
            tail = x.new_zeros(b, taps - 1, self.conv_weight.shape[1])
        if taps > 1 and exchange is None and not torch.is_grad_enabled() and use_triton_kernels(u):
            from ...ops.decode_triton import decode_triton

            y, tail = decode_triton(
                *tokens, tail, self.conv_weight, *(rope if self.config.scan_rope else (None, None)),
                *((self.b_features, self.c_features) if self.normalized else (None, None)),
                self.dt_proj(u), self.dt_bias, self.A_log, self.D, keep, states,
                1.0 if self.normalized else 1 / math.sqrt(self.head_dim),
            )  # fmt: skip
            return y, tail, states
        xbc = torch.cat(tokens, dim=-1)
        real = None if keep is None else keep.bool()[:, None, None]
        if taps > 1:
            window = torch.cat([tail.to(xbc.dtype), xbc[:, None]], dim=1)
            xbc, before, tail = (window * self.conv_weight.to(xbc.dtype)).sum(1), tail, window[:, 1:]
            tail = tail if real is None else torch.where(real, tail, before)
        own, bc = xbc.tensor_split([x.shape[-1]], dim=-1)
        own, dt, A, B, C = self.scan_inputs(u, own, bc, rope)
        scanned, B, dt = (own, B, dt) if exchange is None else exchange(x=own, B=B, dt=dt)
        y, new_states = ssd_step(scanned, dt, A, B, C, states, normalized=self.normalized)
        if real is not None:
            new_states = torch.where(real[..., None], new_states, states)
        return add_skip(y, own, self.D), tail, new_states

    def _initial_timescales(self) -> tuple[Tensor, Tensor]:
        """Decay rates -A and step sizes of the heads."""
        position = torch.linspace(0, 1, self.heads, dtype=self.A_log.dtype)
        if self.config.timescale_init == "mamba2":
            # Mamba2 draws A from 1 to 16 and dt log-uniformly from 0.001 to 0.1; spread evenly instead of drawn
            return 1 + 15 * position, torch.exp(math.log(1e-3) + (math.log(0.1) - math.log(1e-3)) * position.flip(0))
        shortest, longest = self.config.timescale_range
        half_life = shortest * (longest / shortest) ** position
        return torch.ones_like(position), math.log(2) / half_life

    def scan_inputs(
        self, u: Tensor, x: Tensor, bc: Tensor, rope: Rope
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns x, dt, A, B, C as [`ssd`] takes them, from convolved x [n, g p] and B, C [n, (g + h) p]."""
        x, bc = (t.unflatten(-1, (-1, self.head_dim)) for t in (x, bc))
        if self.config.scan_rope:
            bc = rotate(bc, rope)
        dtype = torch.promote_types(u.dtype, torch.float32)
        if self.normalized:
            bc = softmax_features(bc, torch.cat([self.b_features, self.c_features]).to(bc.dtype))
        B, C = bc.split([self.groups, self.heads], dim=1)
        if not self.normalized:
            C = C / math.sqrt(self.head_dim)
        dt = softplus(self.dt_proj(u).to(dtype) + self.dt_bias.to(dtype))
        return x, dt, -self.A_log.to(dtype).exp(), B, C


def add_skip(y: Tensor, x: Tensor, skip: Tensor) -> Tensor:
    """Adds the skip [h] times x [n, g, p] to y [n, h, p]."""
    g = x.shape[1]
    return torch.addcmul(y.unflatten(1, (g, -1)), skip.to(y.dtype).view(g, -1, 1), x[:, :, None]).flatten(1, 2)


class FlexMA(nn.Module):
    """Forward scan over all tokens, reverse scan over vision tokens, and the gate between them."""

    def __init__(self, config: LinMUTextConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        h, g, p, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        self.heads, self.x_width = h, g * p
        self.x_proj = nn.Linear(d, self.x_width)
        self.forward_scan = ScanDirection(config)
        self.reverse_scan = ScanDirection(config)
        self.gate_proj = ZeroLinear(d, h if config.gate == "head" else h * p)
        self.o_proj = nn.Linear(h * p, d, bias=False)

    def forward(
        self, u: Tensor, rope: Rope, layout: TokenLayout, cache_layer: MMateCacheLayer | None = None
    ) -> Tensor:
        """
        Returns the branch before its output projection `[n, h * p]`, in scan order.

        Args:
            u (`torch.Tensor` of shape `[n, d]`): Packed tokens in this layer's scan order.
            rope (`tuple[torch.Tensor, torch.Tensor]`): cos and sin of the same tokens, each `[n, p]`.
            layout (`TokenLayout`): The packed sequences.
            cache_layer (`MMateCacheLayer`, *optional*): State before these tokens; updated.
        """
        tail, states = (None, None) if cache_layer is None else cache_layer.load(layout.rows)
        x, scan, skip, tail = self._forward_scan(u, rope, layout, tail, states)
        own, normalized = scan.x, self.forward_scan.normalized
        if layout.near is not None:
            scan = self._delayed(scan, layout, cache_layer)
        if layout.reverse is None:
            y, states = ssd(**scan._asdict(), normalized=normalized)  # Eq. 1
        else:
            reverse, reverse_skip, _ = self._reverse_scan(u, x, rope, layout)
            (y, states), (y_reverse, _) = ssd_pair(  # Eq. 1 and 2
                scan, reverse, normalized=normalized, final_states=cache_layer is not None
            )
        if cache_layer is not None:
            cache_layer.store(tail, states, layout.batch, layout.rows)
        y = add_skip(y, own, skip).to(u.dtype)
        if layout.reverse is not None:
            y_reverse = add_skip(y_reverse, reverse.x, reverse_skip).to(u.dtype).index_select(0, layout.reverse_slots)
            # Eq. 3; text rows have the forward direction alone
            vision = layout.scan_vision
            gate = torch.sigmoid(self._gate(u, vision)).to(u.dtype).unflatten(-1, (self.heads, -1))
            y.index_copy_(0, vision, torch.lerp(y_reverse, y.index_select(0, vision), gate))
        return y.flatten(1)

    def _delayed(self, scan: Scan, layout: TokenLayout, cache_layer: MMateCacheLayer | None) -> Scan:
        """The scan that reads a text token when it has left the window of exact attention."""
        near, new = layout.near, {"x": scan.x, "B": scan.B, "dt": scan.dt}
        before = [None] * len(new)
        if cache_layer is not None:
            before = cache_layer.load_slots(new, near.cached)
            stay = near.waiting.index_select(0, near.stay)
            kept = {name: tokens.index_select(0, stay) for name, tokens in new.items()}
            cache_layer.store_slots(
                near.slots, self.config.sink_tokens + self.config.text_window, layout.batch, **kept
            )
        for (name, tokens), old in zip(new.items(), before):
            tokens = tokens if old is None else torch.cat([old.to(tokens.dtype), tokens])
            live = near.live.view(-1, *[1] * (tokens.ndim - 1))
            new[name] = tokens.index_select(0, near.source) * live
        return scan._replace(**new)

    def _forward_scan(
        self, u: Tensor, rope: Rope, layout: TokenLayout, tail: Tensor | None = None, states: Tensor | None = None
    ) -> tuple[Tensor, Scan, Tensor, Tensor | None]:
        """x before its convolution, and scan, skip and tail of all tokens."""
        direction = self.forward_scan
        projected = joint_linear(u, self.x_proj, direction.b_proj, direction.c_proj)
        x, bc = projected.tensor_split([self.x_width], dim=-1)
        return x, *direction(u, x, rope, layout.segments, bc=bc, tail=tail, states=states)

    def _reverse_scan(
        self, u: Tensor, x: Tensor, rope: Rope, layout: TokenLayout
    ) -> tuple[Scan, Tensor, Tensor | None]:
        """Scan, skip and tail in reversed token order: the mask M_V leaves vision tokens only."""
        keep = None
        assert layout.reverse is not None
        if self.config.reverse_scope == "sequence":
            keep = x.new_zeros(len(layout.reverse), 1).index_fill(0, layout.reverse_slots, 1)
        u, x, *rope = (tokens.index_select(0, layout.reverse) for tokens in (u, x, *rope))
        return self.reverse_scan(u, x, rope, layout.reverse_segments, keep=keep)

    def _gate(self, u: Tensor, vision: Tensor) -> Tensor:
        """g before its sigmoid at the vision tokens; selecting them after a narrow projection copies less."""
        if self.config.gate == "head":
            return self.gate_proj(u).index_select(0, vision)
        return self.gate_proj(u.index_select(0, vision))

    def step(
        self, u: Tensor, rope: Rope, mask: Tensor | None, cache_layer: MMateCacheLayer, near: NearStep | None = None
    ) -> Tensor:
        """
        Returns the branch before its output projection `[b, h * p]` for one text token of every row of a batch.

        Args:
            u (`torch.Tensor` of shape `[b, d]`): The tokens.
            rope (`tuple[torch.Tensor, torch.Tensor]`): Their cos and sin, each `[b, p]`.
            mask (`torch.Tensor` of shape `[b]` or `None`): 0 at rows whose state stays as it is.
            cache_layer (`MMateCacheLayer`): State before these tokens; updated.
            near (`NearStep`, *optional*): With `text_window`, where the token goes and what leaves for it.
        """
        tail, states = cache_layer.load()
        exchange = None if near is None else functools.partial(near.exchange, cache_layer)
        y, tail, states = self.forward_scan(
            u, self.x_proj(u), rope, None, tail=tail, states=states, keep=mask, exchange=exchange
        )
        cache_layer.store(tail, states, len(u))
        return y.to(u.dtype).flatten(1)

    def smallest_normalizer(self, u: Tensor, rope: Rope, layout: TokenLayout) -> float:
        """
        Returns the smallest sum of weights that the forward scan divides by; arguments as in `forward`.

        Near 0, features of B and C hardly overlap, and outputs are noise: a bias or an outlier saturates the softmax.
        """
        if not self.forward_scan.normalized:
            return 1.0
        scan = self._forward_scan(u, rope, layout)[1]
        ones = torch.ones_like(scan.x[..., :1])
        return float(ssd(**scan._replace(x=ones)._asdict())[0].min())
