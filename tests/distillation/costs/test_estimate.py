from dataclasses import replace

import numpy as np
import pytest
import torch

from linmu_hf import LinMUConfig
from linmu_hf.commands import distill
from linmu_hf.distillation.costs.estimate import GPUS, Machine, advise, count_parameters, estimate_stage
from linmu_hf.distillation.costs.tracing import Shape, build_on_meta
from linmu_hf.distillation.stages import Stage
from linmu_hf.modeling.mixers import MIXERS

from ...helpers.training_memory import build, measure, measure_group, student_config


pytestmark = pytest.mark.core_training

STAGES = {
    "teacher-fed": Stage("s", ("flex",), 10, 1e-3, hid=0.5, hidden_input="teacher"),
    "student-fed": Stage("s", ("flex",), 10, 1e-3, hid=0.5, tok=0.5),
    "checkpoints": Stage("s", ("flex", "swin"), 10, 1e-3, hid=0.5, tok=0.5),
    "lora": Stage("s", ("flex", "swin", "lora"), 10, 1e-3, tok=0.5, seq=0.5, sup=0.5, lora_r=8),
}
SHAPE = Shape(512, vision_share=0.5, half=False, on_gpu=False)


@pytest.mark.parametrize("kind, shared", [*((kind, True) for kind in STAGES), ("teacher-fed", False)])
def test_estimate_is_within_15_percent_of_what_is_held(kind, shared):
    checkpoints = kind in ("checkpoints", "lora")
    shape = Shape(**{**vars(SHAPE), "checkpoints": checkpoints, "shared": shared})
    config = student_config(layers=5, hidden_size=128, intermediate_size=512)
    measured = measure(config, STAGES[kind], tokens=512, vision=256, checkpoints=checkpoints, shared=shared)
    estimate = estimate_stage(config, STAGES[kind], shape, Machine("h100"))
    assert abs(estimate.total / measured.total() - 1) < 0.15


def test_estimate_of_a_few_layers_at_a_time_is_what_their_steps_hold_and_multiply():
    """Memory within 15% of the steps of a group, products within 5% of one step of every group."""
    config, groups = student_config(layers=5, hidden_size=128, intermediate_size=512), [[0, 1], [2, 3], [4]]
    estimate = estimate_stage(config, STAGES["teacher-fed"], replace(SHAPE, layers=2), Machine("h100"))
    held, multiplied = zip(*(measure_group(config, STAGES["teacher-fed"], group) for group in groups))
    assert abs(estimate.total / max(held) - 1) < 0.15
    assert abs(estimate.flops / sum(multiplied) - 1) < 0.05
    whole = estimate_stage(config, STAGES["teacher-fed"], SHAPE, Machine("h100"))
    assert estimate.trained == whole.trained and estimate.memory["optimizer states"] < whole.memory["optimizer states"]


def test_cpu_memory_holds_both_models_and_a_checkpoint():
    config = student_config(layers=3, intermediate_size=600)
    model = build(config, STAGES["teacher-fed"], shared=True, checkpoints=False)
    found = estimate_stage(config, STAGES["teacher-fed"], replace(SHAPE, layers=1), Machine("h100"))
    weights = 4 * sum(p.numel() for p in {*model.student.parameters(), *model.teacher.parameters()})
    assert weights < found.host - found.memory["optimizer states"] < 2 * weights


def test_a_stage_that_does_not_fit_is_told_of_layers_at_a_time(monkeypatch):
    config, stage, machine = student_config(layers=4, hidden_size=128), STAGES["teacher-fed"], Machine("rtx4090")
    shape = replace(SHAPE, half=True)
    one, two = (estimate_stage(config, stage, replace(shape, layers=layers), machine).total for layers in (1, 2))
    monkeypatch.setitem(GPUS, "rtx4090", ((one + two) / 2 / machine.budget * GPUS["rtx4090"][0], 165, 1.01))
    whole = estimate_stage(config, stage, shape, machine)
    assert advise(config, [whole], shape, machine, 1) == ["s does not fit: --layers_at_a_time 1: 0 GB"]


def test_parameters_are_those_of_the_models():
    for shared in (True, False):
        config, stage = student_config(layers=3), STAGES["lora"]
        model = build(config, stage, shared, checkpoints=False)
        counts = count_parameters(config, stage, Shape(64, shared=shared, half=False))
        unique = {id(p): p for module in (model, model.student) for p in module.parameters()}.values()
        trained = sum(p.numel() for p in unique if p.requires_grad)
        shares_vision = 0 if shared else sum(p.numel() for p in model.teacher.model.model.visual.parameters())
        assert counts["trained"].total() == trained
        assert counts["frozen"].total() == sum(p.numel() for p in unique) - trained - shares_vision


def test_published_sizes():
    """Of the index of Qwen2.5-VL-7B-Instruct's safetensors: 16,584,333,312 bytes in bfloat16."""
    config = distill._read_config("qwen2.5-vl-7b")
    layers = ["full_attention"] * config.text_config.num_hidden_layers
    teacher = LinMUConfig(**config.to_dict() | {"text_config": config.text_config.to_dict() | {"layer_types": layers}})
    assert sum(p.numel() for p in build_on_meta(teacher).parameters()) == 16_584_333_312 // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_teacher_fed_step_holds_one_block_whatever_the_number_of_layers(dtype):
    """All that is held beside parameters, their gradients and optimizer states: 2, 4 and 8 layers within 10%."""
    held = []
    for layers in (2, 4, 8):
        config = student_config(layers=layers, hidden_size=128, intermediate_size=512)
        found = measure(config, STAGES["teacher-fed"], tokens=512, vision=256, dtype=dtype)
        held.append(found["other"])
    assert max(held) <= 1.1 * min(held), held


def test_a_stage_that_does_not_fit_gets_advice():
    config, machine = student_config(layers=2, hidden_size=128), Machine("rtx4090")
    shape = Shape(64)
    found = estimate_stage(config, STAGES["student-fed"], shape, machine)
    assert advise(config, [found], shape, machine, 1) == []
    (line,) = advise(config, [replace(found, memory={"logits": 1e12})], shape, machine, 1)
    assert "s does not fit: --gradient_checkpointing True: 0 GB" in line and "hidden_input: teacher" in line


def test_engines_share_what_they_share():
    config, shape = student_config(layers=2, hidden_size=128), Shape(64, half=False)
    single = estimate_stage(config, STAGES["student-fed"], shape, Machine("h100")).memory
    ddp, fsdp = (
        estimate_stage(config, STAGES["student-fed"], shape, Machine("h100", 4, engine)).memory
        for engine in ("ddp", "fsdp2")
    )
    assert ddp.keys() - single.keys() == {"buckets of gradients"}
    assert all(ddp[key] == value for key, value in single.items())
    for key in ("trained weights", "optimizer states", "frozen weights: decoder"):
        assert fsdp[key] == single[key] / 4
    zero2, zero3 = (
        estimate_stage(config, STAGES["student-fed"], shape, Machine("h100", 4, engine)).memory
        for engine in ("zero2", "zero3")
    )
    for each in (zero2, zero3):  # DeepSpeed keeps the weights that its optimizer updates beside those of the model
        assert each["the optimizer's copy of weights"] == single["trained weights"] / 4
        assert each["optimizer states"] == single["optimizer states"] / 4
        assert each["buckets of gradients"] == 4 * 5e8
    assert all(zero2[key] == single[key] for key in single if "weights" in key)
    for part, share in (("decoder", 4), ("vision", 1), ("embeddings", 1)):
        assert zero3[f"frozen weights: {part}"] == single[f"frozen weights: {part}"] / share
        assert fsdp[f"frozen weights: {part}"] == single[f"frozen weights: {part}"] / 4
    assert zero3["gathered weights"] < fsdp["gathered weights"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--gpu", "h900", "--teacher", "tiny"], "h900"),
        (["--engine", "ddp", "--teacher", "tiny"], "gpus=1"),
        (["--gpus", "0", "--teacher", "tiny"], "at least 1"),
        (["--gpus", "4", "--engine", "zero3", "--teacher", "tiny", "--recipe", "quick"], "muon needs whole matrices"),
        ([], "--teacher"),
        (["--teacher", "tiny", "--layers_at_a_time", "2"], "no stage has hidden_input: teacher"),
        (["--teacher", "tiny", "--layers_at_a_time", "2", "--recipe", "default", "--gpus", "2"], "for one GPU"),
    ],
)
def test_what_cannot_be_is_refused(flags, message, capsys):
    assert distill.main(["--estimate", "--use_cpu", "True", *flags]) == 2
    assert message in capsys.readouterr().err


def test_command_prints_a_table(tmp_path, capsys):
    (tmp_path / "stages.yaml").write_text(
        "- {name: align, trains: [flex], max_steps: 10, learning_rate: 1e-3, hid: 0.5, hidden_input: teacher}"
    )
    arguments = f"--estimate --teacher tiny --sequence_length 64 --stages {tmp_path}/stages.yaml"
    assert distill.main(arguments.split()) == 0
    out = capsys.readouterr().out
    assert "| GB on each GPU | align |" in out and "optimizer states" in out and "Assumed: " in out
    assert distill.main([*arguments.split(), "--layers_at_a_time", "1"]) == 0
    out = capsys.readouterr().out
    assert "| GB of CPU memory |" in out and "teacher-fed stages 1 layers at a time" in out


@pytest.mark.parametrize("bandwidth", [1e-6, 5e-7], ids=["products", "memory"])
def test_own_answers_are_counted_as_by_hand(monkeypatch, bandwidth):
    """Two rows of 100 tokens, the last 4 of them answered with a probability of 1/2; what a decode step waits for."""
    config, shape = student_config(layers=2, hidden_size=128), Shape(100, batch=2, half=False, completion=4)
    config.text_config.layer_types = ["m_mate", "full_attention"]
    stage = Stage("own", ("flex",), 10, 1e-3, tok=1.0)
    monkeypatch.setitem(GPUS, "h100", (80, 1e-6, bandwidth))  # 350,000 products and half of the bytes a second
    given, own = (
        estimate_stage(config, replace(stage, lmbda=lmbda), shape, Machine("h100"), 3) for lmbda in (0.0, 0.5)
    )
    recurrent = MIXERS["m_mate"].flops_per_token(config.text_config)
    around = 2 * 3 * 128 * 1024
    attention = 4 * 128 * (2 + 1) * 64 + 4 * 128 * np.array(
        [48, 96, 97, 98]
    )  # after half of the prompt, then after it
    prompt, *steps = recurrent + attention + 2 * around
    head = 2 * 128 * 1000
    vision = 2 * vision_parameters(config) * 4 * 64 * 2
    before, after = 2 * 0.5 * (96 * prompt + head) + 0.5 * vision, 2 * 0.5 * (sum(steps) + 3 * head)
    assert own.flops - given.flops == pytest.approx(before + after)
    counts = count_parameters(config, stage, shape)
    read = 0.75 * 3 * 4 * (counts["frozen"]["decoder"] + counts["trained"]["decoder"] + 128 * 1000)
    reading, products = read / (bandwidth * 5e11), after / 3.5e5
    assert (reading > products) == (bandwidth == 5e-7)
    assert own.seconds - given.seconds == pytest.approx(10 * 3 * (before / 3.5e5 + max(reading, products)))
    assert own.memory == given.memory
    with pytest.raises(ValueError, match=r"own: lmbda=0\.5 lets the student generate, .*: give --engine ddp"):
        estimate_stage(config, replace(stage, lmbda=0.5), shape, Machine("h100", 2))


def vision_parameters(config):
    return sum(p.numel() for p in build_on_meta(config).model.visual.parameters())


def test_muon_holds_one_moment_of_a_matrix():
    stage, config = replace(STAGES["student-fed"], muon=True), student_config(layers=2, hidden_size=128)
    counts = count_parameters(config, stage, Shape(64))
    found = estimate_stage(config, stage, Shape(64), Machine("h100"))
    assert 0 < counts["matrices"].total() < found.trained
    assert found.memory["optimizer states"] == 8 * found.trained - 4 * counts["matrices"].total()
