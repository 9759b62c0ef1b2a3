"""Runs teacher and student over sequences, one at a time, and compares what they compute."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import cosine_similarity, kl_div, log_softmax

from ...conversion.teacher import check_teacher
from .attention import AttentionMass
from .groups import EVERY, Figures, group_tokens, mean
from .reach import exact_reach


ROWS_OF_LOGITS = 512  # that are held at a time


@dataclass
class LayerFigures:
    """The sums of one layer."""

    teacher_fed: Figures = field(default_factory=lambda: Figures(("wrong", "size", "cosine")))
    own_path: Figures = field(default_factory=lambda: Figures(("wrong", "size", "cosine")))
    attention: AttentionMass = field(default_factory=AttentionMass)
    far: Figures = field(default_factory=lambda: Figures(("far", "near")))
    shares: dict[str, list[torch.Tensor]] = field(default_factory=dict)


class Fidelity:
    """
    A comparison of a student with the teacher that it was converted from.

    Args:
        student, teacher (`LinMUForConditionalGeneration`): The teacher as [`load_teacher`] returns it.

    Raises:
        `ValueError`: A layer of the teacher does not keep attention.
    """

    def __init__(self, student, teacher):
        self.student, self.teacher = student, teacher
        self.text = student.model.language_model
        check_teacher(teacher.config)
        self.layers = [LayerFigures() for _ in self.text.layers]
        self.logits = Figures(("kl", "same"))
        self.sequences = self.tokens = 0

    @torch.no_grad()
    def add(self, batch: Mapping[str, torch.Tensor]) -> None:
        """
        Adds one sequence.

        Args:
            batch (`Mapping[str, torch.Tensor]`): Model inputs of one row without padding; labels are passed over.
        """
        device = self.text.embed_tokens.weight.device
        batch = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
            if name not in ("labels", "attention_mask")
        }
        (_, t), types = batch["input_ids"].shape, self.student.model.token_types(batch["input_ids"])[0]
        grids = {name: value for name, value in batch.items() if name not in ("input_ids", "pixel_values")}
        positions, vision_layout = self.student.model.get_positions(batch["input_ids"], None, **grids)
        given = {"position_ids": positions, "vision_layout": vision_layout, "use_cache": False}
        known, own = (
            model.model(**batch, **given, output_mixer_states=True) for model in (self.teacher, self.student)
        )
        groups = group_tokens(types)
        self.sequences, self.tokens = self.sequences + 1, self.tokens + t
        rope, layout, attention = self.text.prepare(known.mixer_inputs[0], None, positions, vision_layout)
        for index, (layer, figures) in enumerate(zip(self.text.layers, self.layers)):
            mixer_input, target = known.mixer_inputs[index], known.mixer_outputs[index]
            _compare(figures.own_path, groups, own.mixer_outputs[index], target)
            reach = exact_reach(self.text.config, index, layout, vision_layout, t)
            theirs = self.teacher.model.language_model.layers[index].mixer
            figures.attention.add(theirs, mixer_input, rope, reach, groups)
            _compare(figures.teacher_fed, groups, layer.mix(mixer_input, rope, layout, attention), target)
            if layer.recurrent:
                _add_branches(figures, groups, layer.mixer, mixer_input, rope, layout, types)
        for some in torch.arange(t, device=device).split(ROWS_OF_LOGITS):
            ours, known_logits = (
                model.lm_head(states.last_hidden_state[0, some]).float()
                for model, states in ((self.student, own), (self.teacher, known))
            )
            self._compare_logits({name: group[some] for name, group in groups.items()}, ours, known_logits)

    def _compare_logits(self, groups, ours, theirs) -> None:
        size = min(ours.shape[-1], theirs.shape[-1])  # a vocabulary may be padded
        ours, theirs = (log_softmax(logits[:, :size], dim=-1) for logits in (ours, theirs))
        kl = kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
        self.logits.add(groups, kl, (ours.argmax(-1) == theirs.argmax(-1)).to(kl.dtype))

    def report(self) -> dict[str, Any]:
        """
        Returns the figures of all that was added.

        Returns:
            `dict`: `layers`, each with the relative squared error of its mixer's output, `teacher_fed` and on its
            `own_path`, with the mean cosine, the teacher's `attention`, and the `branches`; and `logits`, with the KL
            of the teacher to the student in nats, and the share of tokens with the same first choice.
        """

        def output(tokens, wrong, size, cosine):
            return {"tokens": int(tokens), "error": mean(wrong, size), "cosine": mean(cosine, tokens)}

        def logits(tokens, kl, same):
            return {"tokens": int(tokens), "kl": mean(kl, tokens), "agreement": mean(same, tokens)}

        layers = []
        for index, each in enumerate(self.layers):
            layer = {"layer": index, "mixer": self.text.config.layer_types[index]}
            layer["teacher_fed"] = each.teacher_fed.report(output)
            layer["own_path"] = each.own_path.report(output)
            layer["attention"] = each.attention.report()
            if each.shares:
                layer["branches"] = _report_branches(each)
            layers.append(layer)
        return {
            "sequences": self.sequences,
            "tokens": self.tokens,
            "layers": layers,
            "logits": self.logits.report(logits),
        }


def measure(student, teacher, batches: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, Any]:
    """Returns the report of [`Fidelity`] over batches of one sequence each."""
    fidelity = Fidelity(student, teacher)
    for batch in batches:
        fidelity.add(batch)
    return fidelity.report()


def _compare(figures: Figures, groups, ours, theirs) -> None:
    ours, theirs = ours[0].double(), theirs[0].double()
    wrong, size = (ours - theirs).square().sum(-1), theirs.square().sum(-1)
    figures.add(groups, wrong, size, cosine_similarity(ours, theirs, dim=-1))


def _add_branches(figures: LayerFigures, groups, mixer, mixer_input, rope, layout, types) -> None:
    """How much of the output is of either branch: lambda, and the norms of both after their output maps."""
    flex, near, share = mixer.parts(mixer_input, rope, layout)
    if near is None:
        near, share = torch.zeros_like(flex), torch.ones_like(flex[:, :1, :1])
    sizes = [
        proj.o_proj((part * weight).flatten(1)).float().norm(dim=-1)
        for proj, part, weight in ((mixer.flex_ma, flex, share), (mixer.local_swin, near, 1 - share))
    ]
    figures.far.add({EVERY: groups[EVERY], "kind": groups["kind"]}, *sizes)
    for name, is_kind in (("text", types == 0), ("vision", types > 0)):
        if bool(is_kind.any()):
            figures.shares.setdefault(name, []).append(share[is_kind, :, 0].double().cpu())


def _report_branches(figures: LayerFigures) -> dict[str, Any]:
    far = figures.far.report(lambda tokens, far, near: mean(far, far + near))
    shares = {name: torch.cat(shares).mean(0).tolist() for name, shares in figures.shares.items()}
    return {"lambda": shares, "far": far}
