"""Teacher-fed stages of a few layers at a time: the weights and the log of all layers at once, killed or not."""

import json
import weakref

import pytest
import torch
from distillation_fixtures import Rows
from killing import Killed, kill_at
from safetensors.torch import load_file

from linmu_hf import files
from linmu_hf.distillation import DistillConfig, Stage, distill
from linmu_hf.distillation import runner as runner_module
from linmu_hf.distillation.stages import FLEX, SWIN
from linmu_hf.distillation.trainer import DistillTrainer


pytestmark = pytest.mark.core_training

ALIGN = Stage("align", trains=(FLEX, SWIN), max_steps=5, learning_rate=3e-3, hid=0.1, hidden_input="teacher")
MUON = Stage("align", trains=(FLEX,), max_steps=5, learning_rate=1e-2, hid=0.1, hidden_input="teacher", muon=True)
FED = Stage("fed", trains=(FLEX,), max_steps=2, learning_rate=3e-3, hid=0.1, tok=0.5)


@pytest.fixture(scope="module")
def run(rows, processor, make_student, make_teacher):
    def run(folder, layers=None, stages=(ALIGN,), student=None, held_out=None, stream=False, **changes):
        student = student or make_student()
        values = {"per_device_train_batch_size": 2, "logging_steps": 2, "save_steps": 2, "disable_tqdm": True}
        values |= {"use_cpu": True, "max_grad_norm": 0.0, "layers_at_a_time": layers} | changes
        config = DistillConfig(output_dir=str(folder), **values)
        given = Rows(rows) if stream else rows
        distill(config, student, make_teacher(), given, processor, stages=stages, eval_dataset=held_out)
        return student

    return run


def read_log(folder):
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def assert_same(one, other, atol=1e-6):
    one, other = (model.state_dict() for model in (one, other))
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same_log(one, other):
    """But for the time it took, and the Trainer's rates."""
    logs = [[row for row in read_log(folder) if "train_runtime" not in row] for folder in (one, other)]
    for ours, theirs in zip(*logs, strict=True):
        assert ours.keys() == theirs.keys() and ours["stage"] == theirs["stage"]
        for name in ours.keys() - {"stage", "seconds", "eval_runtime"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-9), name


CASES = {
    "one layer": {"layers": 1},
    "two layers": {},
    "muon": {"stages": (MUON,)},
    "stream": {"stream": True, "shuffle_buffer_size": 4},
    "accumulated": {"gradient_accumulation_steps": 2, "position_shift": 9},
    "before a stage that the student feeds": {"stages": (ALIGN, FED)},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_groups_one_after_another_are_all_at_once(run, tmp_path, case):
    whole = run(tmp_path / "whole", **case | {"layers": None})
    groups = run(tmp_path / "groups", **{"layers": 2} | case)
    assert_same(whole, groups)
    assert_same_log(tmp_path / "whole", tmp_path / "groups")


def test_layers_that_keep_attention_belong_to_no_group(run, make_student, tmp_path):
    students = [
        run(tmp_path / str(layers), layers, student=make_student(keep_attention=(1,)), stages=(ALIGN,))
        for layers in (None, 1)
    ]
    assert_same(*students)
    assert_same_log(tmp_path / "None", tmp_path / "1")


def test_held_out_rows_are_measured_as_at_once(run, rows, tmp_path):
    for layers in (None, 2):
        run(tmp_path / str(layers), layers, held_out=rows[:3], eval_steps=2)
    assert_same_log(tmp_path / "None", tmp_path / "2")
    assert any("eval_relative_error_layer_2" in row for row in read_log(tmp_path / "2"))


def test_clipping_bounds_the_gradients_of_a_group(run, tmp_path):
    """Sums of squares are shared by a group and no more: groups of all layers clip as before."""
    whole, three = (run(tmp_path / name, layers, max_grad_norm=0.01) for name, layers in (("a", None), ("b", 3)))
    assert_same(whole, three, atol=0)


def test_only_the_layers_of_a_group_hold_gradients_and_states(run, tmp_path, monkeypatch):
    """And the optimizer of the group before is gone, with what it held."""
    alive, seen, create = [], [], DistillTrainer.create_optimizer

    def spy(self, *args):
        seen.append(len([one for one in alive if one() is not None]))
        optimizer = create(self, *args)
        alive.append(weakref.ref(optimizer))
        names = {p: name for name, p in self.student.named_parameters()}
        held = {names[p].split(".layers.")[1][0] for group in optimizer.param_groups for p in group["params"]}
        seen.append(sorted(held))
        return optimizer

    monkeypatch.setattr(DistillTrainer, "create_optimizer", spy)
    student = run(tmp_path, 2)
    assert seen == [0, ["0", "1"], 0, ["2"]]
    assert all(parameter.grad is None for parameter in student.parameters())


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    run(folder, 2)
    return folder


@pytest.mark.parametrize(
    ("owner", "name", "call", "left"),
    [
        (DistillTrainer, "compute_loss", 4, 2),  # in the first group
        (DistillTrainer, "compute_loss", 5 + 4, 2),  # in the second one, after a checkpoint
        (DistillTrainer, "compute_loss", 5 + 1, 5),  # at its beginning
        (files.os, "replace", 2, 5),  # with the first group written, but not in place
        (runner_module, "write_stage", 1, 0),  # with both groups finished
    ],
)
def test_a_killed_run_goes_on_in_the_right_group(finished, run, tmp_path, monkeypatch, owner, name, call, left):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, owner, name, call)
        run(out, 2)
    assert not (out / "align").exists() and not [*out.rglob("config.json")]
    trained, compute_loss = [], DistillTrainer.compute_loss
    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "compute_loss", lambda *a, **k: trained.append(1) or compute_loss(*a, **k))
        run(out, 2)
    assert len(trained) <= 10 - 5 * (left == 2 and call > 5) and (left or not trained)
    one, other = (load_file(folder / "align" / "model.safetensors") for folder in (finished, out))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not [*out.glob("*.running")]
    logs = [[row for row in read_log(folder) if "loss" in row] for folder in (finished, out)]
    assert [{**row, "seconds": 0} for row in logs[0]] == [{**row, "seconds": 0} for row in logs[1]]


def test_half_precision_is_kept(run, make_student, make_teacher, rows, processor, tmp_path):
    """Groups train in float32; what a group that was finished before left is rounded as at its end."""
    students = []
    for layers in (None, 2):
        students.append(make_student().bfloat16())
        values = {"per_device_train_batch_size": 2, "disable_tqdm": True, "bf16": True, "max_grad_norm": 0.0}
        config = DistillConfig(output_dir=str(tmp_path / str(layers)), use_cpu=True, layers_at_a_time=layers, **values)
        distill(config, students[-1], make_teacher().bfloat16(), rows, processor, stages=[ALIGN])
    assert students[1].dtype == torch.bfloat16
    assert_same(*students, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers_at_a_time=0 must be at least 1"),
        ({"layers": 2, "shared_teacher": False}, "layers_at_a_time=2 needs a teacher on the student's backbone"),
        ({"layers": 2, "load_best_model_at_end": True}, "leave one of them out"),
        ({"layers": 2, "stages": (FED,)}, "layers_at_a_time=2 has no effect, for no stage has hidden_input: teacher"),
        ({"layers": 2, "fsdp": True, "fsdp_config": {"version": 2}}, "layers_at_a_time=2 is for one GPU"),
    ],
)
def test_what_cannot_be_is_refused(run, rows, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", held_out=rows[:2] if "load_best_model_at_end" in changes else None, **changes)
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_its_own_is_refused(processor, rows, make_student, make_teacher, tmp_path):
    teacher = make_teacher()
    with torch.no_grad():
        teacher.model.language_model.layers[0].mlp.up_proj.weight.add_(0.1)
    config = DistillConfig(output_dir=str(tmp_path / "out"), use_cpu=True, layers_at_a_time=2)
    with pytest.raises(ValueError, match="layers_at_a_time=2 needs a teacher on the student's backbone"):
        distill(config, make_student(), teacher, rows, processor, stages=[ALIGN])


def test_another_number_of_layers_is_another_run(finished, run):
    with pytest.raises(ValueError, match="layers_at_a_time was 2, now 1"):
        run(finished, 1)
