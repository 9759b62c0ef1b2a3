"""How the teacher's attention is distributed over distances, and how much of it a student can take exactly."""

from dataclasses import dataclass, field

import torch

from ...modeling.mixers.projection import rotate
from .groups import Figures, band, band_name, mean


QUERIES = 256  # of which the weights are held at a time


@dataclass
class AttentionMass:
    """Sums of the teacher's attention weights of one layer: by the distance of the key, and by head."""

    figures: Figures = field(default_factory=lambda: Figures(("exact",)))
    by_distance: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.float64))
    by_head: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def add(self, attention, mixer_input, rope, reach, groups) -> None:
        """
        Adds one sequence.

        Args:
            attention (`nn.Module`): The teacher's, with `q_proj` and `k_proj`.
            mixer_input (`torch.Tensor` of shape `[1, t, d]`): Its input.
            rope (`tuple[torch.Tensor, torch.Tensor]`): cos and sin, each `[1, t, p]`.
            reach (`torch.BoolTensor` of shape `[t, t]`): What the student sees exactly: [`exact_reach`].
            groups (`dict[str, torch.LongTensor]`): From [`group_tokens`].
        """
        tokens, rope = mixer_input[0], tuple(table[0] for table in rope)
        q, k = (
            rotate(proj(tokens).unflatten(-1, (-1, attention.head_dim)), rope).float().transpose(0, 1)
            for proj in (attention.q_proj, attention.k_proj)
        )
        k = k.repeat_interleave(len(q) // len(k), dim=0)  # [h, t, p]
        t = len(tokens)
        place = torch.arange(t, device=tokens.device)
        exact = []
        for some in place.split(QUERIES):
            distance = some[:, None] - place
            scores = q[:, some] @ k.transpose(-1, -2) * attention.head_dim**-0.5
            weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
            seen = weights * reach[some].to(weights.device)
            exact.append(seen.sum(-1))
            both = torch.stack([weights.mean(0), seen.mean(0)], dim=-1).double().flatten(0, 1).cpu()
            bands = band(distance.clamp_min(0)).flatten().cpu()
            size = max(int(bands.max()) + 1, len(self.by_distance))
            found = both.new_zeros(size, 2).index_add(0, bands, both)
            found[: len(self.by_distance)] += self.by_distance
            self.by_distance = found
        by_token = torch.cat(exact, dim=1)  # [h, t]
        self.by_head = self.by_head + by_token.sum(1).double().cpu()
        self.figures.add(groups, by_token.mean(0))

    def report(self) -> dict:
        """Returns shares of the teacher's attention: of every group of queries, head, and distance of the key."""
        total = float(self.by_distance[:, 0].sum())
        result = self.figures.report(lambda tokens, exact: {"tokens": int(tokens), "exact": mean(exact, tokens)})
        tokens = result["all"]["tokens"]
        return {
            **result,
            "heads": [mean(each, tokens) for each in self.by_head.tolist()],
            "distance": {
                band_name(number): {"mass": mass / total, "exact": exact / total}
                for number, (mass, exact) in enumerate(self.by_distance.tolist())
            },
        }
