"""One stage of a distillation from its first step to its last: as a whole, or a few layers after one another."""

import copy
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState
from transformers.integrations import TensorBoardCallback

from ..modeling.compat import checkpoint_activations
from .checkpoints import load_trained
from .config import DistillConfig
from .engines.processes import on_main
from .engines.wrapping import is_sharded
from .folders import EVENTS, last_checkpoint, read_log, write_group
from .layerwise.layer_groups import freeze_others, group_name, layer_groups, merge_logs
from .layerwise.offload import open_offload
from .lora import merge_lora
from .rows.collator import EncodedDataset
from .rows.training_rows import TrainingRows
from .stages import Stage, set_trainable
from .teacher import SharedTeacher, Teacher
from .trainer import DistillTrainer


@dataclass(frozen=True)
class StageRun:
    """
    All that the training of a stage takes.

    Args:
        args (`DistillConfig`): The arguments; `output_dir` is where checkpoints go.
        stage (`Stage`), student, teacher, layers: See [`DistillTrainer`].
        title (`str`): What the progress bar is called.
        features, held_out: The rows.
    """

    args: DistillConfig
    stage: Stage
    title: str
    student: Any
    teacher: Teacher
    features: TrainingRows
    held_out: EncodedDataset | None
    layers: Sequence[int] | None = None


def train_stage(run: StageRun) -> list[dict[str, Any]]:
    """
    Trains a stage from where it was left, adapters being in place, and returns the rows of its log; the student is an
    ordinary model afterwards.
    """
    set_trainable(run.student, run.stage)
    if run.args.layers_at_a_time and run.stage.hidden_input == "teacher":
        return _train_groups(run)
    dtypes = _train_in_fp32(run.student)
    rows = _train(run)
    _finish_training(run.student, run.stage, dtypes)
    return rows


def _train_groups(run: StageRun) -> list[dict[str, Any]]:
    """
    Trains a few layers after one another, with all steps of the stage for each group of them; returns the rows of one
    log. A group that is finished leaves a folder of its own until its stage is. All other layers are in CPU memory.
    """
    args, stage, student, teacher = run.args, run.stage, run.student, run.teacher
    assert args.layers_at_a_time and isinstance(teacher, SharedTeacher)
    logs, running = [], Path(args.output_dir)
    with open_offload(student, teacher, args.device).active() as offload:
        for layers in layer_groups(student, args.layers_at_a_time):
            name = group_name(layers)
            folder, own = running / name, copy.copy(args)
            own.output_dir, own.run_name = f"{folder}.running", f"{args.run_name}-{name}"
            set_trainable(student, stage)
            freeze_others(student, layers)
            dtypes = _train_in_fp32(student)
            if folder.is_dir():
                load_trained(student, folder)
            else:
                with offload.training(layers):
                    rows = _train(replace(run, args=own, title=f"{run.title}, {name}", layers=layers))
                write_group(folder, student, rows)
                shutil.rmtree(own.output_dir, ignore_errors=True)
            _finish_training(student, stage, dtypes)
            logs.append(read_log(folder))
    return merge_logs(logs)


@contextmanager
def _own_tracker() -> Iterator[None]:
    """Ends the run of W&B that a stage has begun, or the next stage would go on in it, under the same name."""
    before = getattr(sys.modules.get("wandb"), "run", None)
    yield
    tracker: Any = sys.modules.get("wandb")
    if before is None and getattr(tracker, "run", None) is not None:
        tracker.finish()


def _keep_events(trainer: DistillTrainer, run: StageRun) -> None:
    """Lets TensorBoard write where its files stay; by default they would be deleted with the stage's checkpoints."""
    out, place = Path(run.args.output_dir).parent, run.stage.name
    if run.layers is not None:  # their folder is within the stage's
        out, place = out.parent, f"{place}/{group_name(run.layers)}"
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            given = callback.logging_dir  # TENSORBOARD_LOGGING_DIR, which runs may share
            callback.logging_dir = str(out / EVENTS / place) if given is None else f"{given}/{run.args.run_name}"


def _train(run: StageRun) -> list[dict[str, Any]]:
    """
    Trains the student, from the last checkpoint on if there is one, and leaves it with the best weights if they are
    asked for; returns the rows of the log.
    """
    args, stage = run.args, run.stage
    running = Path(args.output_dir)
    # FSDP2 and ZeRO take a model apart for good: they get one of their own.
    ours = (run.student, run.teacher)
    student, teacher = copy.deepcopy(ours) if is_sharded(args) else ours
    # The Trainer writes its own choice into the config, which the stage's folder would keep.
    use_cache = student.config.__dict__.get("use_cache")
    trainer = DistillTrainer(student, teacher, args, stage, run.features, run.held_out, run.title, run.layers)
    _keep_events(trainer, run)
    checkpoint = on_main(lambda: last_checkpoint(running))
    state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json") if checkpoint else TrainerState()
    trainer.args.eval_on_start &= checkpoint is None
    if state.global_step < stage.max_steps:
        with _own_tracker():
            trainer.train(resume_from_checkpoint=checkpoint)
        state = trainer.state
    else:  # killed after the last step; resuming would train one step too many
        best = args.load_best_model_at_end and state.best_model_checkpoint
        trainer._load_from_checkpoint(running / Path(best).name if best else checkpoint)  # the folder may have moved
    rows = state.log_history
    if args.load_best_model_at_end and state.best_model_checkpoint:
        rows = [*rows, {"step": state.global_step, "best_step": state.best_global_step}]

    if student is not ours[0]:
        trainer.save_model(str(running / "trained"))
        on_main(lambda: None)
        load_trained(ours[0], running / "trained")
        return rows
    student.config.__dict__.pop("use_cache", None)
    if use_cache is not None:
        student.config.use_cache = use_cache
    if args.gradient_checkpointing:  # the name in every Transformers of the range
        checkpoint_activations(student, False)
    return rows


def _finish_training(student: nn.Module, stage: Stage, dtypes: dict[str, torch.dtype]) -> None:
    """Back to an ordinary model: adapters merged, nothing trainable, the dtypes of before."""
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise FloatingPointError(
                f"{stage.name}: {name} is not finite after the last step: lower its learning rate"
            )
    merge_lora(student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(False)
        if name in dtypes:
            parameter.data = parameter.data.to(dtypes[name])
    student.eval()


def _train_in_fp32(student: nn.Module) -> dict[str, torch.dtype]:
    """Turns half-precision parameters that train into fp32, for small updates count; returns what they were."""
    dtypes = {name: p.dtype for name, p in student.named_parameters() if p.requires_grad and p.dtype.itemsize < 4}
    for name, parameter in student.named_parameters():
        if name in dtypes:
            parameter.data = parameter.data.float()
    return dtypes
