"""What ZeRO cannot train is refused before work starts. That it trains is in test_processes.py, with DeepSpeed."""

import copy
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import linmu_hf.distillation.engines.zero as zero
import linmu_hf.distillation.model as model
from linmu_hf.distillation import DistillConfig, Stage
from linmu_hf.distillation.stages import FLEX


@pytest.mark.parametrize("launched", [False, True], ids=["argument", "accelerate launch"])
@pytest.mark.parametrize("found", [None, "0.18.9"])
def test_deepspeed_that_is_missing_or_too_old(tmp_path, monkeypatch, found, launched):
    def version(name):
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(zero, "version", version)
    if launched:
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    had = "is not installed" if found is None else "is version 0.18.9"
    with pytest.raises(ImportError, match=rf'{had}: pip install "deepspeed>=0.19", or take FSDP2'):
        given = {} if launched else {"deepspeed": {"zero_optimization": {"stage": 2}}}
        DistillConfig(output_dir=str(tmp_path), use_cpu=True, **given)


def test_gradients_of_a_mixer_come_together_whatever_the_batch_uses():
    """In one order, with zeros for what is not used, and with the values that they have without it."""
    mixer, order = Branches(), []
    plain = copy.deepcopy(mixer)
    zero.join_gradients(mixer)
    for name, parameter in mixer.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    orders = []
    for vision in (True, False):
        order.clear()
        for one in (mixer, plain):
            one.zero_grad()
            one(torch.ones(2, 3), vision).pow(2).sum().backward()
        orders.append(list(order))
        for (name, parameter), other in zip(mixer.named_parameters(), plain.parameters(), strict=True):
            expected = torch.zeros_like(other) if other.grad is None else other.grad
            torch.testing.assert_close(parameter.grad, expected, msg=name)
    assert orders[0] == orders[1] and sorted(orders[0]) == sorted(dict(mixer.named_parameters()))
    with torch.no_grad():
        assert not mixer(torch.ones(2, 3), True).requires_grad
    assert all(isinstance(parameter, nn.Parameter) for parameter in mixer.parameters())


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.text, self.vision = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, vision):
        return self.text(self.vision(x) if vision else x)


def asked(zero_optimization=None, world_size=2, optim="adamw_torch_fused", mismatches=(), **other):
    given = {"zero_optimization": {"stage": 2} | (zero_optimization or {}), **other}
    return SimpleNamespace(
        deepspeed_plugin=SimpleNamespace(deepspeed_config=given, zero_stage=given["zero_optimization"]["stage"]),
        hf_deepspeed_config=SimpleNamespace(mismatches=list(mismatches)),
        world_size=world_size,
        optim=optim,
    )


def test_what_accelerate_writes_is_taken():
    offload = {"device": "none", "nvme_path": None}
    zero.check_zero(
        asked(
            {"offload_optimizer": offload, "offload_param": offload, "stage3_gather_16bit_weights_on_model_save": 1},
            train_batch_size="auto", train_micro_batch_size_per_gpu="auto", gradient_accumulation_steps=1,
            gradient_clipping="auto", steps_per_print=float("inf"), bf16={"enabled": True}, fp16={"enabled": False},
        )
    )  # fmt: skip
    zero.check_zero(SimpleNamespace(deepspeed_plugin=None))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (asked(world_size=1), "DeepSpeed has no effect on one process: start several"),
        (asked({"stage": 1}), "ZeRO stage 1 is not supported: take 2, or to spread parameters, too, 3"),
        (asked({"offload_optimizer": {"device": "cpu"}}), "offload_optimizer to 'cpu' is not supported: leave it out"),
        (asked(optimizer={"type": "Lion"}), "optimizer={'type': 'Lion'} is not supported: leave it out"),
        (asked(mismatches=["- ds gradient_clipping=2 vs hf max_grad_norm=1"]), "clipping=2 .*write 'auto'"),
        (asked(optim="adafactor"), "optim='adafactor' is not supported with ZeRO, .*leave it out"),
    ],
)
def test_a_configuration_that_would_not_be_followed_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        zero.check_zero(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"muon": True}, "^one: muon needs whole matrices, which ZeRO cuts up: take FSDP2"),
        ({"trains": (FLEX, "visual")}, r"^one trains model\.visual\..*, whose gradients .*: take FSDP2"),
    ],
)
def test_stages_that_need_more_than_ones_own_part_are_refused(make_student, changes, message):
    student, good = make_student(), {"trains": (FLEX,), "max_steps": 1, "learning_rate": 1e-3, "hid": 1.0}
    stage = Stage("one", **(good | changes))
    zero.check_zero_stages(asked(), student, [Stage("zero", **good)])
    with pytest.raises(ValueError, match=message):
        zero.check_zero_stages(asked(), student, [stage])
    zero.check_zero_stages(SimpleNamespace(deepspeed_plugin=None), student, [stage])


def test_what_zero_3_leaves_whole_it_does_not_train(make_student):
    student = make_student()
    stage = Stage("one", trains=(FLEX, "lm_head"), max_steps=1, learning_rate=1e-3, tok=1.0)
    zero.check_zero_stages(asked(), student, [stage])
    with pytest.raises(ValueError, match=r"^one trains lm_head\.weight, which ZeRO-3 leaves whole .*: take FSDP2"):
        zero.check_zero_stages(asked({"stage": 3}), student, [stage])


@pytest.mark.parametrize("lends", [True, False])
def test_gradients_taken_at_once_reach_a_parameter_that_is_not_gathered(monkeypatch, lends):
    """Its memory is gone when the backward pass comes; without its shape autograd has no place for the gradient."""
    if not lends:
        monkeypatch.setattr(model, "lend_shapes", lambda parameters: None)
    weight, x = nn.Parameter(torch.randn(3, 2)), torch.randn(4, 2)
    expected = torch.autograd.grad((x @ weight.T).square().sum() * 2, weight)[0]
    loss, _ = model.GradientsAtOnce.apply(lambda: ((x @ weight.T).square().sum(), torch.ones(1)), weight)
    weight.ds_shape, weight.data = weight.shape, torch.empty(0)
    if lends:
        (2 * loss).backward()
        torch.testing.assert_close(weight.grad, expected)
        assert weight.untyped_storage().nbytes() == 4
    else:
        with pytest.raises(RuntimeError):
            (2 * loss).backward()
