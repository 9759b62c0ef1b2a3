"""Flex-MA: a masked bidirectional Mamba2 over the scan-ordered tokens (Sec. 3.1.1).

code                  paper                     meaning
u                     u_t                       block input in scan order
b_proj, c_proj        W_B, W_C (and tilde)      from the teacher's k and q projections (Eq. 4)
x_proj, o_proj        W_X, W_O,Flex             from the teacher's v and o projections (Eq. 4)
dt, A                 A_t = exp(dt A)           decay of a token (Eq. 1)
gate                  g_t                       forward against reverse (Eq. 3)
"""

import math

import torch
from torch import nn
from torch.nn.functional import softplus
from transformers import initialization as init

from ...ops.backends import kernels_serve
from ...ops.conv.causal_conv import causal_conv
from ...ops.segments import Scan
from ...ops.ssd.scan import ssd, ssd_pair, ssd_step
from .projection import joint_linear, rotate


def softmax_features(x: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """
    Positive features (LoLCATs): softmax of z and of -z, with z = x W per head.

    Args:
        x (`torch.Tensor` of shape `[n, h, p]`): B or C.
        directions (`torch.Tensor` of shape `[h, p, k / 2]`): W.

    Returns:
        `torch.Tensor` of shape `[n, h, k]`.
    """
    # one product and one softmax give both halves where they belong; heads stay in front until the end
    z = x.transpose(0, 1) @ torch.cat([directions, -directions], dim=-1)
    return z.unflatten(-1, (2, -1)).softmax(-1).flatten(-2).transpose(0, 1)


def feature_directions(p: int, k: int) -> torch.Tensor:
    """Where W [p, k] starts: the coordinates themselves, then fixed random rotations of them."""
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.eye(p, dtype=torch.float32, device="cpu")]
    while len(blocks) * p < k:
        blocks.append(torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=torch.float32, device="cpu")).Q)
    return torch.cat(blocks, dim=1)[:, :k]


# What is kept in float32 whatever the model is cast to: rounding a decay rate moves every later state.
FP32_PARAMETERS = ("A_log", "dt_bias", "D")


class ZeroLinear(nn.Linear):
    """A linear map that starts at zero: what it feeds does not depend on the token at first."""

    def forward(self, x):
        # a model in half precision may keep these small weights in float32
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)

    def reset_new_parameters(self):
        init.zeros_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)


class ScanDirection(nn.Module):
    """
    What one direction of the scan has of its own: B, C, the step size, the decay and the convolution (Eq. 1 or 2).

    Args:
        config (`LinMUTextConfig`): Sizes and options.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        h, g, p, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        self.heads, self.groups, self.head_dim = h, g, p
        self.normalized = config.bc_feature_map == "softmax"
        self.c_proj = nn.Linear(d, h * p)
        self.b_proj = nn.Linear(d, g * p)
        # of the scan, per head: the normaliser has a row of its own
        self.state_shape = (h, p + 1, config.state_size) if self.normalized else (h, p, p)
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

    def _apply(self, fn, recurse=True):
        """`.to`, `.half`, `.cuda` and their like move `FP32_PARAMETERS` but never cast them below float32."""
        parameters = [self.get_parameter(name) for name in FP32_PARAMETERS]
        precise = [*parameters, *(parameter.grad for parameter in parameters if parameter.grad is not None)]

        def apply(tensor):
            result = fn(tensor)
            if result.dtype.itemsize < 4 and any(tensor is one for one in precise):
                return tensor.to(result.device, torch.float32)  # not back up from the rounded values
            return result

        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(apply, recurse=False)

    def reset_new_parameters(self):
        """Sets the parameters that no teacher has: a convolution that does nothing, decays, step sizes, no skip."""
        rate, step = self._initial_timescales()
        init.copy_(self.A_log, rate.log())
        init.copy_(self.dt_bias, step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) = step
        init.zeros_(self.D)
        if self.normalized:
            directions = feature_directions(self.head_dim, self.config.state_size // 2)
            init.copy_(self.c_features, directions.expand_as(self.c_features))
            init.copy_(self.b_features, directions.expand_as(self.b_features))
        if self.config.conv_kernel > 1:
            identity = torch.zeros(self.conv_weight.shape)
            identity[-1] = 1.0
            init.copy_(self.conv_weight, identity)

    def forward(self, scan, *args):
        """
        `scan(*args)`, which reads this module's parameters. It goes through the module's call, because that is where
        accelerate brings in what a device_map left on disk, and DeepSpeed what it has sharded.
        """
        return scan(*args)

    def _initial_timescales(self):
        """Decay rates -A and step sizes of the heads."""
        position = torch.linspace(0, 1, self.heads, dtype=self.A_log.dtype)
        if self.config.timescale_init == "mamba2":
            # Mamba2 draws A from 1 to 16 and dt log-uniformly from 0.001 to 0.1; spread evenly instead of drawn
            return 1 + 15 * position, torch.exp(math.log(1e-3) + (math.log(0.1) - math.log(1e-3)) * position.flip(0))
        shortest, longest = self.config.timescale_range
        half_life = shortest * (longest / shortest) ** position
        return torch.ones_like(position), math.log(2) / half_life

    def prepare(self, u, x, bc, rope):
        """Scan arguments x, dt, A, B, C as in `ops/ssd.py`, from the convolved x [n, g p] and B, C [n, (g + h) p]."""
        config = self.config
        x, bc = (t.unflatten(-1, (-1, self.head_dim)) for t in (x, bc))
        if config.scan_rope:
            bc = rotate(bc, rope)
        dtype = torch.promote_types(u.dtype, torch.float32)
        if self.normalized:
            bc = softmax_features(bc, torch.cat([self.b_features, self.c_features]).to(bc.dtype))
        B, C = bc.split([self.groups, self.heads], dim=1)
        if not self.normalized:
            C = C / math.sqrt(self.head_dim)
        dt = softplus(self.dt_proj(u).to(dtype) + self.dt_bias.to(dtype))
        return x, dt, -self.A_log.to(dtype).exp(), B, C

    def skip(self):
        """D, for use outside this module's call."""
        return self.D.clone()


def finish(y, x, skip):
    """Adds the skip [h] times x [n, g, p] to y [n, h, p]."""
    g = x.shape[1]
    return torch.addcmul(y.unflatten(1, (g, -1)), skip.to(y.dtype).view(g, -1, 1), x[:, :, None]).flatten(1, 2)


class FlexMA(nn.Module):
    """The Flex-MA branch: forward scan over all tokens, reverse scan over vision tokens, gate, output projection."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        h, g, p, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        self.heads, self.head_dim, self.x_width = h, p, g * p
        self.x_proj = nn.Linear(d, self.x_width)
        self.forward_scan = ScanDirection(config)
        self.reverse_scan = ScanDirection(config)
        self.gate_proj = ZeroLinear(d, h if config.gate == "head" else h * p)
        self.o_proj = nn.Linear(h * p, d, bias=False)

    def forward(self, u, rope, layout, cache_layer=None):
        """
        Args:
            u (`torch.Tensor` of shape `[n, d]`): Packed tokens in this layer's scan order.
            rope (`tuple[torch.Tensor, torch.Tensor]`): cos and sin of the same tokens, each `[n, p]`.
            layout (`TokenLayout`): The packed sequences.
            cache_layer (`MMateCacheLayer`, *optional*): State before these tokens; updated.

        Returns:
            `torch.Tensor` of shape `[n, h * p]`: the branch before its output projection, in scan order.
        """
        scan, skip, x, tail = self.forward_scan(self._forward_arguments, u, rope, layout, cache_layer)
        normalized = self.forward_scan.normalized
        if layout.reverse is None:
            y, states = ssd(**scan._asdict(), normalized=normalized)
        else:
            reverse, reverse_skip = self.reverse_scan(self._reverse_arguments, u, x, rope, layout)
            (y, states), (y_reverse, _) = ssd_pair(
                scan, reverse, normalized=normalized, final_states=cache_layer is not None
            )
        if cache_layer is not None:
            cache_layer.store(tail, states, layout.batch, layout.rows)
        y = finish(y, scan.x, skip).to(u.dtype)
        if layout.reverse is not None:
            y_reverse = finish(y_reverse, reverse.x, reverse_skip).to(u.dtype).index_select(0, layout.reverse_slots)
            # Eq. 3; text rows have the forward direction alone
            vision = layout.scan_vision
            gate = torch.sigmoid(self._gate(u, vision)).to(u.dtype).unflatten(-1, (self.heads, -1))
            y.index_copy_(0, vision, torch.lerp(y_reverse, y.index_select(0, vision), gate))
        return y.flatten(1)

    def _gate(self, u, vision):
        """g before its sigmoid at the vision tokens; where it is narrow, picking those afterwards copies less."""
        if self.config.gate == "head":
            return self.gate_proj(u).index_select(0, vision)
        return self.gate_proj(u.index_select(0, vision))

    def step(self, u, rope, mask, cache_layer):
        """
        One text token for every row of a batch: no reverse direction, no shape that depends on the values.

        Args:
            u (`torch.Tensor` of shape `[b, d]`): The tokens.
            rope (`tuple[torch.Tensor, torch.Tensor]`): Their cos and sin, each `[b, p]`.
            mask (`torch.Tensor` of shape `[b]` or `None`): 0 at rows whose state stays as it is.
            cache_layer (`MMateCacheLayer`): State before these tokens; updated.

        Returns:
            `torch.Tensor` of shape `[b, h * p]`: the branch before its output projection.
        """
        return self.forward_scan(self._step, u, rope, mask, cache_layer)

    def _step(self, u, rope, mask, cache_layer):
        scan, b = self.forward_scan, len(u)
        tail, states = cache_layer.load()
        if states is None:
            states = u.new_zeros(b, *scan.state_shape, dtype=torch.promote_types(u.dtype, torch.float32))
        if self.config.conv_kernel > 1 and not torch.is_grad_enabled() and kernels_serve(u):
            return self._step_in_one_kernel(u, rope, mask, cache_layer, tail, states)
        xbc = torch.cat([self.x_proj(u), scan.b_proj(u), scan.c_proj(u)], dim=-1)
        real = None if mask is None else mask.bool()[:, None, None]
        if self.config.conv_kernel > 1:
            before = xbc.new_zeros(b, self.config.conv_kernel - 1, xbc.shape[-1]) if tail is None else tail
            window = torch.cat([before.to(xbc.dtype), xbc[:, None]], dim=1)
            xbc, tail = (window * scan.conv_weight.to(xbc.dtype)).sum(1), window[:, 1:]
            tail = tail if real is None else torch.where(real, tail, before)
        args = scan.prepare(u, *self._split(xbc), rope)
        y, new_states = ssd_step(*args, states, normalized=scan.normalized)
        if real is not None:
            new_states = torch.where(real[..., None], new_states, states)
        cache_layer.store(tail, new_states, b)
        return finish(y, args[0], scan.D).to(u.dtype).flatten(1)

    def _step_in_one_kernel(self, u, rope, mask, cache_layer, tail, states):
        from ...ops.decode_triton import decode_triton

        scan = self.forward_scan
        tokens = self.x_proj(u), scan.b_proj(u), scan.c_proj(u)
        if tail is None:
            taps, channels = scan.conv_weight.shape
            tail = tokens[0].new_zeros(len(u), taps - 1, channels)
        directions = (scan.b_features, scan.c_features) if scan.normalized else (None, None)
        y, tail = decode_triton(
            *tokens, tail, scan.conv_weight, *(rope if self.config.scan_rope else (None, None)), *directions,
            scan.dt_proj(u), scan.dt_bias, scan.A_log, scan.D, mask, states,
            1.0 if scan.normalized else 1 / math.sqrt(self.head_dim),
        )  # fmt: skip
        cache_layer.store(tail, states, len(u))
        return y.to(u.dtype).flatten(1)

    def _split(self, xbc):
        """x and what lies behind it."""
        return xbc.tensor_split([self.x_width], dim=-1)

    def _forward_arguments(self, u, rope, layout, cache_layer):
        """Scan arguments and skip of the forward direction, x before its convolution, and the convolution's tail."""
        scan, segments = self.forward_scan, layout.segments
        tail, states = (None, None) if cache_layer is None else cache_layer.load(layout.rows)
        projected = xbc = joint_linear(u, self.x_proj, scan.b_proj, scan.c_proj)
        if self.config.conv_kernel > 1:
            xbc, tail = causal_conv(projected, scan.conv_weight, segments, tail)
        arguments = Scan(*scan.prepare(u, *self._split(xbc), rope), segments, states)
        return arguments, scan.skip(), self._split(projected)[0], tail

    def _reverse_arguments(self, u, x, rope, layout):
        """Scan arguments and skip of Eq. 2, in reversed token order: the mask M_V leaves vision tokens only."""
        scan, reverse, segments = self.reverse_scan, layout.reverse, layout.reverse_segments
        u, x = u.index_select(0, reverse), x.index_select(0, reverse)
        bc = joint_linear(u, scan.b_proj, scan.c_proj)
        mask = None
        if self.config.reverse_scope == "sequence":
            mask = torch.zeros(len(reverse), 1, dtype=x.dtype, device=x.device).index_fill(0, layout.reverse_slots, 1)
            x, bc = x * mask, bc * mask  # before the convolution, which would carry text over to its neighbours
        if self.config.conv_kernel > 1:
            # x comes from elsewhere than B and C: two convolutions spare a copy of all three
            x, bc = (causal_conv(t, weight, segments)[0] for t, weight in zip((x, bc), self._split(scan.conv_weight)))
        x, dt, A, B, C = scan.prepare(u, x, bc, tuple(t.index_select(0, reverse) for t in rope))
        if mask is not None:
            x, B = x * mask[..., None], B * mask[..., None]  # without B, text does not reach the normaliser either
        return Scan(x, dt, A, B, C, segments), scan.skip()
