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
