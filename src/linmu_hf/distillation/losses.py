"""
The distillation losses.

    code                              paper
    student_outputs, teacher_outputs  h^S, h^T   mixer outputs before the residual sum, [b, t, d] per replaced layer
    student_hidden, teacher_hidden    -          states in front of the `lm_head` at counted positions, [n, d]
    temperature                       tau
    num_tokens                        N          real tokens of the global batch
    num_items                         T          answer tokens of the global batch
    hidden_loss                       Eq. 6
    token_kd_loss                     Eq. 7
    cross_entropy_loss                Eq. 8 on teacher-decoded targets, Eq. 9 on the ground truth

Every loss is a sum over what it counts, divided by the count of the *global* batch, so that the losses of the
micro-batches of one optimizer step add up to the loss of the whole batch. All sums are taken in fp32.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


IGNORE_INDEX = -100
Head = Callable[[Tensor], Tensor]


def next_token_targets(labels: Tensor) -> Tensor:
    """Moves `labels` [b, t] one step left: entry i is the token to predict after token i, -100 if uncounted."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def squared_errors(
    student_outputs: Sequence[Tensor], teacher_outputs: Sequence[Tensor], attention_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """
    Returns per layer the squared error of the student's mixer output and the squared norm of the teacher's, summed
    over the real tokens.

    Args:
        student_outputs, teacher_outputs (sequences of `Tensor`): [b, t, d] for each replaced layer.
        attention_mask (`Tensor`): [b, t], zero at padding.

    Returns:
        `tuple[Tensor, Tensor]`: errors and energies, both [l] in fp32. Their ratio is the layer's relative error: 1
        for a student that outputs zeros.
    """
    mask = attention_mask.float()
    errors, energies = [], []
    for student, teacher in zip(student_outputs, teacher_outputs, strict=True):
        teacher = teacher.float()
        errors.append((student.float() - teacher).square().sum(-1).mul(mask).sum())
        energies.append(teacher.square().sum(-1).mul(mask).sum())
    return torch.stack(errors), torch.stack(energies)


def hidden_loss(errors: Tensor, num_tokens: Tensor | float) -> Tensor:
    """
    Returns the hidden loss (Eq. 6): squared error summed over the width, mean over real tokens and replaced layers.

    Args:
        errors (`Tensor`): [l], from [`squared_errors`].
        num_tokens (`Tensor` or `float`): real tokens of the global batch.
    """
    return (errors / num_tokens).mean()


def token_kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, num_items: Tensor | float, temperature: float = 1.0
) -> Tensor:
    """Returns the token-level loss (Eq. 7) on logits [n, v]: tau^2 KL(teacher || student), over `num_items`."""
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="sum", log_target=True) / num_items


def cross_entropy_loss(logits: Tensor, targets: Tensor, num_items: Tensor | float) -> Tensor:
    """Returns the cross-entropy of logits [n, v] against targets [n] (Eq. 8 and 9), without -100, over `num_items`."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="sum") / num_items


def output_losses(
    student_hidden: Tensor,
    student_head: Head,
    targets: dict[str, Tensor],
    num_items: dict[str, Tensor | float],
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> dict[str, Tensor]:
    """
    Computes all losses on the logits, one chunk of positions at a time: logits of a whole sequence never exist.

    Args:
        student_hidden (`Tensor`): [n, d], states in front of `student_head` at the counted positions.
        student_head (`Callable`): maps [n, d] to logits [n, v].
        targets (`dict[str, Tensor]`):
            [n] for each wanted loss: `"tok"` and `"sup"` the ground truth, `"seq"` the teacher-decoded targets. A loss
            counts the positions at which its targets are not -100.
        num_items (`dict[str, Tensor | float]`): counted positions of the global batch, by the same keys.
        teacher_hidden (`Tensor`, *optional*): [n, d], for `"tok"`.
        teacher_head (`Callable`, *optional*): the teacher's head, for `"tok"`.
        temperature (`float`, *optional*, defaults to 1.0): tau of Eq. 7.
        chunk_size (`int`, *optional*, defaults to 1024): positions whose logits exist at a time.

    Returns:
        `dict[str, Tensor]`: the losses by the keys of `targets`, and with `"tok"` also `"agreement"`: the share of
        counted positions at which student and teacher prefer the same token.
    """

    def chunk_losses(student_hidden, teacher_hidden, targets):
        logits = student_head(student_hidden)
        losses = {key: cross_entropy_loss(logits, targets[key], num_items[key]) for key in targets if key != "tok"}
        if "tok" in targets:
            assert teacher_head is not None
            counted = targets["tok"] != IGNORE_INDEX
            with torch.no_grad():
                teacher_logits = teacher_head(teacher_hidden)[counted]
            logits = logits[counted]
            losses["tok"] = token_kd_loss(logits, teacher_logits, num_items["tok"], temperature)
            same = logits.detach().argmax(-1) == teacher_logits.argmax(-1)
            losses["agreement"] = same.sum() / num_items["tok"]
        return losses

    n = student_hidden.shape[0]
    if n <= chunk_size:
        return chunk_losses(student_hidden, teacher_hidden, targets)
    total: dict[str, Tensor] = {}
    for start in range(0, n, chunk_size):
        cut = slice(start, start + chunk_size)
        teacher_chunk = None if teacher_hidden is None else teacher_hidden[cut]
        # Checkpointed, or the backward pass would keep the logits of all chunks.
        losses = checkpoint(
            chunk_losses,
            student_hidden[cut],
            teacher_chunk,
            {key: value[cut] for key, value in targets.items()},
            use_reentrant=False,
        )
        total = {key: total.get(key, 0.0) + value for key, value in losses.items()}
    return total
