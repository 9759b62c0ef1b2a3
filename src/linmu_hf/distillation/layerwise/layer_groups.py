"""A teacher-fed stage of a few layers at a time: which they are, and what their logs say together."""

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from ...modeling.mixers import recurrent_layers
from ..plots import HELD_OUT, LAYER_PREFIX


Rows = list[dict[str, Any]]

# What a row of a log says once for all groups, and what is the sum of theirs. The mean of the layers is taken again.
SHARED = ("step", "epoch", "learning_rate")
SUMS = ("loss", "loss_hid", "eval_loss", "eval_loss_hid", "seconds", "eval_runtime", "train_runtime", "train_loss")


def layer_groups(student: Any, size: int) -> list[list[int]]:
    """Returns the layers whose mixers train now, in groups of at most `size`."""
    layers = student.model.language_model.layers
    replaced = recurrent_layers(student.config.text_config.layer_types)
    trained = [index for index in replaced if any(p.requires_grad for p in layers[index].mixer.parameters())]
    return [trained[start : start + size] for start in range(0, len(trained), size)]


def freeze_others(student: Any, group: Sequence[int]) -> None:
    """Freezes the mixers of all layers outside `group`."""
    for index, layer in enumerate(student.model.language_model.layers):
        if index not in group:
            mixer: nn.Module = layer.mixer
            mixer.requires_grad_(False)


def group_name(group: Sequence[int]) -> str:
    """Returns what the folder of a group is called."""
    return f"layers-{group[0]}-{group[-1]}"


def merge_logs(logs: Sequence[Rows]) -> Rows:
    """
    Returns the log that one run of all layers would have written. Rows that some group lacks are left out.

    Args:
        logs (`Sequence[list[dict]]`): The rows of each group.
    """
    merged: dict[tuple, Rows] = {}
    for row in (row for log in logs for row in log):
        kind = next(name for name in ("loss", "eval_loss", "train_loss", "step") if name in row)
        merged.setdefault((row["step"], kind), []).append(row)
    return [_merge(rows) for rows in merged.values() if len(rows) == len(logs)]


def _merge(rows: Rows) -> dict[str, Any]:
    first = rows[0]
    row = {name: first[name] for name in SHARED if name in first}
    row |= {name: sum(other[name] for other in rows) for name in SUMS if name in first}
    if "grad_norm" in first:
        row["grad_norm"] = math.hypot(*(other["grad_norm"] for other in rows))
    for prefix in ("", HELD_OUT):
        start = prefix + LAYER_PREFIX
        layers = {name: error for other in rows for name, error in other.items() if name.startswith(start)}
        if layers:
            row |= {f"{prefix}relative_error": sum(layers.values()) / len(layers)} | layers
    return row
