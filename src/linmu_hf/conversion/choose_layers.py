"""Which layers of a hybrid keep their attention: those whose replacement alone changes the teacher's answers most."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from .calibration.walk import embed


AUTO = "auto:"


def number_to_keep(keep_attention: Sequence[int] | str, n_layers: int) -> int | None:
    """
    Returns K of `"auto:K"`, `None` for anything else.

    Raises:
        `ValueError`: K is not a number of layers.
    """
    if not isinstance(keep_attention, str) or not keep_attention.startswith(AUTO):
        return None
    text = keep_attention.removeprefix(AUTO)
    if not text.isdecimal() or not 0 < int(text) < n_layers:
        raise ValueError(f"keep_attention={keep_attention!r}: K of auto:K must be from 1 to {n_layers - 1}")
    return int(text)


@torch.no_grad()
def replacement_costs(student: nn.Module, teacher: nn.Module, batches: Sequence[Mapping]) -> list[float]:
    """
    Measures KL(teacher || teacher with one layer replaced) of the next token, for each layer alone.

    Args:
        student (`LinMUForConditionalGeneration`): With a recurrent mixer in every layer.
        teacher (`LinMUForConditionalGeneration`): Its teacher, from [`load_teacher`].
        batches (`Sequence[Mapping[str, torch.Tensor]]`): Model inputs.

    Returns:
        `list[float]`: Nats per real token, layer by layer.
    """
    ours, theirs = student.model.language_model.layers, teacher.model.language_model.layers
    costs, tokens = [0.0] * len(theirs), 0
    bar = tqdm(total=len(theirs) * len(batches), desc="replacing one layer alone")
    for batch in batches:
        hidden, prompt = embed(teacher, batch)
        where = prompt.mask, prompt.positions, prompt.vision_layout
        rope, layout, _ = student.model.language_model.prepare(hidden, *where)
        attention = teacher.model.language_model.prepare(hidden, *where)[2]
        real, inputs = next(iter(layout.orders.values())), []
        for layer in theirs:
            inputs.append(hidden)
            hidden = layer(hidden, rope, None, attention)[0]
        known = _log_probabilities(teacher, hidden, real)
        tokens += len(known)
        for index, layer in enumerate(ours):
            hidden = layer(inputs[index], rope, layout)[0]
            for later in theirs[index + 1 :]:
                hidden = later(hidden, rope, None, attention)[0]
            found = _log_probabilities(teacher, hidden, real)
            costs[index] += float((known.exp() * (known - found)).sum())
            bar.update()
    bar.close()
    return [cost / tokens for cost in costs]


def choose_attention_layers(
    student: nn.Module, teacher: nn.Module, batches: Sequence[Mapping], keep: int
) -> list[int]:
    """Returns the `keep` layers that are costliest to replace, ascending; arguments as in [`replacement_costs`]."""
    costs = replacement_costs(student, teacher, batches)
    return sorted(sorted(range(len(costs)), key=lambda layer: -costs[layer])[:keep])


def _log_probabilities(teacher: nn.Module, hidden: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    hidden = teacher.model.language_model.norm(hidden).flatten(0, 1)[real]
    return teacher.lm_head(hidden).float().log_softmax(-1)
