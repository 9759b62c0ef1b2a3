"""Muon: the update it promises, head by head, and AdamW untouched beside it."""

import copy

import pytest
import torch
from torch.optim import AdamW

from linmu_hf.distillation import DistillConfig
from linmu_hf.distillation.muon import UPDATE_RMS, Muon, orthogonalise
from linmu_hf.distillation.recipes import read_stages, recipe_file
from linmu_hf.distillation.stages import parameter_groups, set_trainable


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(3, *shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = u.mT @ orthogonalise(matrix) @ v.mT  # diagonal, if the singular vectors are the matrix's own
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found, torch.diag_embed(diagonal), atol=1e-3, rtol=0)
    assert diagonal.min() > 0.5 and diagonal.max() < 1.3


@pytest.mark.parametrize("scale", [1e-24, 1e-38, 0.0, 1e30])
def test_the_size_of_a_gradient_does_not_matter(scale):
    """A head whose gate or features are saturated gets gradients whose squares underflow."""
    torch.manual_seed(0)
    matrix = torch.randn(2, 32, 128)
    found, right = orthogonalise(scale * matrix), orthogonalise(matrix)
    torch.testing.assert_close(found, right if scale else torch.zeros_like(matrix), atol=1e-4, rtol=0)


def test_heads_are_matrices_of_their_own():
    torch.manual_seed(0)
    start, gradient = torch.randn(12, 10), torch.randn(12, 10)
    whole = torch.nn.Parameter(start.clone())
    parts = [torch.nn.Parameter(part.clone()) for part in start.chunk(3)]
    whole.grad = gradient
    for part, own in zip(parts, gradient.chunk(3)):
        part.grad = own * torch.rand(())  # the length of a gradient does not matter
    Muon([{"params": [whole], "heads": 3}], lr=0.1, weight_decay=0.5).step()
    Muon([{"params": parts, "heads": 1}], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(whole.data, torch.cat([part.data for part in parts]))
    step = (start * (1 - 0.1 * 0.5) - whole.data) / 0.1
    assert step.square().mean().sqrt() == pytest.approx(UPDATE_RMS, rel=0.3)


def test_other_groups_are_adamw():
    torch.manual_seed(0)
    start = torch.randn(7)
    one, other, matrix = (torch.nn.Parameter(t) for t in (start.clone(), start.clone(), torch.randn(4, 4)))
    muon = Muon([{"params": [one]}, {"params": [matrix], "heads": 1}], lr=0.1, betas=(0.8, 0.9), weight_decay=0.1)
    adamw = AdamW([other], lr=0.1, betas=(0.8, 0.9), weight_decay=0.1)
    for _ in range(3):
        one.grad = other.grad = torch.randn(7)
        matrix.grad = torch.randn(4, 4)
        muon.step()
        adamw.step()
    assert torch.equal(one, other)
    assert len(muon.param_groups) == 2


def test_state_is_saved_and_loaded():
    def run(optimizer, parameters, seed):
        torch.manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    def make(values):
        parameters = [torch.nn.Parameter(value.clone()) for value in values]
        return Muon([{"params": parameters[:1], "heads": 2}, {"params": parameters[1:]}], lr=0.1), parameters

    torch.manual_seed(0)
    optimizer, parameters = make([torch.randn(4, 6), torch.randn(5)])
    run(optimizer, parameters, 1)
    again, copies = make([parameter.data for parameter in parameters])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, parameters, 2)
    run(again, copies, 2)
    assert all(torch.equal(one, other) for one, other in zip(parameters, copies))


def test_groups_of_a_student(make_student):
    student = make_student()
    set_trainable(student, read_stages(recipe_file("paper"))[1])
    names = {parameter: name for name, parameter in student.named_parameters()}
    groups = parameter_groups(student, 1.0, 0.1, 0.2, muon=True)
    heads = {names[p].rpartition("mixer.")[2]: group["heads"] for group in groups for p in group["params"]}
    text = student.config.text_config
    assert heads["local_swin.q_proj.weight"] == heads["flex_ma.forward_scan.c_proj.weight"] == text.num_attention_heads
    assert heads["local_swin.k_proj.weight"] == heads["flex_ma.x_proj.weight"] == text.num_key_value_heads
    assert heads["flex_ma.o_proj.weight"] == 1
    for name in ("gate_proj.weight", "forward_scan.dt_proj.weight", "forward_scan.conv_weight", "x_proj.bias"):
        assert heads[f"flex_ma.{name}"] == 0


def test_other_optimizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"stage-1: muon takes AdamW for all but matrices"):
        DistillConfig(output_dir=str(tmp_path), stage_overrides=["stage-1.muon=true"], optim="sgd")
