"""
What is around a scan in a layer, by every kernel that can do it: attention in windows and the short convolution.

    python benchmarks/around_scan.py [--shape 7b] [--lengths 4096 65536] [--dtype bfloat16] [--backward] [--json FILE]

Windows are those of a video of 16 x 16 tokens a frame, unshifted (all of one size) and shifted (smaller ones at the
edges). What cannot run is listed with the reason. Times are the best of several runs taken in turns.
"""

from functools import partial

import torch
from ops import SHAPES, contest, measure_all, parser_of

from linmu_hf.commands.bench import DTYPES
from linmu_hf.evaluation.speed.models import prompt_layout, text_config
from linmu_hf.modeling.layout.token_layout import TokenLayout
from linmu_hf.ops.attention import varlen as varlen_attention
from linmu_hf.ops.attention import window as window_attention
from linmu_hf.ops.backends import why_unavailable
from linmu_hf.ops.conv.causal_conv import Taps
from linmu_hf.ops.segments import Segments


def windows(backend, shift, t, shape, dtype, device, gradients):
    h, _, g, d, *_ = shape
    layout = prompt_layout(t, 1.0, (16, 16)).to(device)
    cut = TokenLayout.build(text_config("tiny"), 1, t, device, vision_layout=layout).windows[shift]
    q, k, v = (
        torch.randn(len(cut.slots), heads, d, dtype=dtype, device=device, requires_grad=gradients)
        for heads in (h, g, g)
    )
    sizes = [tuple(group.shape) for group in cut.groups]
    if backend == "sdpa":
        return partial(window_attention.by_size, q, k, v, sizes), [q, k, v]
    if reason := varlen_attention.why_unfit(backend, q):
        raise ValueError(reason)
    longest = max(size for _, size in sizes)
    return partial(varlen_attention.varlen_attention, q, k, v, cut.offsets, longest, backend), [q, k, v]


def convolution(kernel, t, shape, dtype, device, gradients):
    h, _, g, p, *_ = shape
    sizes = [(n, (h + 2 * g) * p) for n in (t, 4)]
    x, weight = (torch.randn(size, dtype=dtype, device=device, requires_grad=gradients) for size in sizes)
    if kernel == "causal_conv1d":
        from causal_conv1d import causal_conv1d_fn

        return lambda: causal_conv1d_fn(x.t()[None], weight.t().contiguous()), [x, weight]  # channels last
    if kernel == "triton":
        if reason := why_unavailable("triton", x):
            raise ValueError(reason)
        from linmu_hf.ops.conv.triton import causal_conv_triton

        segments = Segments.build((t,), device)
        return lambda: causal_conv_triton(x, weight, segments)[0], [x, weight]
    return lambda: Taps.apply(torch.cat([x.new_zeros(3, x.shape[1]), x]), weight), [x, weight]


def measure(t: int, arguments) -> dict[str, dict]:
    """The contests at one length; ratios to plain PyTorch."""
    common = (t, SHAPES[arguments.shape], DTYPES[arguments.dtype], arguments.device, arguments.backward)
    kernels = ("pytorch", "triton", "causal_conv1d")
    contests = {"convolution": {name: partial(convolution, name, *common) for name in kernels}}
    for shift, label in enumerate(("windows", "windows, shifted")):
        backends = ("sdpa", *varlen_attention.PACKAGES)
        contests[label] = {name: partial(windows, name, bool(shift), *common) for name in backends}
    results = {}
    for label, makers in contests.items():
        own = contest(makers, arguments)
        plain = next(iter(own.values())).get("seconds")
        for name, result in own.items():
            if plain and "seconds" in result:
                result["plain_over_this"] = plain / result["seconds"]
            results[f"{label}: {name}"] = result
    return results


def main() -> None:
    arguments = parser_of(__doc__).parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{'tokens':>8} {'':30} {'':12} {'plain PyTorch / this':>20}")
    measure_all(measure, "{plain_over_this:20.2f}".format_map, 30, arguments)


if __name__ == "__main__":
    main()
