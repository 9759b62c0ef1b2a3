from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from linmu_hf.distillation.losses import (
    IGNORE_INDEX,
    cross_entropy_loss,
    hidden_loss,
    next_token_targets,
    output_losses,
    squared_errors,
    token_kd_loss,
    topk_kd_loss,
)


pytestmark = pytest.mark.core_training

B, T, D, V, L = 3, 7, 5, 11, 4


def randn(*shape, requires_grad=False):
    return torch.randn(*shape, dtype=torch.float64).float().requires_grad_(requires_grad)


@pytest.fixture
def mask():
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, 5:] = 0
    mask[2, 2:] = 0
    return mask


def test_hidden_loss_is_equation_6(mask):
    student, teacher = [randn(B, T, D) for _ in range(L)], [randn(B, T, D) for _ in range(L)]
    expected = 0.0
    for s, t in zip(student, teacher):
        per_token = [(s[i, j] - t[i, j]).square().sum() for i in range(B) for j in range(T) if mask[i, j]]
        expected += torch.stack(per_token).mean() / L
    torch.testing.assert_close(hidden_loss(squared_errors(student, teacher, mask)[0], mask.sum()), expected)


def test_hidden_loss_ignores_padding_in_value_and_gradient(mask):
    student, teacher = randn(B, T, D, requires_grad=True), randn(B, T, D)
    loss = hidden_loss(squared_errors([student], [teacher], mask)[0], mask.sum())
    loss.backward()
    assert (student.grad[mask == 0] == 0).all() and (student.grad[mask == 1] != 0).all()
    with torch.no_grad():
        student[mask == 0] += 100.0
    torch.testing.assert_close(hidden_loss(squared_errors([student], [teacher], mask)[0], mask.sum()), loss)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_token_kd_is_equation_7(temperature):
    student, teacher = randn(6, V, requires_grad=True), randn(6, V)
    p_teacher, p_student = (F.softmax(z / temperature, dim=-1) for z in (teacher, student))
    expected = temperature**2 / 6 * (p_teacher * (p_teacher / p_student).log()).sum()
    (expected_grad,) = torch.autograd.grad(expected, student)
    loss = token_kd_loss(student, teacher, 6, temperature)
    (grad,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert token_kd_loss(teacher, teacher, 6, temperature).abs() < 1e-6


def test_cross_entropy_counts_labels_only():
    logits, targets = randn(6, V), torch.tensor([1, IGNORE_INDEX, 3, 3, IGNORE_INDEX, 0])
    expected = -F.log_softmax(logits, -1)[[0, 2, 3, 5], [1, 3, 3, 0]].sum() / 4
    torch.testing.assert_close(cross_entropy_loss(logits, targets, 4), expected)


def test_targets_are_the_next_tokens_labels():
    labels = torch.tensor([[IGNORE_INDEX, 5, 6, IGNORE_INDEX, 7]])
    assert next_token_targets(labels).tolist() == [[5, 6, IGNORE_INDEX, 7, IGNORE_INDEX]]


@pytest.mark.parametrize("chunk_size", [1, 4, 5])
def test_chunked_output_losses_equal_unchunked(chunk_size):
    n = 13
    student_hidden, teacher_hidden = randn(n, D, requires_grad=True), randn(n, D)
    student_weight, teacher_weight = randn(V, D, requires_grad=True), randn(V, D)
    truth, pseudo = torch.randint(0, V, (n,)), torch.randint(0, V, (n,))
    truth[3:6], pseudo[8:] = IGNORE_INDEX, IGNORE_INDEX

    def run(size):
        return output_losses(
            student_hidden,
            lambda x: x @ student_weight.T,
            {"tok": truth, "sup": truth, "seq": pseudo},
            {"tok": 10, "sup": 10, "seq": 8},
            teacher_hidden=teacher_hidden,
            teacher_head=lambda x: x @ teacher_weight.T,
            temperature=2.0,
            chunk_size=size,
        )

    whole, chunked = run(1000), run(chunk_size)
    kept = truth != IGNORE_INDEX
    student_logits, teacher_logits = student_hidden @ student_weight.T, teacher_hidden @ teacher_weight.T
    torch.testing.assert_close(whole["tok"], token_kd_loss(student_logits[kept], teacher_logits[kept], 10, 2.0))
    torch.testing.assert_close(whole["sup"], F.cross_entropy(student_logits, truth))
    torch.testing.assert_close(whole["seq"], F.cross_entropy(student_logits, pseudo))
    same = (student_logits.argmax(-1) == teacher_logits.argmax(-1))[kept]
    torch.testing.assert_close(whole["agreement"], same.float().mean())
    torch.testing.assert_close(chunked, whole)
    losses = [sum(out[key] for key in ("tok", "sup", "seq")) for out in (whole, chunked)]
    grads = [torch.autograd.grad(loss, (student_hidden, student_weight)) for loss in losses]
    torch.testing.assert_close(grads[1], grads[0])


def test_micro_batches_add_up_to_the_whole(mask):
    """What gradient accumulation relies on, with micro-batches of unequal numbers of tokens."""
    student, teacher = [randn(B, T, D)], [randn(B, T, D)]
    whole = hidden_loss(squared_errors(student, teacher, mask)[0], mask.sum())
    parts = [
        hidden_loss(squared_errors([student[0][i : i + 1]], [teacher[0][i : i + 1]], mask[i : i + 1])[0], mask.sum())
        for i in range(B)
    ]
    torch.testing.assert_close(sum(parts), whole)


def topk_of(teacher_logits, k):
    logprobs, ids = F.log_softmax(teacher_logits, -1).topk(k)
    return ids.int(), logprobs


def test_topk_kd_is_the_divergence_of_k_plus_one_events():
    student, teacher = torch.randn(6, V).double().requires_grad_(), 2 * torch.randn(6, V).double()
    ids, logprobs = topk_of(teacher, 3)
    expected = 0.0
    for row in range(6):
        p, q = teacher[row].softmax(-1), student[row].softmax(-1)
        chosen = ids[row].tolist()
        others = [token for token in range(V) if token not in chosen]
        events = [(p[token], q[token]) for token in chosen] + [(p[others].sum(), q[others].sum())]
        expected = expected + sum(a * (a / b).log() for a, b in events) / 4
    loss = topk_kd_loss(student, ids, logprobs, 4)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(expected, student))
    assert torch.autograd.gradcheck(lambda x: topk_kd_loss(x, ids, logprobs, 4), student)


def test_topk_kd_grows_with_k_up_to_the_whole_divergence():
    student, teacher = randn(6, V, requires_grad=True), 2 * randn(6, V)
    whole = token_kd_loss(student, teacher, 6)
    losses = [topk_kd_loss(student, *topk_of(teacher, k), 6) for k in range(1, V + 1)]
    assert all(0 <= fewer <= more * (1 + 1e-5) for fewer, more in pairwise(losses))
    torch.testing.assert_close(losses[-1], whole)
    torch.testing.assert_close(torch.autograd.grad(losses[-1], student), torch.autograd.grad(whole, student))
    (grad,) = torch.autograd.grad(losses[2], student)
    assert grad.isfinite().all()


def test_topk_kd_of_a_certain_teacher_is_finite():
    """All mass in the k: the tail is an event of probability zero, and costs nothing."""
    teacher = torch.full((2, V), -200.0).index_fill(1, torch.tensor([3]), 0.0)
    student = randn(2, V, requires_grad=True)
    loss = topk_kd_loss(student, *topk_of(teacher, 2), 2)
    torch.testing.assert_close(loss, F.cross_entropy(student, torch.tensor([3, 3])))
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


def test_topk_kd_refuses_another_temperature():
    with pytest.raises(ValueError, match=r"temperature=2.0 needs .* not its 3 likeliest tokens: set temperature to 1"):
        topk_kd_loss(randn(2, V), *topk_of(randn(2, V), 3), 2, 2.0)


@pytest.mark.parametrize("chunk_size", [4, 100])
def test_stored_log_probabilities_take_the_teachers_place(chunk_size):
    n = 9
    student_hidden, teacher_hidden, weight = randn(n, D, requires_grad=True), randn(n, D), randn(V, D)
    truth = torch.randint(0, V, (n,))
    truth[2:5] = IGNORE_INDEX
    ids, logprobs = topk_of(teacher_hidden @ weight.T, V)
    ids[2:5], logprobs[2:5] = 0, 0.0  # as the collator pads
    student = (student_hidden, lambda x: x @ weight.T, {"tok": truth, "sup": truth}, {"tok": 6, "sup": 6})
    there = output_losses(*student, teacher_hidden=teacher_hidden, teacher_head=student[1])
    stored = output_losses(*student, topk_ids=ids, topk_logprobs=logprobs, chunk_size=chunk_size)
    torch.testing.assert_close(stored, there)
    grads = [torch.autograd.grad(out["tok"], student_hidden) for out in (stored, there)]
    torch.testing.assert_close(*grads)
