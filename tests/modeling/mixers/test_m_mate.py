"""The block against Algorithm 1 and Eq. 1-5, written down token by token and head by head."""

from functools import partial

import pytest
import tiny
import torch
from torch.nn.functional import conv1d, layer_norm, softplus
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention, rotate_half

from linmu_hf.modeling.layout.token_layout import TokenLayout
from linmu_hf.modeling.mixers import projection
from linmu_hf.ops.backends import use_kernels
from linmu_hf.ops.conv.causal_conv import causal_conv
from linmu_hf.ops.segments import Segments


PARTS = (3, ("image", 3, 5), 6, ("video", 3, 3, 2), 4)
OPTIONS = {
    "default": {},
    "paper": {
        "scan_rope": False, "bc_feature_map": None, "output_norm": "layer_norm",
        "timescale_init": "mamba2", "text_window": 0, "sink_tokens": 0,
    },
    "wrap, channel gate, normed": {"window_wrap": True, "gate": "channel", "output_norm": "layer_norm"},
    "reverse over the sequence": {"reverse_scope": "sequence"},
    "no convolution": {"conv_kernel": 1, "bc_feature_map": None},
    "a wide window": {"text_window": 50},
    "no sinks": {"text_window": 2, "sink_tokens": 0},
    "text left to the scan": {"text_window": 0, "sink_tokens": 0},
}  # fmt: skip


def setup(layer_idx, **options):
    """A mixer, a random input [1, t, d], its rotary tables and its layout tensor [1, t, 4]."""
    model = tiny.model(**options).model
    inputs = tiny.batch(tiny.Sample(*PARTS))
    positions, layout = model.get_positions(**{k: v for k, v in inputs.items() if "pixel" not in k})
    u = torch.randn(1, layout.shape[1], 32, dtype=torch.float64)
    rope = model.language_model.rotary_emb(u, positions)
    tokens = TokenLayout.build(model.config.text_config, 1, layout.shape[1], "cpu", None, layout)
    return model.language_model.layers[layer_idx].mixer, u, rope, tokens, layout[0]


def scan(direction, config, x_proj, tokens, cos, sin, keep, source=None):
    """
    Eq. 1 over a list of tokens [t, d], in their order: y [t, h, p]. Every head has its own loop. Only the tokens to
    `keep` (M_V of Eq. 2) bring an input of their own. `source` says which token is read at each place, if any is.
    """
    source = range(len(tokens)) if source is None else source
    t, p = len(tokens), config.head_dim
    h, g = config.num_attention_heads, config.num_key_value_heads
    features = [proj(tokens) * keep[:, None] for proj in (x_proj, direction.b_proj, direction.c_proj)]
    if config.conv_kernel > 1:
        taps = direction.conv_weight.split([f.shape[1] for f in features], 1)
        width = config.conv_kernel
        features = [
            torch.stack([sum(w[width - 1 - k] * f[i - k] for k in range(width) if i >= k) for i in range(t)])
            for f, w in zip(features, taps)
        ]
    x, B, C = (f.view(t, -1, p) for f in features)
    if config.scan_rope:
        B, C = (m * cos[:, None] + rotate_half(m) * sin[:, None] for m in (B, C))
    if config.bc_feature_map == "softmax":
        maps = direction.b_features, direction.c_features
        B, C = (torch.einsum("tgp,gpk->tgk", m, w) for m, w in zip((B, C), maps))
        B, C = (torch.cat([m.softmax(-1), (-m).softmax(-1)], -1) for m in (B, C))
    else:
        C = C / p**0.5
    dt = softplus(direction.dt_proj(tokens) + direction.dt_bias)
    y = torch.zeros(t, h, p, dtype=tokens.dtype)
    for head in range(h):
        group = head // (h // g)
        numerator, denominator = 0, 0
        for i, j in enumerate(source):
            if j is not None:
                decay = torch.exp(-dt[j, head] * direction.A_log[head].exp())
                write = dt[j, head] * B[j, group] * keep[j]
                numerator = decay * numerator + torch.outer(x[j, group], write)
                denominator = decay * denominator + write
            if torch.is_tensor(numerator):
                y[i, head] = numerator @ C[i, head]
                if config.bc_feature_map == "softmax":
                    y[i, head] /= denominator @ C[i, head]
            y[i, head] += direction.D[head] * x[i, group]
    return y


def same_window(a, b, extent, window, shift, wrap):
    for i, j, size, width in zip(a, b, extent, window):
        width = min(width, size)
        offset = width // 2 if shift and width < size else 0
        i, j = ((i - offset) % size, (j - offset) % size) if wrap else (i - offset, j - offset)
        if i // width != j // width:
            return False
    return True


def window_mask(layout, config, layer_idx):
    """[t, t]: whether two tokens are vision tokens of one span and one window."""
    t = len(layout)
    mask = torch.zeros(t, t, dtype=torch.bool)
    for i in range(t):
        for j in range(t):
            if layout[i, 0] == layout[j, 0] >= 0:
                extent = (layout[layout[:, 0] == layout[i, 0], 1:].amax(0) + 1).tolist()
                window = config.window_size if extent[0] > 1 else config.image_window_size
                where = layout[i, 1:].tolist(), layout[j, 1:].tolist()
                mask[i, j] = same_window(*where, extent, window, layer_idx % 2 == 1, config.window_wrap)
    return mask


def near_mask(layout, config, layer_idx):
    """[t, t]: the window of vision tokens, the last text tokens and the first, of those before a token or its span."""
    mask = window_mask(layout, config, layer_idx)
    text = (layout[:, 0] < 0).nonzero()[:, 0].tolist()
    for i in range(len(layout)):
        end = i + 1 if layout[i, 0] < 0 else (layout[:, 0] == layout[i, 0]).nonzero()[0, 0]
        before = [j for j in text if j < end]
        mask[i, before[: config.sink_tokens] + before[max(len(before) - config.text_window, 0) :]] = True
    return mask


def scanned_text(layout, config):
    """The token that the forward scan reads at each place: text when it leaves the window, and no sinks."""
    text = (layout[:, 0] < 0).nonzero()[:, 0].tolist()
    source = list(range(len(layout)))
    for rank, place in enumerate(text):
        left = rank - config.text_window
        source[place] = text[left] if left >= config.sink_tokens else None
    return source


def attention(swin, z, rope, mask):
    """Softmax attention over the tokens that the mask allows, as the teacher computes it, before W_O [t, h, p]."""
    t, p = len(z), swin.head_dim
    q, k, v = (proj(z).view(t, -1, p) for proj in (swin.q_proj, swin.k_proj, swin.v_proj))
    q, k = (m * rope[0][0, :, None] + rotate_half(m) * rope[1][0, :, None] for m in (q, k))
    k, v = (m.repeat_interleave(q.shape[1] // k.shape[1], 1) for m in (k, v))
    scores = torch.einsum("ihp,jhp->hij", q, k) / p**0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("hij,jhp->ihp", weights, v)


def algorithm_1(mixer, u, rope, layout):
    """The whole block for one sequence, [t, d]."""
    config, flex = mixer.config, mixer.flex_ma
    order = [{"t": 1, "h": 2, "w": 3}[axis] for axis in config.scan_order(mixer.layer_idx)]
    vision = layout[:, 0] >= 0
    permuted = torch.arange(len(u))
    for span in range(int(layout[:, 0].max()) + 1):
        places = (layout[:, 0] == span).nonzero()[:, 0].tolist()
        permuted[places] = torch.tensor(sorted(places, key=lambda i: layout[i, order].tolist()))
    cos, sin = (table[0] for table in rope)
    y = torch.zeros(len(u), config.num_attention_heads, config.head_dim, dtype=u.dtype)
    run = partial(scan, config=config, x_proj=flex.x_proj)
    everything = torch.ones(len(u))
    source = scanned_text(layout, config) if config.text_window else None  # text stays where it is in any order
    y[permuted] = run(
        flex.forward_scan, tokens=u[permuted], cos=cos[permuted], sin=sin[permuted], keep=everything, source=source
    )
    backwards = [permuted[layout[:, 0] == span].flip(0) for span in range(int(layout[:, 0].max()) + 1)]
    if config.reverse_scope == "sequence":
        backwards = [permuted.flip(0)]
    gated = y.clone()
    for back in backwards:
        keep = vision[back]
        reverse = run(flex.reverse_scan, tokens=u[back], cos=cos[back], sin=sin[back], keep=keep)
        gate = flex.gate_proj(u[back]).sigmoid().view(len(back), config.num_attention_heads, -1)
        gated[back[keep]] = (gate * y[back] + (1 - gate) * reverse)[keep]
    mask = (near_mask if config.text_window else window_mask)(layout, config, mixer.layer_idx)
    near = attention(mixer.local_swin, u, rope, mask)
    share = torch.ones(len(u), 1)  # lambda_t, which is 1 on text
    if config.text_window:  # or of every head, and 0 before anything is scanned
        scanned = torch.tensor([any(j is not None for j in source[: i + 1]) for i in range(len(u))])
        share = torch.where(scanned[:, None], mixer.text_fusion_proj(u).sigmoid(), 0.0)
    share = torch.where(vision[:, None], mixer.fusion_proj(u).sigmoid(), share)
    share = share[..., None]
    out = flex.o_proj((share * gated).flatten(1)) + mixer.local_swin.o_proj(((1 - share) * near).flatten(1))
    norm = mixer.output_norm
    return layer_norm(out, out.shape[-1:], norm.weight, norm.bias, norm.eps) if config.output_norm else out


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("layer_idx", range(4))
def test_block_is_algorithm_1(layer_idx, options, monkeypatch):
    monkeypatch.setattr(projection, "JOINT_FROM", 1)  # other tests have too few tokens for joint products
    mixer, u, rope, tokens, layout = setup(layer_idx, **options)
    torch.testing.assert_close(mixer(u, rope, tokens)[0], algorithm_1(mixer, u[0], rope, layout), atol=1e-9, rtol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("windows", ["small", "whole"])
@pytest.mark.parametrize("layer_idx", [0, 1], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("near", [False, True], ids=["vision alone", "text too"])
def test_local_swin_with_the_teachers_weights_is_its_attention_in_windows(layer_idx, windows, near):
    sizes = {} if windows == "small" else {"window_size": [9, 9, 9], "image_window_size": [1, 9, 9]}
    sizes |= {} if near else {"text_window": 0, "sink_tokens": 0}
    mixer, u, rope, tokens, layout = setup(layer_idx, **sizes)
    config = mixer.config
    config._attn_implementation = "eager"
    teacher = tiny.randomise(Qwen2_5_VLAttention(config, 0), seed=5).double().eval()
    mixer.local_swin.load_state_dict(teacher.state_dict())
    allowed = (near_mask if near else window_mask)(layout, config, layer_idx)
    if windows == "whole" and not near:
        assert torch.equal(allowed, (layout[:, None, 0] == layout[None, :, 0]) & (layout[:, 0] >= 0))
    mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    expected, _ = teacher(u, attention_mask=mask[None, None], position_embeddings=rope)
    y = mixer.local_swin(u[0], [table[0] for table in rope], tokens)
    rows = slice(None) if near else layout[:, 0] >= 0
    # Transformers' eager attention takes its softmax in float32
    torch.testing.assert_close(mixer.local_swin.o_proj(y.flatten(1)), expected[0, rows], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_without_a_text_window_text_rows_are_the_forward_scan_alone():
    mixer, u, rope, tokens, layout = setup(1, text_window=0, sink_tokens=0)
    text = layout[:, 0] < 0
    before = mixer(u, rope, tokens)[0, text]
    for module in (mixer.flex_ma.reverse_scan, mixer.flex_ma.gate_proj, mixer.local_swin, mixer.fusion_proj):
        tiny.randomise(module, seed=9)
    torch.testing.assert_close(mixer(u, rope, tokens)[0, text], before, rtol=0, atol=0)


@pytest.mark.parametrize("options", [OPTIONS["default"], OPTIONS["paper"], {"reverse_scope": "sequence"}], ids=str)
def test_model_with_fast_scans_is_the_model_with_the_recurrence(options):
    model = tiny.model(num_hidden_layers=2, **options)
    inputs = tiny.batch(tiny.Sample(70, ("video", 4, 5, 4)), tiny.Sample(1, ("image", 2, 3), 1))
    results = []
    for name in ("auto", "recurrence"):
        with use_kernels(ssd=name):
            logits = model(**inputs).logits[inputs["attention_mask"].bool()]
        weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).double()
        parameters = model.model.language_model.layers.parameters()
        results.append([logits, *torch.autograd.grad((weight * logits).sum(), parameters)])
    for fast, slow in zip(*results):
        torch.testing.assert_close(fast, slow, atol=1e-9 * float(slow.detach().abs().max()), rtol=0)


@pytest.mark.parametrize("lengths", [(1, 5, 20), (20,), (2,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_causal_conv_in_other_precisions(dtype, lengths):
    """Values and gradients; some processors have a convolution of their own for these."""
    x, weight = torch.randn(sum(lengths), 6), torch.randn(4, 6)
    inputs = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    (y, tail), (right, right_tail) = (causal_conv(*tensors, Segments.build(lengths)) for tensors in (inputs, exact))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(y.double(), right, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(tail.double(), right_tail)
    for grad, right_grad in zip(torch.autograd.grad(y.sum(), inputs), torch.autograd.grad(right.sum(), exact)):
        torch.testing.assert_close(grad.double(), right_grad, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("width", [2, 4, 7])
def test_causal_conv(width):
    lengths = (1, 5, 20)
    x = torch.randn(sum(lengths), 6, dtype=torch.float64)
    weight = torch.randn(width, 6, dtype=torch.float64)
    tail = torch.randn(3, width - 1, 6, dtype=torch.float64)
    for history in (None, tail):
        y, new_tail = causal_conv(x, weight, Segments.build(lengths), history)
        start = 0
        for i, length in enumerate(lengths):
            before = torch.zeros(width - 1, 6, dtype=torch.float64) if history is None else history[i]
            padded = torch.cat([before, x[start : start + length]])
            expected = conv1d(padded.T[None], weight.T[:, None], groups=6)[0].T
            torch.testing.assert_close(y[start : start + length], expected)
            torch.testing.assert_close(new_tail[i], padded[-(width - 1) :])
            start += length
