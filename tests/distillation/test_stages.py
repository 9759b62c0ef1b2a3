import json
import re
from dataclasses import replace

import pytest
import torch

from linmu_hf.distillation.config import DistillConfig
from linmu_hf.distillation.lora import add_lora, merge_lora
from linmu_hf.distillation.recipes import read_stages, recipe_file
from linmu_hf.distillation.stages import Stage, check_stages, parameter_groups, set_trainable


pytestmark = pytest.mark.core_training

PAPER_STAGES = read_stages(recipe_file("paper"))


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_paper_stages_are_the_papers():
    assert [stage.max_steps for stage in PAPER_STAGES] == [10_000, 15_000, 25_000]
    assert [stage.learning_rate for stage in PAPER_STAGES] == [5e-4, 5e-4, 2e-5]
    weights = [(stage.hid, stage.tok, stage.seq, stage.sup) for stage in PAPER_STAGES]
    assert weights == [(0.5, 0.5, 0, 0), (0.5, 0.5, 0, 0), (0, 0.5, 0.5, 0.5)]
    assert [stage.lora_r for stage in PAPER_STAGES] == [0, 0, 8]


def test_default_config_asks_for_the_papers_stages(tmp_path):
    assert DistillConfig(output_dir=str(tmp_path)).get_stages() == PAPER_STAGES


def test_stages_train_exactly_their_parameters(make_student):
    student = make_student(keep_attention=(1,))
    names = {name for name, _ in student.named_parameters()}
    mixers = {name for name in names if ".layers.0.mixer." in name or ".layers.2.mixer." in name}
    swin = {name for name in mixers if ".local_swin." in name}
    assert swin and mixers - swin
    expected = [mixers - swin, mixers, mixers]
    for stage, wanted in zip(PAPER_STAGES[:2], expected):
        assert set(set_trainable(student, stage)) == wanted == trainable(student)

    add_lora(student, r=2, alpha=4)
    set_trainable(student, PAPER_STAGES[2])
    adapters = {
        f"model.language_model.layers.{layer}.mlp.{proj}_proj.lora_{side}.default.weight"
        for layer in range(3)
        for proj in ("gate", "up", "down")
        for side in "AB"
    }
    assert trainable(student) == mixers | adapters


def test_nothing_to_train_is_an_error(make_teacher):
    with pytest.raises(ValueError, match="stage-1 finds nothing to train"):
        set_trainable(make_teacher(), PAPER_STAGES[0])


def test_merged_lora_is_the_same_function_and_leaves_no_trace(make_student):
    student = make_student()
    names = list(student.state_dict())
    ids = torch.randint(20, 100, (2, 9))
    before = student(ids).logits
    add_lora(student, r=4, alpha=8)
    torch.testing.assert_close(student(ids).logits, before)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    adapted = student(ids).logits
    assert (adapted - before).abs().max() > 0.01
    merge_lora(student)
    torch.testing.assert_close(student(ids).logits, adapted)
    assert list(student.state_dict()) == names
    assert not hasattr(student, "peft_config")


def test_slow_group_and_weight_decay(make_student):
    student = make_student()
    add_lora(student, r=2, alpha=4)
    set_trainable(student, PAPER_STAGES[2])
    names = {parameter: name for name, parameter in student.named_parameters()}
    groups = parameter_groups(student, learning_rate=1.0, weight_decay=0.1, slow_lr_multiplier=0.2)
    rates = {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert rates.keys() == trainable(student)
    flex = "model.language_model.layers.0.mixer.flex_ma"
    assert rates[f"{flex}.forward_scan.A_log"] == (0.2, 0.0)
    assert rates[f"{flex}.reverse_scan.dt_bias"] == (0.2, 0.0)
    assert rates[f"{flex}.forward_scan.dt_proj.weight"] == (0.2, 0.0)
    assert rates[f"{flex}.gate_proj.weight"] == (0.2, 0.0)
    for part in ("weight", "bias"):
        assert rates[f"model.language_model.layers.0.mixer.fusion_proj.{part}"] == (0.2, 0.0)
    matrices = {name for name in rates if re.search(r"lora_[AB]|(?<!dt_|te_)(?<!fusion_)proj\.weight$", name)}
    assert {name for name, (_, decay) in rates.items() if decay} == matrices
    assert rates[f"{flex}.forward_scan.D"] == (1.0, 0.0)
    assert rates[f"{flex}.x_proj.bias"] == (1.0, 0.0)
    assert rates[f"{flex}.o_proj.weight"] == (1.0, 0.1)
    assert rates["model.language_model.layers.0.mlp.gate_proj.lora_A.default.weight"] == (1.0, 0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage_overrides": ["stage-2.learning_rate=0"]}, "stage-2: learning_rate=0 must be positive"),
        ({"stage_overrides": ["all.hidden_input=oracle"]}, "hidden_input='oracle' must be"),
        (
            {"stage_overrides": ["stage-3.hidden_input=teacher"]},
            "'teacher' runs the mixers alone",
        ),
        ({"stage_overrides": ["all.max_steps=0"]}, "leaves nothing to do"),
        ({"stage_overrides": ["stage-1.hid=-1"]}, "must not be negative"),
        ({"recipe": "best"}, "recipe='best' is none of paper, default, quick"),
        ({"recipe": "quick", "stages": "stages.yaml"}, "leave one of them out"),
        ({"stages": "/nowhere/stages.yaml"}, "/nowhere/stages.yaml cannot be read"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"save_total_limit": 1}, "save_total_limit=1 must be at least 2"),
    ],
)
def test_impossible_arguments(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(output_dir=str(tmp_path), **changes)


def test_stages_in_python_are_kept_as_json(tmp_path):
    stages = [Stage("one", ("flex", "swin"), 3, 1e-3, hid=0.5, learning_rates={"swin": 0.1})]
    config = DistillConfig(output_dir=str(tmp_path), stages=stages, stage_overrides=["one.max_steps=5"])
    assert config.get_stages() == (replace(stages[0], max_steps=5),)
    json.loads(config.to_json_string())


def test_a_pattern_that_finds_nothing_is_refused(make_student):
    student = make_student()
    check_stages(student, PAPER_STAGES)
    for changes, message in (
        ({"trains": ("flex", "no_such")}, "trains='no_such' finds no parameter of the student"),
        ({"trains": ("flex",), "lora_r": 2}, "lora_r=2 adapters would not train: add lora"),
        ({"trains": ("flex",), "learning_rates": {"swin": 2.0}}, "finds nothing that trains in this stage"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            check_stages(student, [Stage("one", max_steps=1, learning_rate=1.0, hid=1.0, **changes)])


def test_rates_by_name_multiply(make_student):
    student = make_student()
    stage = Stage("one", ("flex", "swin"), 1, 1.0, hid=1.0, learning_rates={r"layers\.0\.": 3.0, "swin": 0.5})
    names = {parameter: name for name, parameter in student.named_parameters()}
    set_trainable(student, stage)
    groups = parameter_groups(student, 1.0, 0.0, 0.2, stage.learning_rates)
    rates = {names[p]: group["lr"] for group in groups for p in group["params"]}
    assert rates.keys() == trainable(student)
    mixer = "model.language_model.layers.{}.mixer.{}".format
    assert rates[mixer(0, "local_swin.q_proj.weight")] == 3.0  # the first that is found
    assert rates[mixer(1, "local_swin.q_proj.weight")] == 0.5
    assert rates[mixer(1, "flex_ma.o_proj.weight")] == 1.0
    assert rates[mixer(0, "flex_ma.forward_scan.A_log")] == pytest.approx(0.6)


def test_stage_names_are_folder_names():
    with pytest.raises(ValueError, match=r"stage name '\.\./x' names a folder"):
        Stage("../x", trains=("mixer",), max_steps=1, learning_rate=1.0, hid=1.0)
