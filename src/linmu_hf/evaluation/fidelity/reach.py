"""Where a student looks exactly: the keys that each token meets by softmax; all others are in the state alone."""

import torch

from ...modeling.layout.token_layout import TokenLayout
from ...modeling.mixers import MIXERS


def exact_reach(config, layer_idx: int, layout: TokenLayout | None, vision_layout: torch.Tensor | None, t: int):
    """
    Returns which keys the tokens of one sequence attend to exactly in a layer.

    Args:
        config (`LinMUTextConfig`): Of the student.
        layer_idx (`int`): The layer; one that keeps attention reaches all before.
        layout (`TokenLayout` or `None`): Of a batch of this sequence alone, without padding; attention needs none.
        vision_layout (`torch.LongTensor` of shape `[1, t, 4]` or `None`): Span and coordinates, -1 for text.
        t (`int`): Tokens of the sequence.

    Returns:
        `torch.BoolTensor` of shape `[t, t]`, queries by keys. Windows of vision tokens (Sec. 3.1.2) hold later tokens,
        too, where the teacher has no attention.
    """
    if layout is None or not MIXERS[config.layer_types[layer_idx]].recurrent:
        return torch.ones(t, t, dtype=torch.bool).tril()
    device = next(iter(layout.orders.values())).device
    place = torch.arange(t, device=device)
    span = torch.full((t,), -1, device=device) if vision_layout is None else vision_layout[0, :, 0].to(device)
    is_text = span < 0
    reach = torch.zeros(t, t, dtype=torch.bool, device=device)
    if config.text_window:
        # The last text token that a query sees is itself, or the one before its span.
        first = place.clone()
        for one in span[~is_text].unique():
            first[span == one] = place[span == one].min()
        rank = is_text.long().cumsum(0) - 1
        last = rank[(first - (~is_text).long()).clamp_min(0)].masked_fill(~is_text & (first == 0), -1)
        behind = last[:, None] - rank  # [queries, keys]
        reach = is_text & (behind >= 0) & ((behind < config.text_window) | (rank < config.sink_tokens))
    if layout.vision is not None and layout.windows is not None:
        for group in layout.windows[config.shifts_windows(layer_idx)].groups:
            members = layout.vision[group]  # [windows, size]
            reach[members[:, :, None], members[:, None, :]] = True
    return reach
