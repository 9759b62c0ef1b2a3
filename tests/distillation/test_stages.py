import re

import pytest
import torch

from linmu_hf.distillation.config import DistillConfig
from linmu_hf.distillation.lora import add_lora, merge_lora
from linmu_hf.distillation.stages import PAPER_STAGES, Stage, parameter_groups, set_trainable


pytestmark = pytest.mark.core_training


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_paper_stages_are_the_papers():
    assert [stage.max_steps for stage in PAPER_STAGES] == [10_000, 15_000, 25_000]
    assert [stage.learning_rate for stage in PAPER_STAGES] == [5e-4, 5e-4, 2e-5]
    weights = [(stage.hid, stage.tok, stage.seq, stage.sup) for stage in PAPER_STAGES]
    assert weights == [(0.5, 0.5, 0, 0), (0.5, 0.5, 0, 0), (0, 0.5, 0.5, 0.5)]
    assert [stage.lora_r for stage in PAPER_STAGES] == [0, 0, 8]


def test_default_config_asks_for_the_papers_stages(tmp_path):
    assert DistillConfig(output_dir=str(tmp_path)).stages() == PAPER_STAGES


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


def test_teacher_fed_steps_are_stages_of_their_own(tmp_path):
    config = DistillConfig(output_dir=str(tmp_path), stage_steps=[5, 0, 7], align_steps=[3, 4, 0])
    stages = config.stages()
    assert [(s.name, s.max_steps, s.hidden_input) for s in stages] == [
        ("stage-1-align", 3, "teacher"),
        ("stage-1", 5, "student"),
        ("stage-2-align", 4, "teacher"),
        ("stage-3", 7, "student"),
    ]
    assert (stages[0].hid, stages[0].tok) == (0.5, 0.0)
    fed = DistillConfig(output_dir=str(tmp_path), hidden_input=["teacher", "student", "student"]).stages()[0]
    assert (fed.hidden_input, fed.hid, fed.tok) == ("teacher", 0.5, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage_steps": [1, 2]}, r"stage_steps=\[1, 2\] must have 3 entries"),
        ({"stage_steps": [1, -2, 3]}, "must not be negative"),
        ({"stage_steps": [0, 0, 0]}, "leave nothing to do"),
        ({"stage_learning_rates": [1e-3, 0, 1e-3]}, "stage-2: learning_rate=0 must be positive"),
        ({"hidden_input": ["oracle"]}, "hidden_input='oracle' must be"),
        ({"hidden_input": ["teacher"]}, "stage-3: hidden_input='teacher' runs the mixers alone"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"save_total_limit": 1}, "save_total_limit=1 must be at least 2"),
        ({"lambda_hid": -1.0}, "must not be negative"),
    ],
)
def test_impossible_arguments(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(output_dir=str(tmp_path), **changes)


def test_stage_names_are_folder_names():
    with pytest.raises(ValueError, match=r"stage name '\.\./x' names a folder"):
        Stage("../x", trains=("mixer",), max_steps=1, learning_rate=1.0, hid=1.0)
