"""What it takes to let the student answer before a micro-batch: of `linmu-distill --estimate`, by formula."""

from typing import Any

from ...modeling.mixers import MIXERS
from ..stages import Stage
from .tracing import Shape


def token_flops(text: Any, past: int) -> int:
    """Returns the multiplications and additions of a token in the decoder after `past` others, without the head."""
    mlp = 6 * text.hidden_size * text.intermediate_size
    return sum(MIXERS[kind].flops_per_token(text, past) + mlp for kind in text.layer_types)


def answer_flops(text: Any, shape: Shape) -> tuple[int, int]:
    """
    Returns multiplications and additions of one row: of its prompt, whose last token gives the first of the answer,
    and of the decode steps that follow. Answers are as long as they may be, and a row is no longer than others.
    """
    prompt, head = max(shape.sequence_length - shape.completion, 1), 2 * text.hidden_size * text.vocab_size
    steps = range(prompt, prompt + shape.completion - 1)
    # attention reads half of the prompt on average
    return prompt * token_flops(text, prompt // 2) + head, sum(token_flops(text, past) + head for past in steps)


def count_answers(
    text: Any, stage: Stage, shape: Shape, vision: float, weights: float, rate: float, bandwidth: float
) -> tuple[float, float]:
    """
    Counts multiplications and additions, and seconds, of the student's answers in a micro-batch on average.

    A decode step multiplies little and reads all weights, whatever the number of rows.

    Args:
        text (`LinMUTextConfig`): Of the student.
        stage (`Stage`): For `lmbda`.
        shape (`Shape`): The micro-batch.
        vision (`float`): Multiplications and additions of the vision side for a whole micro-batch.
        weights (`float`): Bytes that a decode step reads.
        rate, bandwidth (`float`): Multiplications and additions, and bytes, per second.
    """
    prompt, steps = answer_flops(text, shape)
    rows = stage.lmbda * shape.batch
    decodes = 1 - (1 - stage.lmbda) ** shape.batch  # share of micro-batches with a row to answer
    reading = decodes * (shape.completion - 1) * weights / bandwidth
    before = rows * prompt + stage.lmbda * vision
    return before + rows * steps, before / rate + max(rows * steps / rate, reading)
