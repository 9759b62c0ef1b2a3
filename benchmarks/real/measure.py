"""
How far a student is from its teacher on rows of text, without an answer key.

    figure          meaning
    perplexity      exp of the mean of -log p of the next token
    kl              KL(teacher || student) per token, in nats
    agreement       share of tokens at which both prefer the same next token
    by position     kl and agreement at positions 0-31, 32-63, ... of a row
    by distance     agreement, by how far back the pair (this token, next token) was last seen; `new` if it was not
    layers          |student - teacher|^2 / |teacher|^2 of the mixer outputs without a row's first token:
                    `teacher_fed` with the teacher's input of that layer, `own_path` with the student's own

Sums are taken in float32 over chunks of positions, so that the logits of a whole row never exist.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from linmu_hf.distillation.losses import squared_errors
from linmu_hf.modeling.mixers import recurrent_layers


EDGES = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
CHUNK = 256


@torch.no_grad()
def evaluate(student, teacher, rows: Sequence[Tensor], kinds: Sequence[str] | None = None) -> dict[str, Any]:
    """
    Compares a student with its teacher on rows of tokens.

    Args:
        student (`LinMUForConditionalGeneration`): a converted model; the teacher itself gives the teacher's figures.
        teacher (`LinMUForConditionalGeneration`): from `linmu_hf.conversion.teacher.load_teacher`.
        rows (`Sequence[Tensor]`): token ids, [t] each.
        kinds (`Sequence[str]`, *optional*): a name for every row, to have the figures of each kind too.

    Returns:
        `dict`: `perplexity`, `perplexity_teacher`, `kl`, `agreement`, `tokens`, and the same by `kind`, by `position`
        and by `distance`, and `layers`: dict of layer to `teacher_fed` and `own_path`.
    """
    replaced = recurrent_layers(student.config.text_config.layer_types)
    total, kind_sums = Sums(), {}
    positions, distances = {}, {}
    fed, own, energy = (torch.zeros(len(replaced)) for _ in range(3))
    for number, row in enumerate(tqdm(rows, desc="comparing", unit="row", leave=False)):
        ids = row[None]
        known = teacher.model(input_ids=ids, use_cache=False, output_mixer_states=True)
        if student is teacher:
            answer = known
        else:
            answer = student.model(input_ids=ids, use_cache=False, output_mixer_states=True)
        if student is not teacher and replaced:
            errors = layer_errors(student, known, answer, replaced)
            fed, own, energy = fed + errors[0], own + errors[1], energy + errors[2]
        values = token_values(student, teacher, answer.last_hidden_state[0], known.last_hidden_state[0], row)
        total.add(values)
        if kinds is not None:
            kind_sums.setdefault(kinds[number], Sums()).add(values)
        for sums, labels in ((positions, bins(torch.arange(len(row) - 1))), (distances, bins(pair_distances(row)))):
            for label in sorted(set(labels)):
                chosen = torch.tensor([each == label for each in labels])
                sums.setdefault(label, Sums()).add(values[:, chosen])
    ordered = [*labels_in_order(), "new"]
    return {
        **total.figures(),
        "tokens": total.count,
        "by_kind": {kind: sums.figures() for kind, sums in kind_sums.items()},
        "by_position": {label: positions[label].figures() for label in ordered if label in positions},
        "by_distance": {label: distances[label].figures() for label in ordered if label in distances},
        "layers": {
            layer: {"teacher_fed": float(fed[i] / energy[i]), "own_path": float(own[i] / energy[i])}
            for i, layer in enumerate(replaced)
            if student is not teacher
        },
    }


def layer_errors(student, known, answer, replaced: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns, for every replaced layer, the squared errors fed by the teacher and on the own path, and the energy."""
    t = known.last_hidden_state.shape[1]
    mask = torch.ones(1, t)
    mask[:, 0] = 0  # its states are a hundred times as large as all others
    positions = torch.arange(t)[None]
    alone = student.model.language_model.run_mixers(known.mixer_inputs, position_ids=positions)
    targets = [known.mixer_outputs[layer] for layer in replaced]
    fed, energy = squared_errors([alone[layer] for layer in replaced], targets, mask)
    own, _ = squared_errors([answer.mixer_outputs[layer] for layer in replaced], targets, mask)
    return fed, own, energy


def token_values(student, teacher, student_hidden: Tensor, teacher_hidden: Tensor, row: Tensor) -> Tensor:
    """Returns [4, t - 1]: -log p of the next token for student and teacher, KL, and 1 where both prefer the same."""
    values = []
    for start in range(0, len(row) - 1, CHUNK):
        here = slice(start, min(start + CHUNK, len(row) - 1))
        ours = F.log_softmax(student.lm_head(student_hidden[here]).float(), dim=-1)
        theirs = F.log_softmax(teacher.lm_head(teacher_hidden[here]).float(), dim=-1)
        following = row[here.start + 1 : here.stop + 1, None]
        kl = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        same = (ours.argmax(-1) == theirs.argmax(-1)).float()
        values.append(torch.stack([-ours.gather(1, following)[:, 0], -theirs.gather(1, following)[:, 0], kl, same]))
    return torch.cat(values, dim=1)


class Sums:
    """Sums of [`token_values`] over tokens."""

    def __init__(self) -> None:
        self.sums, self.count = torch.zeros(4, dtype=torch.float64), 0

    def add(self, values: Tensor) -> None:
        self.sums += values.double().sum(1)
        self.count += values.shape[1]

    def figures(self) -> dict[str, float]:
        ours, theirs, kl, same = (self.sums / max(self.count, 1)).tolist()
        # clipped: a student that is wrong by hundreds of nats would overflow
        return {
            "perplexity": math.exp(min(ours, 100)),
            "perplexity_teacher": math.exp(min(theirs, 100)),
            "kl": kl,
            "agreement": same,
        }


def pair_distances(row: Tensor) -> Tensor:
    """Returns [t - 1]: how far back the pair (token i, token i + 1) was last seen, -1 if it was not."""
    seen: dict[tuple[int, int], int] = {}
    distances = []
    for i, pair in enumerate(zip(row[:-1].tolist(), row[1:].tolist(), strict=True)):
        distances.append(i - seen[pair] if pair in seen else -1)
        seen[pair] = i
    return torch.tensor(distances)


def bins(values: Tensor) -> list[str]:
    """Returns the label of every position or distance, such as `32-63`; `new` for -1."""
    labels = labels_in_order()
    places = torch.bucketize(values, torch.tensor(EDGES), right=True) - 1
    return ["new" if place < 0 else labels[place] for place in places.tolist()]


def labels_in_order() -> list[str]:
    return [f"{low}-{high - 1}" for low, high in pairwise(EDGES)] + [f"{EDGES[-1]}-"]
