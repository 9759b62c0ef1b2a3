"""Invariant 4: cost grows with the number of tokens, not with its square; and the decoder stays small in between."""

from itertools import pairwise

import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


LENGTHS = [2048, 4096, 8192, 16384, 32768]
DEFAULT_WINDOWS = {"window_size": [16, 4, 4], "image_window_size": [1, 16, 16]}
SMALL_WINDOWS = {"window_size": [4, 4, 4]}


def decoder(**options):
    return tiny.model(**{**DEFAULT_WINDOWS, **options}).float().model.language_model


def text(t):
    return {"inputs_embeds": torch.randn(1, t, 32)}


def video(t, frames=None):
    """Random embeddings of t tokens: videos of 8 x 8 tokens a frame (one video, or one every `frames`), then text."""
    n = (t - t // 16) // 64 * 64
    place = torch.arange(n)
    span = place // (64 * (frames or n))
    frame = place // 64 - span * (frames or n)
    layout = torch.full((1, t, 4), -1)
    layout[0, :n] = torch.stack([span, frame, place // 8 % 8, place % 8], 1)
    return {"inputs_embeds": torch.randn(1, t, 32), "vision_layout": layout}


def clips(t):
    return video(t, frames=15)


@torch.no_grad()
def flops(model, inputs):
    # of the attention kernels the counter knows, on a CPU, only the plain one
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("content", "windows"),
    [(text, {}), (clips, {}), (video, {}), (video, SMALL_WINDOWS)],
    ids=["text", "clips", "one video", "one video, small windows"],
)
def test_flops_double_when_tokens_double(content, windows):
    model = decoder(num_hidden_layers=2, **windows)
    counts = [flops(model, content(t)) for t in LENGTHS]
    for smaller, larger in pairwise(counts):
        assert larger / smaller == pytest.approx(2, rel=0.03)


def test_flops_of_attention_do_not_merely_double():
    """The count would see a quadratic part."""
    model = decoder(num_hidden_layers=2, layer_types=["full_attention"] * 2)
    small, large = (flops(model, text(t)) for t in (2048, 4096))
    assert large / small > 2.5


def test_flops_of_a_step_do_not_depend_on_the_past():
    model = decoder()
    counts = []
    for t in (100, 1000):
        with torch.no_grad():
            cache = model(**video(t), use_cache=True).past_key_values
        counts.append(flops(model, {"inputs_embeds": torch.randn(1, 1, 32), "past_key_values": cache}))
    assert counts[0] == counts[1] > 0


class NothingSquare(TorchDispatchMode):
    """Fails as soon as a tensor appears that has two dimensions near t, or a good part of t * t elements."""

    def __init__(self, t):
        super().__init__()
        self.t, self.largest = t, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                long = sum(size >= self.t // 2 for size in tensor.shape)
                assert long < 2 and tensor.numel() < self.t**2 // 4, f"{func} made {tuple(tensor.shape)}"
        return out


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("t", [4096, 8192])
def test_nothing_square(t, padded):
    model = decoder(num_hidden_layers=2)
    inputs = video(t)
    if padded:
        inputs = {name: tensor.expand(2, *tensor.shape[1:]).clone() for name, tensor in inputs.items()}
        inputs["attention_mask"] = torch.ones(2, t, dtype=torch.long)
        inputs["attention_mask"][1, -100:] = 0
    with NothingSquare(t) as watch:
        model(**inputs, use_cache=False).last_hidden_state.square().mean().backward()
    assert watch.largest > t * 32


def test_the_watch_sees_attention():
    x = torch.randn(1, 64, 4)
    with NothingSquare(64), pytest.raises(AssertionError, match=r"made \(1, 64, 64\)"):
        x @ x.transpose(1, 2)
