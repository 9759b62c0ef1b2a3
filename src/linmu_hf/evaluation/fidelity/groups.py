"""Tokens in groups, by what they are and how far they are, and the sums of a figure over every group."""

import math
from dataclasses import dataclass

import torch


KINDS = ("text", "image", "video")  # as `mm_token_type_ids` counts them
EVERY = "all"


def band(distance: torch.Tensor) -> torch.Tensor:
    """Returns the band of each distance in tokens: 0 for 0, 1 for 1, 2 for 2 to 3, 3 for 4 to 7, and so on."""
    return torch.floor(torch.log2(distance.clamp_min(1).double())).long() + (distance > 0)


def band_name(number: int) -> str:
    """Returns the distances of a band as text, such as `"4-7"`."""
    low, high = (0, 0) if number == 0 else (2 ** (number - 1), 2**number - 1)
    return str(low) if low == high else f"{low}-{high}"


def group_tokens(types: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Returns for every way to divide the tokens of one sequence the group of each token, -1 if it is in none.

    Args:
        types (`torch.LongTensor` of shape `[t]`): 0 text, 1 image, 2 video.

    Returns:
        `dict[str, torch.LongTensor]`, each of shape `[t]`: `all`; the `kind`; the band of the `position`, the number
        of tokens before it; and of text tokens the band of `from_vision`, the distance to the last vision token.
    """
    place = torch.arange(len(types), device=types.device)
    last_vision = torch.where(types > 0, place, -1).cummax(0).values
    after = (types == 0) & (last_vision >= 0)
    return {
        EVERY: torch.zeros_like(types),
        "kind": types,
        "position": band(place),
        "from_vision": torch.where(after, band(place - last_vision), -1),
    }


@dataclass
class Figures:
    """Sums of some figures over the tokens of every group. The first column counts the tokens."""

    names: tuple[str, ...]

    def __post_init__(self):
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, groups: dict[str, torch.Tensor], *values: torch.Tensor) -> None:
        """
        Adds tokens.

        Args:
            groups (`dict[str, torch.LongTensor]`, each of shape `[t]`): From [`group_tokens`].
            values (`torch.Tensor` of shape `[t]`): One for each of the names.
        """
        columns = torch.stack([torch.ones_like(values[0]), *values], dim=1).double().cpu()
        for division, group in groups.items():
            group = group.cpu()
            found = columns.new_zeros(int(group.max().clamp_min(0)) + 1, columns.shape[1])
            found.index_add_(0, group[group >= 0], columns[group >= 0])
            self.sums[division] = _added(self.sums.get(division), found)

    def report(self, finish) -> dict:
        """
        Returns `finish(tokens, *sums)`, a `dict`, of all tokens and of every group that has some.

        Args:
            finish (`Callable`): Makes the figures of a group of its sums, in the order of the names.
        """
        result = {}
        for division, sums in self.sums.items():
            names = KINDS if division == "kind" else None
            of_group = {
                names[number] if names else band_name(number): finish(*row)
                for number, row in enumerate(sums.tolist())
                if row[0]
            }
            result[division] = next(iter(of_group.values())) if division == EVERY else of_group
        return result


def _added(old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    if old is None:
        return new
    if len(old) < len(new):
        old, new = new, old
    old = old.clone()
    old[: len(new)] += new
    return old


def mean(total: float, count: float) -> float | None:
    """Returns the mean, `None` of nothing, so that a report is JSON."""
    return total / count if count and math.isfinite(total) else None
