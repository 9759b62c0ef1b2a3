"""Joint linear maps against the maps one by one, and the rotary embedding against Transformers' own."""

import pytest
import torch
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import rotate_half

from linmu_hf.modeling.mixers import projection
from linmu_hf.modeling.mixers.projection import joint_linear, rotate


def maps():
    return [nn.Linear(6, width).double() for width in (4, 2, 5)]


@pytest.fixture
def products(monkeypatch):
    """Widths of the matrix products that `joint_linear` makes itself."""
    widths: list[int] = []
    linear = projection.linear
    monkeypatch.setattr(projection, "linear", lambda x, w, b: widths.append(len(w)) or linear(x, w, b))
    monkeypatch.setattr(projection, "JOINT_FROM", 10)
    return widths


@pytest.mark.parametrize("n", [9, 10], ids=["few tokens", "many tokens"])
def test_joint_is_one_by_one(n, products):
    modules, x = maps(), torch.randn(n, 6, dtype=torch.float64, requires_grad=True)
    parameters = [x, *(p for module in modules for p in module.parameters())]
    y, expected = joint_linear(x, *modules), torch.cat([module(x) for module in modules], -1)
    assert products == ([11] if n == 10 else [])
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    for grad, right in zip(*(torch.autograd.grad((out * weight).sum(), parameters) for out in (y, expected))):
        torch.testing.assert_close(grad, right)


def kept_bytes(function, known):
    """Bytes that autograd keeps for the backward pass beside the tensors that are there anyway."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    there = {tensor.untyped_storage().data_ptr() for tensor in (*known, result)}
    return sum(size for place, size in kept.items() if place not in there)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_no_copy_of_the_weights_is_kept_for_the_backward_pass(frozen, products):
    modules, x = maps(), torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    for module in modules:
        module.requires_grad_(not frozen)
    known = [x, *(p for module in modules for p in module.parameters())]
    assert kept_bytes(lambda: joint_linear(x, *modules), known) == 0
    assert products == [11]
    grads = torch.autograd.grad(joint_linear(x, *modules).sum(), [p for p in known if p.requires_grad])
    assert all(grad.isfinite().all() for grad in grads)


def test_joint_in_mixed_precision(products):
    """As PyTorch's own linear maps under autocast: the product in bfloat16, gradients in float32."""
    modules, x = [nn.Linear(6, width) for width in (4, 2, 5)], torch.randn(20, 6, requires_grad=True)
    parameters = [x, *(p for module in modules for p in module.parameters())]
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = joint_linear(x, *modules), torch.cat([module(x) for module in modules], -1)
    assert y.dtype == torch.bfloat16 and products == [11]
    torch.testing.assert_close(y, expected)
    for grad, right in zip(*(torch.autograd.grad(out.float().sum(), parameters) for out in (y, expected))):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, right, atol=0.05, rtol=0.05)


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def adapted(module):
    module.__class__ = Adapted


def replaced(module):
    """As accelerate does it to bring in a weight from disk."""
    forward = module.forward
    module.forward = lambda x: forward(x) + 1


def hooked(module):
    module.register_forward_hook(lambda _, args, output: output + 1)


def hooked_before(module):
    module.register_forward_pre_hook(lambda _, args: (args[0] + 1,))


def parametrized(module):
    torch.nn.utils.parametrizations.weight_norm(module)
    with torch.no_grad():
        module.parametrizations.weight.original0 += 1


@pytest.mark.parametrize("change", [adapted, replaced, hooked, hooked_before, parametrized])
def test_a_map_that_is_more_than_its_weight_is_called(change, products):
    modules, x = maps(), torch.randn(20, 6, dtype=torch.float64)
    before = joint_linear(x, *modules)
    assert products == [11]
    change(modules[1])
    after = joint_linear(x, *modules)
    assert products == [11]
    torch.testing.assert_close(after, torch.cat([module(x) for module in modules], -1))
    assert (after[:, 4:6] - before[:, 4:6]).abs().min() > 1e-6
    torch.testing.assert_close(after[:, :4], before[:, :4])


def test_rotate():
    x = torch.randn(7, 3, 8, dtype=torch.float64)
    cos, sin = torch.randn(2, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(rotate(x, (cos, sin)), x * cos[:, None] + rotate_half(x) * sin[:, None])
