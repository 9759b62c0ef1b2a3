"""Scan orders, windows and packing against definitions written down here."""

import itertools

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from linmu_hf.families.qwen2_5_vl.vision import Qwen2_5_VLVision
from linmu_hf.modeling import checks
from linmu_hf.modeling.checks import check_media
from linmu_hf.modeling.layout.token_layout import TokenLayout


GRIDS = [(1, 1, 1), (1, 3, 5), (1, 4, 4), (2, 2, 3), (3, 4, 5), (4, 1, 7), (7, 5, 1)]


def row(*parts):
    """
    vision_layout of one sequence: a number of text tokens, a grid (T, H, W), or (T, H, W, "separated") with a
    separator after each frame.
    """
    tokens, span = [], 0
    for part in parts:
        if isinstance(part, int):
            tokens += [[-1] * 4] * part
            continue
        for t in range(part[0]):
            tokens += [[span, t, y, x] for y in range(part[1]) for x in range(part[2])]
            tokens += [[-1] * 4] * (len(part) > 3)
        span += 1
    return tokens


def build(*rows, padding="right", **options):
    """Layout of a batch of rows (lists of parts)."""
    rows = [row(*parts) for parts in rows]
    t = max(map(len, rows))
    layout, mask = torch.full((len(rows), t, 4), -1), torch.zeros(len(rows), t)
    for i, tokens in enumerate(rows):
        columns = slice(0, len(tokens)) if padding == "right" else slice(t - len(tokens), None)
        layout[i, columns], mask[i, columns] = torch.tensor(tokens), 1
    config = tiny.text_config(**options)
    return TokenLayout.build(config, len(rows), t, "cpu", mask, layout), layout, mask.bool()


def n_of_layer(layer, t, y, x, T, H, W):
    """The index n_l of token (t, y, x), as printed in Sec. 3.1.1."""
    return {
        0: t * (H * W) + y * W + x,
        1: t * (H * W) + x * H + y,
        2: y * (T * W) + x * T + t,
        3: x * (T * H) + y * T + t,
    }[layer % 4]


def spans(layout):
    """Positions in the flattened batch of every span, ascending, with its grid."""
    for i, tokens in enumerate(layout):
        for span in sorted(set(tokens[:, 0].tolist()) - {-1}):
            places = (tokens[:, 0] == span).nonzero()[:, 0]
            yield places + i * len(tokens), (tokens[places, 1:].amax(0) + 1).tolist()


ROWS = [(2, (1, 3, 5), 3, (3, 4, 5), 1), ((7, 2, 3),), (6,), (1, (3, 2, 3, "separated"), (1, 1, 4), (2, 2, 2), 2)]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("layer", range(8))
def test_scan_order_is_the_printed_formula(layer, padding):
    layout, vision_layout, mask = build(*ROWS, padding=padding, num_hidden_layers=8)
    flat = vision_layout.flatten(0, 1)
    expected = torch.arange(len(flat))
    for places, (T, H, W) in spans(vision_layout):
        for token in places.tolist():
            _, t, y, x = flat[token].tolist()
            expected[places[n_of_layer(layer, t, y, x, T, H, W)]] = token
    order = tiny.text_config(num_hidden_layers=8).scan_order(layer)
    assert torch.equal(layout.orders[order], expected[mask.flatten()])


def test_one_scan_order_is_used_by_all_layers():
    config = tiny.text_config(scan_orders=["hwt"])
    assert {config.scan_order(layer) for layer in range(4)} == {"hwt"}
    assert set(build(*ROWS, scan_orders=["hwt"])[0].orders) == {"hwt"}


def together(a, b, extent, window, shift, wrap):
    """Whether two tokens share a window. Shifted borders are half a window later; wrapping joins what is outside."""
    for i, j, size, width in zip(a, b, extent, window):
        width = min(width, size)
        offset = width // 2 if shift and width < size else 0
        i, j = i - offset, j - offset
        if wrap:
            i, j = i % size, j % size
        if i // width != j // width:
            return False
    return True


@pytest.mark.parametrize("wrap", [False, True], ids=["no wrap", "wrap"])
@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("sizes", [([2, 2, 3], [1, 2, 3]), ([16, 4, 4], [1, 16, 16]), ([3, 1, 2], [1, 5, 2])], ids=str)
def test_windows(sizes, shift, wrap):
    options = {"window_size": sizes[0], "image_window_size": sizes[1], "window_wrap": wrap}
    layout, vision_layout, _ = build(*[(1, grid, 2) for grid in GRIDS], (*GRIDS, 1), **options)
    flat = vision_layout.flatten(0, 1)
    owner = torch.full((len(flat),), -1)
    for number, (places, _) in enumerate(spans(vision_layout)):
        owner[places] = number
    extents = [extent for _, extent in spans(vision_layout)]
    vision = layout.vision
    assert torch.equal(vision, (flat[:, 0] >= 0).nonzero()[:, 0])
    window_of = {}
    for window in (row for group in layout.windows[shift].groups for row in group.tolist()):
        window_of |= {i: tuple(window) for i in window}
    for i, j in itertools.combinations(range(len(vision)), 2):
        a, b = int(vision[i]), int(vision[j])
        same = owner[a] == owner[b]
        if same:
            extent = extents[owner[a]]
            window = sizes[0] if extent[0] > 1 else sizes[1]
            same = together(flat[a, 1:].tolist(), flat[b, 1:].tolist(), extent, window, shift, wrap)
        assert (window_of[i] == window_of[j]) == bool(same), (flat[a], flat[b])


@pytest.mark.parametrize(
    "rows", [ROWS, [((1, 2, 3), 4)], [((2, 4, 6),), ((2, 2, 3), 1)]], ids=["ragged", "one", "full"]
)
@pytest.mark.parametrize("shift", [False, True], ids=["unshifted", "shifted"])
def test_every_vision_token_has_one_place_in_the_windows(shift, rows):
    windows = build(*rows)[0].windows[shift]
    laid_out = torch.cat([group.flatten() for group in windows.groups])
    assert torch.equal(laid_out[windows.slots], torch.arange(len(windows.slots)))
    assert torch.equal(laid_out.sort().values, torch.arange(len(windows.slots)))
    sizes = [group.shape[1] for group in windows.groups]
    assert len(set(sizes)) == len(sizes)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_sequences_are_packed_without_padding(padding):
    layout, _, mask = build(*ROWS, padding=padding)
    assert layout.segments.lengths == tuple(mask.sum(1).tolist())
    assert layout.rows is None and layout.batch == len(ROWS)
    real = mask.flatten().nonzero()[:, 0]
    for order in layout.orders.values():
        assert torch.equal(order.sort().values, real)


@pytest.mark.parametrize("order", ["thw", "twh", "hwt", "wht"])
def test_text_and_separators_stay_in_place(order):
    layout, vision_layout, mask = build(*ROWS)
    real = mask.flatten().nonzero()[:, 0]
    text = vision_layout.flatten(0, 1)[real, 0] < 0
    assert torch.equal(layout.orders[order][text], real[text])
    assert torch.equal(text.logical_not().nonzero()[:, 0], layout.scan_vision)


def test_reverse_scan_of_spans():
    """Each span alone, backwards, without text or separators."""
    layout, vision_layout, mask = build(*ROWS)
    real = mask.flatten().nonzero()[:, 0]
    expected = [places.flip(0) for places, _ in spans(vision_layout)]
    start = 0
    found = []
    for length in layout.reverse_segments.lengths:
        found.append(real[layout.reverse[start : start + length]])
        start += length
    assert start == len(layout.reverse)
    assert sorted(map(torch.Tensor.tolist, found)) == sorted(map(torch.Tensor.tolist, expected))
    assert torch.equal(layout.reverse[layout.reverse_slots], layout.scan_vision)


def test_reverse_scan_of_sequences():
    layout, _, mask = build(*ROWS, reverse_scope="sequence")
    assert torch.equal(layout.reverse, torch.arange(int(mask.sum())).flip(0))
    assert layout.reverse_segments.lengths == layout.segments.lengths[::-1]
    assert torch.equal(layout.reverse[layout.reverse_slots], layout.scan_vision)


def test_rows_without_tokens_have_no_segment():
    mask = torch.tensor([[1, 1, 1], [0, 0, 0], [0, 0, 1]])
    layout = TokenLayout.build(tiny.text_config(), 3, 3, "cpu", mask)
    assert layout.segments.lengths == (3, 1) and layout.rows.tolist() == [0, 2]
    assert layout.vision is None and layout.reverse is None


QWEN = Qwen2_5_VLVision(tiny.config(), None)


def test_merged_grid():
    """Token types and patch grids of a batch, images and videos mixed, to spans and coordinates."""
    types = torch.tensor([[0, 2, 2, 2, 2, 0, 1, 1], [1, 1, 1, 1, 1, 1, 0, 1]])
    grids = {"image": torch.tensor([[1, 2, 4], [1, 4, 6], [1, 2, 2]]), "video": torch.tensor([[2, 4, 2]])}
    layout = QWEN.layout(types, grids)
    assert torch.equal(layout[..., 0] >= 0, types > 0)
    assert layout[0, 1:5, 1:].tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0]]
    assert layout[0, 6:, 1:].tolist() == [[0, 0, 0], [0, 0, 1]]
    assert layout[1, :6, 1:].tolist() == [[0, y, x] for y in range(2) for x in range(3)]
    assert layout[1, 7, 1:].tolist() == [0, 0, 0]
    assert len(set(layout[..., 0].flatten().tolist()) - {-1}) == 4


def test_placeholders_that_do_not_match_the_grids():
    types = torch.tensor([[0, 1, 1, 1]])
    with pytest.raises(ValueError, match=r"the prompt has 3 image tokens but image_grid_thw describes 4 \(1 images\)"):
        check_media(types, None, QWEN, torch.tensor([[1, 4, 4]]))
    with pytest.raises(ValueError, match=r"the prompt has 3 image tokens but image_grid_thw describes 0"):
        check_media(types, None, QWEN)
    with pytest.raises(ValueError, match=r"the prompt has 0 video tokens but video_grid_thw describes 1"):
        check_media(types * 0, None, QWEN, None, torch.tensor([[1, 2, 2]]))


class Waits(TorchDispatchMode):
    """Counts the operations after which the host waits for the device: their results, or their sizes, are read."""

    READ = ("_local_scalar_dense", "nonzero", "unique", "bincount")
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(name in str(func) for name in self.READ)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("spans", [1, 20])
def test_the_host_waits_for_few_results(spans):
    sample = tiny.Sample(2, *[("image", 3, 5), ("video", 3, 4, 2)] * spans)
    inputs = {name: value for name, value in tiny.batch(sample).items() if "pixel" not in name}
    _, layout = tiny.model(num_hidden_layers=1).model.get_positions(**inputs)
    with Waits() as waits:
        TokenLayout.build(tiny.text_config(), *layout.shape[:2], "cpu", None, layout)
    assert waits.count <= 12


def test_a_layout_of_ours_is_not_looked_at_again(monkeypatch):
    model, inputs = tiny.model(num_hidden_layers=1), tiny.batch(tiny.Sample(2, ("image", 3, 5), 4))
    looked = []
    monkeypatch.setattr(checks, "_check_layout", lambda layout: looked.append(layout.shape))
    where = {name: value for name, value in inputs.items() if "pixel" not in name}
    positions, layout = model.model.get_positions(**where)
    model(**inputs, position_ids=positions, vision_layout=layout)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    model.prefill(**inputs, chunk_size=4)
    assert not looked
    model(**inputs, position_ids=positions, vision_layout=layout.clone())
    assert looked == [layout.shape]
