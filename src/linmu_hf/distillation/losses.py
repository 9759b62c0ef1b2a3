"""
The distillation losses.

    code                              paper
    student_outputs, teacher_outputs  h^S, h^T   mixer outputs before the residual sum, [b, t, d] per replaced layer
    student_hidden, teacher_hidden    -          states in front of the `lm_head` at counted positions, [n, d]
    temperature                       tau
    beta                              -          of the generalised Jensen-Shannon divergence, arXiv:2306.13649, Eq. 1
    num_tokens                        N          real tokens of the global batch
    num_items                         T          answer tokens of the global batch
    hidden_loss                       Eq. 6
    token_kd_loss                     Eq. 7 with beta 0
    topk_kd_loss                      Eq. 7 on the teacher's k likeliest tokens and their complement
    cross_entropy_loss                Eq. 8 on teacher-decoded targets, Eq. 9 on the ground truth

Every loss is a sum over what it counts, divided by the count of the *global* batch, so that the losses of the
micro-batches of one optimizer step add up to the loss of the whole batch. Logits and sums are in fp32.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .float32_logits import Float32Logits


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
    student_logits: Tensor,
    teacher_logits: Tensor,
    num_items: Tensor | float,
    temperature: float = 1.0,
    beta: float = 0.0,
) -> Tensor:
    """
    Returns the token-level loss on logits [n, v]: tau^2 times the divergence of each token, over `num_items`.

    With `beta=0` this is KL(teacher || student), Eq. 7; with `beta=1` the reverse, KL(student || teacher); between
    them beta KL(teacher || m) + (1 - beta) KL(student || m) of the mixture m = beta teacher + (1 - beta) student, as
    TRL has it.
    """
    student = F.log_softmax(_full(student_logits) / temperature, dim=-1)
    teacher = F.log_softmax(_full(teacher_logits) / temperature, dim=-1)
    if beta in (0, 1):
        divergence = _kl(student, teacher) if beta else _kl(teacher, student)
    else:
        mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
        divergence = beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)
    return temperature**2 * divergence / num_items


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [n, v], summed over n."""
    return F.kl_div(q, p, reduction="sum", log_target=True)


def topk_kd_loss(
    student_logits: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    num_items: Tensor | float,
    temperature: float = 1.0,
    beta: float = 0.0,
) -> Tensor:
    """
    Returns the token-level loss (Eq. 7) where only the teacher's k likeliest tokens are known.

    It is the KL divergence over k + 1 events: these tokens, and any other token as one event, whose probability is
    what the k leave, in the teacher and in the student. Nothing is renormalised: the student is not told to say
    nothing else, and how it divides the rest is free. It is never above the divergence over all tokens, and equal to
    it if k = v.

    Args:
        student_logits (`Tensor`): [n, v].
        ids (`Tensor`): [n, k], different tokens in each row.
        logprobs (`Tensor`): [n, k], the teacher's log-probabilities of these over its whole vocabulary.
        num_items (`Tensor` or `float`): answer tokens of the global batch.
        temperature (`float`, *optional*, defaults to 1.0): must be 1, see below.
        beta (`float`, *optional*, defaults to 0.0): must be 0, see below.

    Raises:
        `ValueError`: At another temperature, or with another `beta`, the missing tokens would count by logits that
            nobody stored.
    """
    for name, value, plain in (("temperature", temperature, 1), ("beta", beta, 0)):
        if value != plain:
            raise ValueError(
                f"{name}={value} needs the teacher's whole distribution, not its {ids.shape[-1]} likeliest tokens: "
                f"set {name} to {plain}, or give no stored log-probabilities, so that the teacher itself is asked"
            )
    student_logits, logprobs, ids = _full(student_logits), _full(logprobs), ids.long()
    normaliser = student_logits.logsumexp(-1)  # [n]
    student = student_logits.gather(-1, ids) - normaliser[:, None]
    divergence = (logprobs.exp() * (logprobs - student)).sum()
    if ids.shape[-1] < student_logits.shape[-1]:
        tail = (1 - logprobs.double().exp().sum(-1)).clamp_min(0).to(logprobs.dtype)  # [n]
        rest = student_logits.scatter(-1, ids, -torch.inf).logsumexp(-1) - normaliser
        divergence = divergence + (torch.xlogy(tail, tail) - tail * rest).sum()
    return divergence / num_items


def cross_entropy_loss(logits: Tensor, targets: Tensor, num_items: Tensor | float) -> Tensor:
    """Returns the cross-entropy of logits [n, v] against targets [n] (Eq. 8 and 9), without -100, over `num_items`."""
    return F.cross_entropy(_full(logits), targets, ignore_index=IGNORE_INDEX, reduction="sum") / num_items


def output_losses(
    student_hidden: Tensor,
    student_head: Head,
    targets: dict[str, Tensor],
    num_items: dict[str, Tensor | float],
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    topk_ids: Tensor | None = None,
    topk_logprobs: Tensor | None = None,
    temperature: float = 1.0,
    beta: float = 0.0,
    chunk_size: int = 1024,
) -> dict[str, Tensor]:
    """
    Computes all losses on the logits, one chunk of positions at a time: logits of a whole sequence never exist.

    Heads are called as they are, within [`Float32Logits`]: in half precision their products come in fp32.

    Args:
        student_hidden (`Tensor`): [n, d], states in front of `student_head` at the counted positions.
        student_head (`Callable`): maps [n, d] to logits [n, v].
        targets (`dict[str, Tensor]`):
            [n] for each wanted loss: `"tok"` and `"sup"` the ground truth, `"seq"` the teacher-decoded targets. A loss
            counts the positions at which its targets are not -100.
        num_items (`dict[str, Tensor | float]`): counted positions of the global batch, by the same keys.
        teacher_hidden (`Tensor`, *optional*): [n, d], for `"tok"`.
        teacher_head (`Callable`, *optional*): the teacher's head, for `"tok"`.
        topk_ids, topk_logprobs (`Tensor`, *optional*):
            [n, k], for `"tok"` in place of the teacher: its likeliest tokens, the likeliest first, see
            [`topk_kd_loss`].
        temperature (`float`, *optional*, defaults to 1.0): tau of Eq. 7.
        beta (`float`, *optional*, defaults to 0.0): Which divergence `"tok"` is, see [`token_kd_loss`].
        chunk_size (`int`, *optional*, defaults to 1024): positions whose logits exist at a time.

    Returns:
        `dict[str, Tensor]`: the losses by the keys of `targets`, and with `"tok"` also `"agreement"`: the share of
        counted positions at which student and teacher prefer the same token.
    """

    def chunk_losses(student_hidden, teacher, targets):
        with Float32Logits():
            logits = student_head(student_hidden)
        losses = {key: cross_entropy_loss(logits, targets[key], num_items[key]) for key in targets if key != "tok"}
        if "tok" in targets:
            counted = targets["tok"] != IGNORE_INDEX
            logits = logits[counted]
            if "hidden" in teacher:
                assert teacher_head is not None
                with torch.no_grad(), Float32Logits():
                    teacher_logits = teacher_head(teacher["hidden"])[counted]
                common = min(logits.shape[-1], teacher_logits.shape[-1])  # each may be padded in its own way
                logits, teacher_logits = logits[:, :common], teacher_logits[:, :common]
                losses["tok"] = token_kd_loss(logits, teacher_logits, num_items["tok"], temperature, beta)
                preferred = teacher_logits.argmax(-1)
            else:
                ids, logprobs = teacher["ids"][counted], teacher["logprobs"][counted]
                losses["tok"] = topk_kd_loss(logits, ids, logprobs, num_items["tok"], temperature, beta)
                preferred = ids[:, 0]
            losses["agreement"] = (logits.detach().argmax(-1) == preferred).sum() / num_items["tok"]
        return losses

    given = {"hidden": teacher_hidden, "ids": topk_ids, "logprobs": topk_logprobs}
    teacher = {key: value for key, value in given.items() if value is not None}
    n = student_hidden.shape[0]
    if n <= chunk_size:
        return chunk_losses(student_hidden, teacher, targets)
    total: dict[str, Tensor] = {}
    for start in range(0, n, chunk_size):
        cut = slice(start, start + chunk_size)
        # Checkpointed, or the backward pass would keep the logits of all chunks.
        losses = checkpoint(
            chunk_losses,
            student_hidden[cut],
            {key: value[cut] for key, value in teacher.items()},
            {key: value[cut] for key, value in targets.items()},
            use_reentrant=False,
        )
        total = {key: total.get(key, 0.0) + value for key, value in losses.items()}
    return total


def _full(values: Tensor) -> Tensor:
    """Half precision as fp32, and the others as they are."""
    return values.float() if values.dtype.itemsize < 4 else values
