"""Held-out rows: figures equal to those computed by hand, without a trace in the training, and the best weights."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import Killed, kill_at
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState
from transformers.integrations import integration_utils

from linmu_hf.data.skipping import SkippedRows
from linmu_hf.distillation import DistillConfig, Stage, distill
from linmu_hf.distillation.checkpoints import TRAINED_WEIGHTS
from linmu_hf.distillation.held_out import own_batches
from linmu_hf.distillation.losses import IGNORE_INDEX
from linmu_hf.distillation.plots import error_columns, plot_error_map
from linmu_hf.distillation.rows.collator import EncodedDataset, collate
from linmu_hf.distillation.stages import FLEX, LORA, SWIN, set_trainable
from linmu_hf.distillation.trainer import DistillTrainer


pytestmark = pytest.mark.core_training

TRAIN, HELD_OUT = slice(0, 6), slice(6, 10)
ALIGN = Stage("align", trains=(FLEX,), max_steps=4, learning_rate=3e-3, hid=0.1, hidden_input="teacher")
FED = Stage("fed", trains=(FLEX, SWIN), max_steps=4, learning_rate=3e-3, hid=0.1, tok=0.5, sup=0.2)
ADAPT = Stage("adapt", trains=(FLEX, LORA), max_steps=4, learning_rate=3e-3, tok=0.5, seq=0.3, lora_r=2)


def config(folder, **changes):
    values = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "max_completion_length": 3,
        "logging_steps": 2,
        "save_steps": 2,
        "disable_tqdm": True,
    }
    return DistillConfig(output_dir=str(folder), use_cpu=True, **values | changes)


@pytest.fixture(scope="module")
def run(rows, processor, make_student, make_teacher):
    def run(folder, stages=(ALIGN, FED), held_out=True, **changes):
        student = make_student()
        given = rows[HELD_OUT] if held_out else None
        distill(
            config(folder, **changes),
            student, make_teacher(), rows[TRAIN], processor, eval_dataset=given, stages=stages,
        )  # fmt: skip
        return student

    return run


def log_of(folder):
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def weights(student):
    return {name: value.clone() for name, value in student.state_dict().items()}


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def make_trainer(tmp_path, rows, processor, make_student, make_teacher):
    def make(stage, held_out=None, **changes):
        student = make_student()
        set_trainable(student, stage)
        train, other = (EncodedDataset(processor, part) for part in (rows[TRAIN], held_out or rows[HELD_OUT]))
        arguments = config(tmp_path, eval_steps=2, **changes)
        return DistillTrainer(student, make_teacher(), arguments, stage, train, other)

    return make


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_figures_are_means_over_what_all_rows_count(make_trainer, packing):
    """By hand: one row at a time, sums divided by the counts of the whole set."""
    trainer = make_trainer(FED, packing=packing)
    found = trainer.evaluate()
    student, teacher = trainer.student.eval(), trainer.teacher.as_model()
    tok = sup = agree = tokens = answers = 0.0
    errors, energies = torch.zeros(3).double(), torch.zeros(3).double()
    for index in range(len(trainer.eval_dataset)):
        batch = collate([trainer.eval_dataset[index]["row"]], 0)
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            s, t = (model(**batch, output_mixer_states=True) for model in (student, teacher))
        at = labels != IGNORE_INDEX
        ours, theirs = (o.logits[:, :-1][at].double().log_softmax(-1) for o in (s, t))
        tok += float((theirs.exp() * (theirs - ours)).sum())
        sup += float(-ours.gather(-1, labels[at][:, None]).sum())
        agree += float((ours.argmax(-1) == theirs.argmax(-1)).sum())
        answers += int(at.sum())
        tokens += batch["input_ids"].numel()
        errors += torch.stack([(a - b).double().square().sum() for a, b in zip(s.mixer_outputs, t.mixer_outputs)])
        energies += torch.stack([b.double().square().sum() for b in t.mixer_outputs])
    expected = {
        "eval_loss_hid": float(errors.mean() / tokens),
        "eval_loss_tok": tok / answers,
        "eval_loss_sup": sup / answers,
        "eval_agreement": agree / answers,
        "eval_relative_error": float((errors / energies).mean()),
    }
    expected |= {f"eval_relative_error_layer_{i}": float(errors[i] / energies[i]) for i in range(3)}
    expected["eval_loss"] = 0.1 * expected["eval_loss_hid"] + 0.5 * tok / answers + 0.2 * sup / answers
    assert found.keys() == expected.keys() | {"eval_runtime"}
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-4), key


def test_teacher_fed_figures_are_those_of_the_loss(make_trainer):
    trainer = make_trainer(ALIGN, per_device_eval_batch_size=4)
    found = trainer.evaluate()
    assert all(parameter.grad is None for parameter in trainer.student.parameters())
    collated = trainer.data_collator([trainer.eval_dataset[index] for index in range(4)])
    loss = trainer.compute_loss(trainer.model, collated)
    assert found["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert found["eval_loss_hid"] == pytest.approx(loss.item() / 0.1, rel=1e-4)


def states():
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


@pytest.mark.parametrize("stage", [ALIGN, FED], ids=["align", "fed"])
def test_evaluation_leaves_no_trace(make_trainer, stage):
    trainer = make_trainer(stage, position_shift=5)
    trainer.model.train()
    modes = [module.training for module in trainer.model.modules()]
    before, random_before = weights(trainer.student), states()
    trainer.evaluate()
    assert states() == random_before and equal(before, weights(trainer.student))
    assert [module.training for module in trainer.model.modules()] == modes
    assert all(parameter.grad is None for parameter in trainer.student.parameters())


def test_rows_that_cannot_be_read_do_not_count(make_trainer, rows):
    bad = {**rows[0], "images": []}
    trainer = make_trainer(FED, [bad, *rows[HELD_OUT], bad], per_device_eval_batch_size=1)
    trainer.eval_dataset.skipped = SkippedRows(9)
    whole = make_trainer(FED).evaluate()
    for key, value in trainer.evaluate().items():
        assert key == "eval_runtime" or value == pytest.approx(whole[key], rel=1e-4), key


def test_every_process_has_as_many_batches():
    for processes in (1, 2, 3):
        shares = [own_batches(7, 2, processes, process) for process in range(processes)]
        assert len({len(share) for share in shares}) == 1
        found = [tuple(batch) for share in zip(*shares, strict=True) for batch in share]
        assert found[:4] == [(0, 1), (2, 3), (4, 5), (6,)] and set(found[4:]) <= {(0,)}


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    stages = (ALIGN, FED, ADAPT)
    return folder, run(folder, stages, eval_steps=3, eval_on_start=True)


def test_training_is_that_without_held_out_rows(run, evaluated, tmp_path):
    assert equal(weights(evaluated[1]), weights(run(tmp_path / "out", (ALIGN, FED, ADAPT), held_out=False)))


def test_the_log_has_the_figures_of_every_stage(evaluated):
    folder, _ = evaluated
    rows = [row for row in log_of(folder) if "eval_loss" in row]
    assert [(row["stage"], row["step"]) for row in rows] == [
        (stage, step) for stage in ("align", "fed", "adapt") for step in (0, 3, 4)
    ]
    layers = {f"eval_relative_error_layer_{index}" for index in range(3)} | {"eval_relative_error"}
    assert rows[0].keys() >= layers | {"eval_loss_hid"}
    assert rows[3].keys() >= layers | {"eval_loss_hid", "eval_loss_tok", "eval_loss_sup", "eval_agreement"}
    assert rows[6].keys() >= layers | {"eval_loss_tok", "eval_loss_seq", "eval_agreement"}
    assert [row["seconds"] for row in log_of(folder / "fed") if "seconds" in row][-1] > 0
    for name in ("loss_curves.png", "error_map.png"):
        assert (folder / name).stat().st_size > 5_000 and (folder / "align" / name).is_file()


def test_a_killed_run_with_evaluation_ends_with_the_same_weights(run, evaluated, tmp_path, monkeypatch):
    values = {"eval_steps": 3, "eval_on_start": True}
    with monkeypatch.context() as patch:
        kill_at(patch, DistillTrainer, "training_step", 8)  # after an evaluation that no checkpoint has seen
        with pytest.raises(Killed):
            run(tmp_path / "out", (ALIGN, FED, ADAPT), **values)
    student = run(tmp_path / "out", (ALIGN, FED, ADAPT), **values)
    assert equal(weights(evaluated[1]), weights(student))

    def figures(folder):
        keys = ("eval_loss", "eval_relative_error")
        return [[row["stage"], row["step"], *map(row.get, keys)] for row in log_of(folder) if "eval_loss" in row]

    assert figures(tmp_path / "out") == figures(evaluated[0])


# ---- The best weights

# Far too fast, so that the last weights are not the best.
WILD = Stage("wild", trains=(FLEX, SWIN), max_steps=6, learning_rate=0.5, hid=0.1, tok=0.5)
BEST = {"load_best_model_at_end": True, "eval_steps": 1, "save_steps": 2, "warmup_steps": 3}


def spied(monkeypatch):
    """Keeps the weights of every evaluation by its step."""
    evaluate, seen = DistillTrainer.evaluate, {}

    def spy(self, *args, **kwargs):
        seen[self.state.global_step] = weights(self.student)
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(DistillTrainer, "evaluate", spy)
    return seen


@pytest.fixture(scope="module")
def best(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("best") / "out"
    with pytest.MonkeyPatch.context() as patch:
        seen = spied(patch)
        student = run(folder, (WILD,), **BEST)
    return folder, student, seen


def test_a_stage_ends_with_the_weights_of_its_best_evaluation(best):
    folder, student, seen = best
    losses = {row["step"]: row["eval_loss"] for row in log_of(folder) if "eval_loss" in row}
    step = min(losses, key=losses.get)
    assert step != WILD.max_steps and [r["best_step"] for r in log_of(folder) if "best_step" in r] == [step]
    assert equal(seen[step], weights(student)) and not equal(seen[WILD.max_steps], weights(student))
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, seen[step][name]) for name, value in saved.items())


def test_best_weights_after_a_kill(run, best, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, DistillTrainer, "training_step", 4)
        with pytest.raises(Killed):
            run(tmp_path / "out", (WILD,), **BEST)
    (tmp_path / "out").rename(tmp_path / "moved")
    assert equal(weights(run(tmp_path / "moved", (WILD,), **BEST)), weights(best[1]))


def test_best_weights_of_a_run_killed_after_its_last_step(run, best, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "_load_best_model", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(tmp_path / "out", (WILD,), **BEST)
    state = TrainerState.load_from_json(sorted((tmp_path / "out").glob("*/checkpoint-6"))[0] / "trainer_state.json")
    assert load_file(f"{state.best_model_checkpoint}/{TRAINED_WEIGHTS}")
    (tmp_path / "out").rename(tmp_path / "moved")
    assert equal(weights(run(tmp_path / "moved", (WILD,), **BEST)), weights(best[1]))


def test_what_decides_the_best_is_a_setting(run, best):
    with pytest.raises(ValueError, match=r"load_best_model_at_end\.eval_steps was 1, now 2"):
        run(best[0], (WILD,), **BEST | {"eval_steps": 2})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": False, "eval_steps": 2}, "no effect without held-out rows: give eval_dataset"),
        ({"held_out": False, "load_best_model_at_end": True}, "no effect without held-out rows: give eval_dataset"),
        ({"held_out": False, "do_eval": True}, "no effect without held-out rows: give eval_dataset"),
        ({"load_best_model_at_end": True, "save_steps": 3, "eval_steps": 2}, "3, which is not a round multiple of 2"),
        ({"load_best_model_at_end": True, "save_strategy": "no"}, "save and eval strategy to match"),
        ({"metric_for_best_model": "agreement"}, "no effect without load_best_model_at_end"),
        (
            {"load_best_model_at_end": True, "metric_for_best_model": "eval_agreement"},
            "'eval_agreement' is not measured in align: choose one of .*'loss', 'loss_hid', 'relative_error'",
        ),
        ({"eval_strategy": "epoch"}, "eval_strategy='epoch' is not supported"),
    ],
)
def test_refused(run, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_streams_and_bad_rows_are_refused(rows, processor, make_student, make_teacher, tmp_path):
    for held_out, message in (
        (iter(rows), "eval_dataset has no length: take some rows"),
        ([rows[0], {**rows[1], "images": []}], "eval_dataset: row 1 "),
        ([], "eval_dataset: the dataset has no rows"),
    ):
        with pytest.raises(ValueError, match=message):
            distill(config(tmp_path / "out"), make_student(), make_teacher(), rows, processor, eval_dataset=held_out)
    assert not (tmp_path / "out").exists()


def test_a_better_figure_may_be_larger(tmp_path):
    for metric, larger in (("agreement", True), ("eval_loss_tok", False), ("relative_error_layer_1", False)):
        arguments = config(tmp_path, load_best_model_at_end=True, metric_for_best_model=metric)
        assert arguments.greater_is_better == larger and arguments.eval_steps == arguments.save_steps


# ---- What is seen of it


def test_trackers_get_every_figure_once_under_the_name_of_the_stage(run, tmp_path, monkeypatch):
    told = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told.extend((args.run_name, state.global_step, key) for key in logs if key != "epoch")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "ours", Tracker)
    run(tmp_path / "out", eval_steps=2, report_to=["ours"], run_name="mine")
    assert {name for name, *_ in told} == {"mine-align", "mine-fed"}
    assert len(set(told)) == len(told)
    for stage in ("align", "fed"):
        assert {("mine-" + stage, step, "eval_loss") for step in (2, 4)} <= set(told)
        assert {("mine-" + stage, step, "loss_hid") for step in (2, 4)} <= set(told)


@pytest.mark.parametrize("given, layers", [(None, None), ("elsewhere", None), (None, 2)])
def test_tensorboard_writes_where_it_stays(run, tmp_path, monkeypatch, given, layers):
    class Writer:
        def __init__(self, log_dir):
            self.file = Path(log_dir) / "events.out.tfevents.1"
            self.file.parent.mkdir(parents=True, exist_ok=True)

        def add_scalar(self, name, value, step):
            with open(self.file, "a") as file:
                file.write(f"{step} {name}\n")

        add_text = flush = close = lambda self, *given: None

    class Ours(integration_utils.TensorBoardCallback):
        def __init__(self):
            self._SummaryWriter, self.tb_writer = Writer, None
            self.logging_dir = None if given is None else str(tmp_path / given)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "ours", Ours)
    run(tmp_path / "out", eval_steps=2, report_to=["ours"], run_name="mine", layers_at_a_time=layers)
    stages = ("align", "fed") if layers is None else ("align/layers-0-1", "align/layers-2-2", "fed")
    folders = {tmp_path / "out" / "runs" / name for name in stages}
    if given:
        folders = {tmp_path / given / f"mine-{name}" for name in ("align", "fed")}
    assert {file.parent for file in tmp_path.rglob("events.out.*")} == folders
    for folder in folders:
        assert "4 train/loss_hid\n" in (folder / "events.out.tfevents.1").read_text()
    if given is None:
        (tmp_path / "out" / "runs" / "mine.txt").write_text("mine")
        run(tmp_path / "out", eval_steps=2, report_to=[], overwrite_output_dir=True, layers_at_a_time=layers)
        assert [file.name for file in (tmp_path / "out" / "runs").rglob("*") if file.is_file()] == ["mine.txt"]


def test_the_progress_bar_says_which_stage_of_how_many(run, tmp_path, capsys):
    run(tmp_path / "out", eval_steps=2, disable_tqdm=False)
    shown = capsys.readouterr()
    assert "align (1 of 2)" in shown.err and "fed (2 of 2)" in shown.err and "loss " in shown.err
    assert "relative_error_layer" not in shown.out + shown.err


def test_the_error_map_has_a_column_for_each_logged_row(tmp_path):
    rows = [
        {"stage": "one", "step": 2, "loss": 1.0, "relative_error_layer_0": 0.5, "relative_error_layer_3": 0.25},
        {"stage": "one", "step": 3, "loss": 1.0, "relative_error_layer_0": 0.4, "relative_error_layer_3": 0.2},
        {"stage": "two", "step": 4, "loss": 1.0},
    ]
    edges, columns = error_columns(rows, {"one": 0, "two": 3}, [0, 3])
    assert edges == [0, 2, 3, 7] and columns[:2] == [[0.5, 0.25], [0.4, 0.2]] and np.isnan(columns[2]).all()
    plot_error_map(rows, tmp_path / "map.png")
    plot_error_map(rows[2:], tmp_path / "none.png")
    assert (tmp_path / "map.png").is_file() and (tmp_path / "none.png").is_file()
