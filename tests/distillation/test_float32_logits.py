"""Half-precision operands, fp32 logits: gradients are as exact as the operands' dtype lets them be."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from linmu_hf.distillation.float32_logits import Float32Logits
from linmu_hf.distillation.losses import cross_entropy_loss, output_losses, token_kd_loss


pytestmark = pytest.mark.core_training

N, D, V = 64, 128, 1024


def operands(dtype=torch.bfloat16):
    hidden, teacher = (torch.randn(N, D).to(dtype) for _ in range(2))
    head = nn.Linear(D, V, bias=False).to(dtype)
    nn.init.normal_(head.weight, std=3 * D**-0.5)
    return hidden.requires_grad_(), (hidden + 0.3 * teacher).detach(), head


def gradients(hidden, teacher_hidden, head, losses):
    loss = losses(hidden, teacher_hidden, head)
    return [grad.double() for grad in torch.autograd.grad(loss, (hidden, head.weight))]


def rounded(hidden, teacher_hidden, head):
    logits, teacher_logits = head(hidden), head(teacher_hidden).detach()
    return token_kd_loss(logits, teacher_logits, N) + cross_entropy_loss(logits, torch.arange(N), N)


def ours(hidden, teacher_hidden, head):
    targets = {"tok": torch.arange(N), "sup": torch.arange(N)}
    options = {"teacher_hidden": teacher_hidden, "teacher_head": head, "chunk_size": 24}
    losses = output_losses(hidden, head, targets, {"tok": N, "sup": N}, **options)
    return losses["tok"] + losses["sup"]


def relative_errors(grads, exact):
    return [((grad - other).norm() / other.norm()).item() for grad, other in zip(grads, exact)]


def test_gradients_have_the_error_of_their_own_rounding():
    hidden, teacher_hidden, head = operands()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact_head = nn.Linear(D, V, bias=False).double()
    exact_head.weight.data = head.weight.detach().double()
    exact = gradients(exact_hidden, teacher_hidden.double(), exact_head, rounded)
    rounding = relative_errors([grad.bfloat16().double() for grad in exact], exact)
    before = relative_errors(gradients(hidden, teacher_hidden, head, rounded), exact)
    after = relative_errors(gradients(hidden, teacher_hidden, head, ours), exact)
    print({"rounding": rounding, "before": before, "after": after})
    assert after[0] < 1.05 * rounding[0] and before[0] > 2 * after[0]
    assert after[1] < 2 * rounding[1] and before[1] > after[1]  # chunks of a weight's gradient add up in its dtype


@pytest.mark.parametrize("bias", [False, True])
def test_logits_equal_the_product_of_converted_operands(bias):
    hidden = torch.randn(2, 3, D).bfloat16()
    head = nn.Linear(D, V, bias=bias).bfloat16()
    with Float32Logits():
        logits = head(hidden)
    expected = F.linear(hidden.float(), head.weight.float(), head.bias.float() if bias else None)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected)


def test_autocast_counts_as_half_precision():
    hidden, head = torch.randn(5, D, requires_grad=True), nn.Linear(D, V)
    with torch.autocast("cpu", torch.bfloat16), Float32Logits():
        logits = head(hidden)
    expected = F.linear(hidden.bfloat16().float(), head.weight.bfloat16().float(), head.bias)
    torch.testing.assert_close(logits, expected)
    logits.sum().backward()
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.float32


def test_full_precision_and_other_operations_stay_as_they_are():
    hidden, head = torch.randn(5, D), nn.Linear(D, V)
    with Float32Logits():
        assert torch.equal(head(hidden), F.linear(hidden, head.weight, head.bias))
        assert (hidden.bfloat16() @ head.weight.T.bfloat16()).dtype == torch.bfloat16


def test_modules_are_called():
    """What brings a sharded weight back are hooks of the module."""
    head = nn.Linear(D, V, bias=False).bfloat16()
    weight = head.weight.data
    head.weight.data = weight.new_zeros(0, D)

    def gather(module, args):
        module.weight.data = weight

    head.register_forward_pre_hook(gather)
    losses = output_losses(torch.randn(5, D).bfloat16(), head, {"sup": torch.arange(5)}, {"sup": 5}, chunk_size=2)
    assert losses["sup"].isfinite()


def test_adapters_of_a_head_add_up_in_float32():
    model = get_peft_model(nn.Sequential(nn.Linear(D, V, bias=False)).bfloat16(), LoraConfig(target_modules=["0"]))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.bfloat16()
        if "lora_B" in name:
            nn.init.normal_(parameter)
    hidden = torch.randn(4, D).bfloat16()
    with Float32Logits():
        logits = model(hidden)
    torch.testing.assert_close(logits, model.float()(hidden.float()), rtol=0.02, atol=0.02)
    assert logits.dtype == torch.float32


@pytest.mark.gpu
def test_on_a_gpu_as_on_a_cpu():
    hidden, teacher_hidden, head = operands()
    expected = gradients(hidden, teacher_hidden, head, ours)
    cuda = hidden.detach().cuda().requires_grad_()
    grads = gradients(cuda, teacher_hidden.cuda(), head.cuda(), ours)
    assert max(relative_errors([grad.cpu() for grad in grads], expected)) < 2e-3
