"""Where every token is: sequences packed without padding, scan orders, reverse scans, windows.

A *span* is the set of positions of one image or video of a sequence. Rotary Major-Scan moves the vision tokens of a
span among the span's own positions; text and separators stay. The layout is built once per forward pass from
per-token coordinates and handed to every layer.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch

from ...ops.segments import Segments
from ..configuration_linmu import LinMUTextConfig
from .near import NearStep, NearText


_AXES = {"t": 1, "h": 2, "w": 3}  # columns of vision_layout


class TextStep(NamedTuple):
    """
    The layout of a decode step: one text token per row, nothing to order and no window.

    Args:
        mask (`torch.Tensor` of shape `[b]` or `None`): 0 where a row has padding, and its state stays as it is.
        near (`NearStep` or `None`): With `text_window`, where the token goes among those in exact attention.
    """

    mask: torch.Tensor | None = None
    near: NearStep | None = None


@dataclass(frozen=True)
class Windows:
    """
    One partition of the vision tokens into windows.

    Windows at an edge are smaller; those of one size go together, so that none needs padding.

    Args:
        groups (`tuple[torch.LongTensor, ...]`, each of shape `[windows, size]`): Vision tokens of each window.
        slots (`torch.LongTensor` of shape `[v]`): Place of each vision token when the groups are laid end to end.
        offsets (`torch.IntTensor` of shape `[all windows + 1]`): Where each window then begins, and the end.
    """

    groups: tuple[torch.Tensor, ...]
    slots: torch.Tensor
    offsets: torch.Tensor

    def to(self, device: torch.device | str | int, **kwargs: Any) -> "Windows":
        """Returns the same on another device; further arguments as for `torch.Tensor.to`."""
        return Windows(*(_moved(getattr(self, field.name), device, kwargs) for field in fields(self)))


@dataclass(frozen=True)
class TokenLayout:
    """
    The places of all tokens of a forward pass: packed, in scan orders, in windows.

    Args:
        batch (`int`): Rows of the batch.
        segments (`Segments`): The sequences of the batch, packed without padding (n tokens in all).
        rows (`torch.LongTensor` of shape `[m]` or `None`): Batch row of each segment; `None` if every row has one (a
            row of padding alone has none, and keeps its cached state) or if one row holds them all.
        orders (`dict[str, torch.LongTensor]`): For each scan order the place in the flattened batch `[b * t]` of the
            i-th packed token, shape `[n]`.
        vision (`torch.LongTensor` of shape `[v]` or `None`): Places in the flattened batch of the vision tokens.
        scan_vision (`torch.LongTensor` of shape `[v]` or `None`): Packed places that hold vision tokens, ascending:
            the same for all scan orders.
        reverse (`torch.LongTensor` of shape `[r]` or `None`): Packed places in the order of the reverse scan.
        reverse_segments (`Segments` or `None`): Its segments.
        reverse_slots (`torch.LongTensor` of shape `[v]` or `None`): Place within `reverse` of each of `scan_vision`.
        windows (`dict[bool, Windows]`): Local-Swin windows, unshifted (`False`) and shifted (`True`).
        near (`NearText` or `None`): What is exact for text tokens, with `text_window`.
    """

    batch: int
    segments: Segments
    orders: dict[str, torch.Tensor]
    rows: torch.Tensor | None = None
    vision: torch.Tensor | None = None
    scan_vision: torch.Tensor | None = None
    reverse: torch.Tensor | None = None
    reverse_segments: Segments | None = None
    reverse_slots: torch.Tensor | None = None
    windows: dict[bool, Windows] | None = None
    near: NearText | None = None

    def to(self, device: torch.device | str | int, **kwargs: Any) -> "TokenLayout":
        """
        Returns the same on another device, for models whose layers are on several; further arguments as for
        `torch.Tensor.to`.
        """
        if next(iter(self.orders.values())).device == torch.device(device):
            return self
        return replace(
            self, **{field.name: _moved(getattr(self, field.name), device, kwargs) for field in fields(self)}
        )

    @classmethod
    def build(
        cls, config: LinMUTextConfig, batch: int, length: int, device: torch.device,
        attention_mask: torch.Tensor | None = None, vision_layout: torch.Tensor | None = None,
        packed: Sequence[int] | None = None, past: torch.Tensor | None = None,
    ) -> "TokenLayout":  # fmt: skip
        """
        Builds the layout of the new tokens of a batch.

        Args:
            config (`LinMUTextConfig`): Scan orders, windows, reverse scope.
            batch, length (`int`): b and t of the new tokens.
            attention_mask (`torch.Tensor` of shape `[b, t]`, *optional*): 0 at padding, on either side.
            vision_layout (`torch.LongTensor` of shape `[b, t, 4]`, *optional*): Span and (T, H, W) coordinate of every
                token, -1 for text and padding.
            packed (`Sequence[int]`, *optional*): Lengths of the sequences that share the one row of a packed batch.
            past (`torch.LongTensor` of shape `[b, 2]`, *optional*): Text and vision tokens in the cache.
        """
        if attention_mask is not None and bool(attention_mask.bool().all()):
            attention_mask = None
        if attention_mask is None:
            real = torch.arange(batch * length, device=device)
            lengths = [length] * batch
        else:
            real = attention_mask.reshape(-1).nonzero().squeeze(1)
            lengths = attention_mask.bool().sum(1).tolist()
        rows = None
        if packed is not None:
            lengths = list(packed)
        elif not all(lengths):
            rows = torch.tensor([row for row, count in enumerate(lengths) if count], device=device)
        lengths = [count for count in lengths if count]
        if not lengths:
            raise ValueError(f"attention_mask hides all {length} new tokens of every row: nothing can be read")
        segments = Segments.build(lengths, device)
        is_vision = None if vision_layout is None else (vision_layout[..., 0].reshape(-1)[real] >= 0)
        sequence = torch.arange(len(lengths), device=device)
        sequence = sequence.repeat_interleave(torch.tensor(lengths, device=device), output_size=sum(lengths))
        near = functools.partial(NearText.build, config, batch, real, sequence, lengths, rows, past=past)
        if is_vision is None or not bool(is_vision.any()):
            return cls(
                batch, segments, dict.fromkeys(config.scan_orders, real), rows,
                near=near() if config.text_window else None,
            )  # fmt: skip

        scan_vision = is_vision.nonzero().squeeze(1)
        vision = real[scan_vision]
        coordinates = vision_layout.reshape(-1, 4)[vision].long()
        span = _relabel(sequence[scan_vision], coordinates[:, 0])
        grid, cells = _split_uneven(span, coordinates[:, 1:])
        extent = _extents(grid, cells)

        # vision tokens by span and position; within a span, orders permute the tokens over these places
        by_span = torch.argsort(span, stable=True)
        orders = {}
        for order in set(config.scan_orders):
            columns = [coordinates[:, _AXES[axis]] for axis in order]
            ranked = torch.argsort(_sort_key([span, *columns]), stable=True)
            packed = real.clone()
            packed[scan_vision[by_span]] = vision[ranked]
            orders[order] = packed

        if config.reverse_scope == "span":
            reverse, reverse_lengths = scan_vision[by_span].flip(0), torch.bincount(span).flip(0).tolist()
        else:
            reverse, reverse_lengths = torch.arange(len(real), device=device).flip(0), segments.lengths[::-1]
        place = torch.empty(len(real), dtype=torch.long, device=device)
        place[reverse] = torch.arange(len(reverse), device=device)
        windows = {
            shift: _windows(config, grid, cells, extent, shift)
            for shift in {config.shifts_windows(layer) for layer in range(config.num_hidden_layers)}
        }
        return cls(
            batch, segments, orders, rows, vision, scan_vision, reverse, Segments.build(reverse_lengths, device),
            place[scan_vision], windows, near(is_vision, scan_vision, span) if config.text_window else None,
        )  # fmt: skip


def span_layout(
    types: torch.Tensor, media: dict[int, list[torch.Tensor]], max_span_frames: int | None = None
) -> torch.Tensor:
    """
    Returns the span and (T, H, W) coordinate of every token.

    Args:
        types (`torch.Tensor` of shape `[b, t]`): 0 text and padding, 1 image, 2 video.
        media (`dict[int, list[torch.LongTensor]]`): For either kind the coordinates `[n, 3]` of the tokens of every
            image or video of the batch, in their order; -1 for a token that is not a cell of its grid.
        max_span_frames (`int`, *optional*): Longest span of a video in frames; longer videos are several spans.

    Returns:
        `torch.LongTensor` of shape `[b, t, 4]`, -1 for text and padding.
    """
    layout = torch.full((*types.shape, 4), -1, dtype=torch.long, device=types.device)
    first_span = 0
    for kind, coordinates in media.items():
        if not coordinates:
            continue
        cells = torch.cat(coordinates)
        sizes = torch.tensor([len(own) for own in coordinates], device=types.device)
        span = torch.arange(len(sizes), device=types.device).repeat_interleave(sizes)
        places, is_cell = (types == kind).nonzero(), cells[:, 0] >= 0
        places, span, cells = places[is_cell], span[is_cell], cells[is_cell]
        if max_span_frames is not None and kind == 2:
            part = cells[:, 0] // max_span_frames
            span = _relabel(span, part)
            cells = torch.cat([cells[:, :1] % max_span_frames, cells[:, 1:]], dim=1)
        layout[places[:, 0], places[:, 1]] = torch.cat([span[:, None] + first_span, cells], dim=1)
        first_span += int(span.max()) + 1
    return layout


def _moved(value: Any, device: torch.device | str | int, kwargs: dict[str, Any]) -> Any:
    """Returns a part of a layout on another device."""
    if isinstance(value, dict):
        return {key: _moved(item, device, kwargs) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(item, device, kwargs) for item in value)
    return value.to(device, **kwargs) if hasattr(value, "to") else value


def _sort_key(columns: list[torch.Tensor]) -> torch.Tensor:
    """Returns one integer per row that sorts like the columns, first column first. Does not wait for the device."""
    key = torch.zeros_like(columns[0])
    for column in columns:
        key = key * (column.max() + 1) + column
    return key


def _relabel(sequence: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    """Returns consecutive labels 0, 1, ... of the distinct (sequence, span) pairs, in sequence order."""
    # torch.unique would wait for the device to say how many there are
    key, order = _sort_key([sequence, span]).sort()
    rank = torch.nn.functional.pad((key[1:] != key[:-1]).long().cumsum(0), (1, 0))
    return torch.empty_like(rank).scatter_(0, order, rank)


def _extents(grid: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Returns the size (T, H, W) of the grid of every token, shape [v, 3]."""
    extent = torch.zeros_like(cells)  # at most as many grids as tokens
    extent = extent.scatter_reduce(0, grid[:, None].expand(-1, 3), cells + 1, "amax")
    return extent[grid]


def _split_uneven(span: torch.Tensor, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The grids that windows partition, and every token's cell in its own: the spans, but a span whose frames differ in
    size, such as an image and its thumbnail, is one grid for each.
    """
    frame = _relabel(span, cells[:, 0])
    size, largest = _extents(frame, cells)[:, 1:], _extents(span, cells)[:, 1:]
    smaller = torch.zeros_like(span).index_add_(0, span, (size < largest).any(1).long())
    uneven = smaller[span] > 0
    grid = _relabel(span, torch.where(uneven, cells[:, 0], 0))
    return grid, torch.cat([torch.where(uneven, 0, cells[:, 0])[:, None], cells[:, 1:]], dim=1)


def _windows(
    config: LinMUTextConfig, grid: torch.Tensor, position: torch.Tensor, extent: torch.Tensor, shift: bool
) -> Windows:
    """Partition of every grid into windows of `window_size` (`image_window_size` for those of one frame)."""
    device = grid.device
    video = torch.tensor(config.window_size, device=device)
    image = torch.tensor(config.image_window_size, device=device)
    size = torch.minimum(torch.where(extent[:, :1] > 1, video, image), extent)
    if shift:
        # a window as large as the grid has nothing to shift to
        offset = torch.where(size < extent, size // 2, 0)
        if config.window_wrap:
            position = (position - offset) % extent
        else:
            position = position + torch.where(offset > 0, size - offset, 0)
    cell = position // size
    window = _relabel(grid, _sort_key([*cell.unbind(1)]))
    counts = torch.bincount(window)
    first = counts.cumsum(0) - counts
    by_window = torch.argsort(window, stable=True)
    groups = []
    for width in counts.unique().tolist():
        members = first[counts == width][:, None] + torch.arange(width, device=device)
        groups.append(by_window[members])
    order = torch.cat([group.flatten() for group in groups])
    slots = torch.empty_like(order)
    slots[order] = torch.arange(len(order), device=device)
    offsets = torch.nn.functional.pad(counts.sort().values.cumsum(0, dtype=torch.int32), (1, 0))
    return Windows(tuple(groups), slots, offsets)
