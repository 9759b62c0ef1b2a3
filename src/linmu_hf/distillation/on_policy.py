"""
On-policy rows: the student's own answers in the place of given ones, for the teacher to judge (arXiv:2306.13649).

A student that has learned from given answers alone never sees what follows a token of its own that they lack. Here it
draws the last answer of a row from its own distribution, token by token through its cache, and L_tok compares both
models on these very ids: nothing becomes text in between. No gradient goes through the draws. Rows start at position 0
while they are answered, whatever `position_shift` is: that is where rows start when the student is used, and what it
says there is to be judged.

    code                  paper
    lmbda                 lambda   share of rows with answers of the student
    beta                  beta     of the divergence, see `token_kd_loss`
    sampling_temperature  gamma    of the draws
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from .engines.wrapping import is_sharded
from .losses import IGNORE_INDEX
from .rows.collator import TOKEN_FIELDS, Features, Item
from .stages import Stage
from .targets.decode import generate
from .targets.encode import answer_spans


@dataclass
class OnPolicy:
    """
    A callable that puts the student's answers into the rows of a micro-batch.

    Whether a row gets one, and its draws, depend on the seed, the step and the row's place among those of the step:
    not on the rows beside it, on the number of processes, or on whether the run was resumed.

    Args:
        student (`LinMUForConditionalGeneration`): The student, adapters in place.
        processor (`ProcessorMixin`): Its processor.
        stage (`Stage`): For `lmbda` and `sampling_temperature`.
        max_new_tokens (`int`): Tokens after which an answer is cut. A cut answer has no end token to learn.
        seed (`int`): Decides the draws.
    """

    student: Any
    processor: Any
    stage: Stage
    max_new_tokens: int
    seed: int

    def __call__(self, items: Sequence[Item | None], step: int, place: int) -> list[Item | None]:
        """
        Returns the rows, of which some end with an answer of the student and have labels there alone. Rows that could
        not be read (`None`), have no label, or show a picture after their last answer stay as they are.

        Args:
            items (`Sequence[Item | None]`): From [`DistillCollator.load`].
            step (`int`): Optimizer steps before this one.
            place (`int`): Place of the first row in its step, over all micro-batches and processes.
        """
        prompts: dict[int, Features] = {}
        seeds = []
        for index, item in enumerate(items):
            random = np.random.default_rng((self.seed, step, place + index))
            prompt = cut_last_answer(item["row"]) if item is not None and random.random() < self.stage.lmbda else None
            if prompt is not None:
                prompts[index] = prompt
                seeds.append(int(random.integers(2**63)))
        answered = list(items)
        for (index, prompt), ids in zip(prompts.items(), self._draw(list(prompts.values()), seeds)):
            answered[index] = {"row": append_answer(prompt, ids)}
        return answered

    @torch.no_grad()
    def _draw(self, prompts: Sequence[Features], seeds: Sequence[int]) -> list[list[int]]:
        if not prompts:
            return []
        draws = Draws(seeds, self.stage.sampling_temperature, len(self.processor.tokenizer))
        training = self.student.training
        self.student.eval()
        try:
            return generate(self.student, self.processor, prompts, self.max_new_tokens, draws)
        finally:
            self.student.train(training)


class Draws(LogitsProcessor):
    """
    A logits processor that makes the likeliest token a draw from softmax(logits / temperature), by Gumbel noise. Every
    sequence has random numbers of its own.

    Args:
        seeds (`Sequence[int]`): One for every sequence.
        temperature (`float`): 0 for no noise.
        known (`int`): Tokens of the tokenizer. What pads the vocabulary is not drawn: the teacher may lack it.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, known: int):
        self.seeds, self.temperature, self.known = seeds, temperature, known
        self.generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.known :] = -torch.inf
        if not self.temperature:
            return scores
        if not self.generators:
            self.generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        waits = [torch.empty_like(row).exponential_(generator=own) for row, own in zip(scores, self.generators)]
        return scores / self.temperature - torch.stack(waits).log()


def cut_last_answer(row: Features) -> Features | None:
    """Returns the row up to its last answer, without labels; `None` if there is none, or a picture after it."""
    spans = answer_spans(row["labels"])
    if not spans or row["mm_token_type_ids"][spans[-1][1] :].any():
        return None
    start, _ = spans[-1]
    return {key: value[:start] if key in TOKEN_FIELDS else value for key, value in row.items() if key != "labels"}


def append_answer(prompt: Features, ids: Sequence[int]) -> Features:
    """Returns the prompt [t] with an answer [n] after it, whose tokens are the only labels."""
    said = prompt["input_ids"].new_tensor(ids)
    values = {"input_ids": said, "attention_mask": torch.ones_like(said)}
    row = {
        key: torch.cat([value, values.get(key, torch.zeros_like(said))]) if key in TOKEN_FIELDS else value
        for key, value in prompt.items()
    }
    return {**row, "labels": torch.cat([torch.full_like(prompt["input_ids"], IGNORE_INDEX), said])}


def check_on_policy(config, stages: Sequence[Stage], stored: bool = False) -> None:
    """
    Raises a `ValueError` for the first stage whose student cannot answer, or whose teacher is not there to judge.

    Args:
        config (`DistillConfig`): The arguments.
        stages (`Sequence[Stage]`): The stages.
        stored (`bool`, *optional*, defaults to `False`): Whether stored log-probabilities take the teacher's place.
    """
    for stage in stages:
        for name in ("lmbda", "beta"):
            if stored and getattr(stage, name):
                raise ValueError(
                    f"{stage.name}: {name}={getattr(stage, name)} asks the teacher itself, and pseudo_targets holds "
                    f"its likeliest tokens at given answers alone: make them without --top_k, or set {name}=0"
                )
        if stage.lmbda and is_sharded(config):
            raise ValueError(
                f"{stage.name}: lmbda={stage.lmbda} lets the student generate, which FSDP2 and ZeRO, having taken it "
                "apart, cannot: leave fsdp out, or deepspeed, so that DDP runs, or set lmbda=0"
            )
        if stage.lmbda and config.max_length is not None:
            raise ValueError(
                f"{stage.name}: lmbda={stage.lmbda} gives rows a length that is not known before, so they fill no "
                f"packs of max_length={config.max_length}: leave max_length out, or set lmbda=0"
            )
