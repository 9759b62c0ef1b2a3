"""All stages in order, each leaving a folder; a killed run continues where it was."""

import copy
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerState, set_seed

from ..conversion.teacher import check_pair
from ..files import copy_file, locked, whole_folder, write_text
from ..modeling.mixers import recurrent_layers
from .arguments import RESULT
from .collator import EncodePseudo, encode_row
from .config import DistillConfig
from .fingerprint import fingerprint_processor, fingerprint_rows, fingerprint_weights
from .lora import add_lora, merge_lora
from .plots import plot_training_log
from .recipes import read_stages
from .stages import Stage, check_stages, is_stage_name, set_trainable
from .targets.encode import encode_stored
from .targets.fill import decode_pseudo_targets, describe
from .targets.store import HEADER, PseudoTargets
from .trainer import DistillTrainer
from .training_rows import TrainingRows, check_rows, first_row, open_rows, readable_rows


SETTINGS = "distillation.json"
LOG = "training_log.jsonl"
CURVES = "loss_curves.png"
CARD = "README.md"
PSEUDO_TARGETS = "pseudo_targets"
PSEUDO_COLUMN = "pseudo_messages"
WEIGHTS = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"

# Gets a stage's complete folder, the stages so far and the rows of their logs.
FinishFolder = Callable[[Path, Sequence[Stage], list[dict[str, Any]]], object]

# The arguments that decide the result, apart from the stages. Everything else may differ when a run is continued.
ARGUMENTS = (
    *RESULT,
    "packing",
    "max_length",
    "shuffle_buffer_size",
    "slow_lr_multiplier",
    "muon",
    "position_shift",
    "temperature",
    "max_completion_length",
)


def distill(
    config: DistillConfig,
    student,
    teacher,
    dataset,
    processor,
    *,
    stages: Sequence[Stage] | None = None,
    finish_folder: FinishFolder | None = None,
) -> list[dict[str, Any]]:
    """
    Distils `teacher` into `student`, stage by stage (Algorithm 2).

    Every stage leaves `output_dir/<stage>`, a folder that `from_pretrained` opens, processor included; `output_dir`
    itself becomes the last one, with `training_log.jsonl` and `loss_curves.png`. Called again after it was killed,
    with the same arguments, it skips finished stages and resumes the running one at its last checkpoint, with the
    result that it would have had.

    Args:
        config (`DistillConfig`): the arguments.
        student (`LinMUForConditionalGeneration`): a converted model; trained in place.
        teacher (`LinMUForConditionalGeneration`): see [`load_teacher`]; not changed.
        dataset (`datasets.Dataset` or `Sequence[Mapping]`, or a stream: `datasets.IterableDataset` or `Iterable`):
            conversational rows, see [`encode_rows`].
        processor (`ProcessorMixin`): the processor of both.
        stages (`Sequence[Stage]`, *optional*): other stages than those of `config`.
        finish_folder (`Callable`, *optional*):
            called with every stage's complete folder before it gets its name, the stages so far and the rows of their
            logs, for example to add a model card.

    Returns:
        `list[dict]`: the rows of `training_log.jsonl`.

    Raises:
        `ValueError`: a bad row, `push_to_hub`, or an `output_dir` with a distillation of other settings.
        `BlockingIOError`: another run is writing to `output_dir`.
        `FloatingPointError`: a loss that is not finite.
    """
    config.refuse_push_to_hub()
    stages = config.get_stages() if stages is None else read_stages(stages)
    out = Path(config.output_dir)
    check_output(config)
    features = open_rows(config, processor, dataset)
    _check_inputs(config, student, teacher, features)
    check_stages(student, stages)
    _check_pseudo_targets(config, stages, teacher, features)
    settings = _settings(config, stages, student, teacher, features)
    with locked(out):
        _prepare_output(out, settings, config.overwrite_output_dir)
        finished = list(takewhile(lambda stage: (out / stage.name).is_dir(), stages))
        if finished:
            _load_weights(student, out / finished[-1].name)
        for index, stage in enumerate(stages[len(finished) :], len(finished)):
            features.encode_pseudo = _pseudo_encoder(config, teacher, features, out) if stage.seq else None
            args = _stage_arguments(config, index, out / f"{stage.name}.running")
            _run_stage(args, stages[: index + 1], student, teacher, features, out, finish_folder)
        rows = _logged(out, stages)
        _publish(out / stages[-1].name, out, rows)
    return rows


def _run_stage(
    args: DistillConfig,
    stages: Sequence[Stage],
    student,
    teacher,
    features: TrainingRows,
    out: Path,
    finish_folder: FinishFolder | None,
) -> None:
    """Runs the last of `stages`, the others being finished."""
    stage, running = stages[-1], Path(args.output_dir)
    set_seed(args.seed)  # LoRA starts from random numbers
    if stage.lora_r:
        add_lora(student, stage.lora_r, stage.alpha())
    set_trainable(student, stage)
    dtypes = _train_in_fp32(student)
    # The Trainer writes its own choice into the config, which the stage's folder would keep.
    use_cache = student.config.__dict__.get("use_cache")
    trainer = DistillTrainer(student, teacher, args, stage, features)
    checkpoint = _last_checkpoint(running)
    state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json") if checkpoint else TrainerState()
    if state.global_step < stage.max_steps:
        trainer.train(resume_from_checkpoint=checkpoint)
    else:  # killed after the last step, which the Trainer would follow by one more
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = state

    student.config.__dict__.pop("use_cache", None)
    if use_cache is not None:
        student.config.use_cache = use_cache
    if args.gradient_checkpointing:  # the name in every Transformers of the range
        student.gradient_checkpointing_disable()
        student.disable_input_require_grads()
    _finish_training(student, stage, dtypes)
    rows = [{"stage": stage.name, **row} for row in trainer.state.log_history]
    _write_stage(out, stages, student, features.processor, rows, finish_folder)
    shutil.rmtree(running, ignore_errors=True)


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


def _stage_arguments(config: DistillConfig, index: int, running: Path) -> DistillConfig:
    args = copy.copy(config)
    args.output_dir = str(running)
    args.seed = config.seed + index  # another order of the rows in every stage
    if config.data_seed is not None:
        args.data_seed = config.data_seed + index
    return args


def _train_in_fp32(student: nn.Module) -> dict[str, torch.dtype]:
    """Turns half-precision parameters that train into fp32, for small updates count; returns what they were."""
    dtypes = {name: p.dtype for name, p in student.named_parameters() if p.requires_grad and p.dtype.itemsize < 4}
    for name, parameter in student.named_parameters():
        if name in dtypes:
            parameter.data = parameter.data.float()
    return dtypes


def _pseudo_encoder(config: DistillConfig, teacher, features: TrainingRows, out: Path) -> EncodePseudo:
    """Returns what encodes a row with the teacher's answers: from a column, from a store, or decoded into one now."""
    processor = features.processor
    if PSEUDO_COLUMN in first_row(features):
        return partial(_encode_column, processor)
    folder = out / PSEUDO_TARGETS if config.pseudo_targets is None else Path(config.pseudo_targets)
    if config.pseudo_targets is None:
        decode_pseudo_targets(
            teacher.eval().to(config.device),
            processor,
            readable_rows(features),
            folder,
            max_new_tokens=config.max_completion_length,
            batch_size=config.per_device_train_batch_size,
            shard=(config.process_index, config.world_size),
        )
        PartialState().wait_for_everyone()
    return partial(encode_stored, PseudoTargets(folder), processor)


def _encode_column(processor, row, index: int):
    return encode_row(processor, {**row, "messages": row[PSEUDO_COLUMN]}, index)


# ---- Before work starts


def _check_inputs(config: DistillConfig, student, teacher, features: TrainingRows) -> None:
    if find_spec("matplotlib") is None:  # said now and not after the first stage
        raise ImportError('the curves of a distillation need matplotlib: pip install "linmu-hf[train]"')
    check_pair(student.config, teacher.config)
    check_rows(config, features)
    if student.dtype.itemsize < 4 and not config.bf16:
        raise ValueError(f"the student is in {student.dtype}: load it in float32, or train in mixed precision (bf16)")
    if not recurrent_layers(student.config.text_config.layer_types):
        raise ValueError("the student has no M-MATE layer to train: convert the teacher with `linmu-convert` first")


def _check_pseudo_targets(config: DistillConfig, stages: Sequence[Stage], teacher, features: TrainingRows) -> None:
    """Raises a `ValueError` unless `pseudo_targets` is used and holds this teacher's answers to all rows."""
    if config.pseudo_targets is None:
        return
    given = f"pseudo_targets={config.pseudo_targets!r}"
    if not any(stage.seq for stage in stages):
        raise ValueError(f"{given} has no effect: no stage learns from the teacher's answers, which `seq` weighs")
    if PSEUDO_COLUMN in first_row(features):
        raise ValueError(f"{given} has no effect: the dataset has a column {PSEUDO_COLUMN}; leave one of them out")
    made_of = describe(teacher, features.processor, config.max_completion_length)
    PseudoTargets(config.pseudo_targets, made_of).check_rows(readable_rows(features))


def _settings(config, stages, student, teacher, features) -> dict[str, Any]:
    """All that decides the result; a run is continued only if it is the same."""
    settings = {name: getattr(config, name) for name in ARGUMENTS}
    settings |= {
        "stages": {stage.name: asdict(stage) for stage in stages},
        "student": fingerprint_weights(student),
        "teacher": fingerprint_weights(teacher),
        "processor": fingerprint_processor(features.processor),
        "dataset": fingerprint_rows(features.rows),
    }
    return json.loads(json.dumps(settings, default=str))


def check_output(config: DistillConfig) -> None:
    """Raises a `ValueError` if `output_dir` is a file, or holds a model that no distillation put there."""
    out = Path(config.output_dir)
    if out.is_file():
        raise ValueError(f"{out} is a file: name a folder as output_dir")
    if (out / "config.json").exists() and not (out / SETTINGS).exists():
        raise ValueError(f"{out} holds a model that no distillation put there: choose another output_dir")


def _prepare_output(out: Path, settings: dict[str, Any], overwrite: bool) -> None:
    file = out / SETTINGS
    old = _read_settings(file) if file.exists() else None
    if old and overwrite:
        _delete_run(out, [*old["stages"], *settings["stages"]])
        old = None
    if old:
        differing = _differences(old, settings)
        if differing:
            raise ValueError(
                f"{out} holds a distillation with other settings: {'; '.join(differing)}. Use these to continue it, "
                "another output_dir, or --overwrite_output_dir to start anew"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(settings, indent=2) + "\n")


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text())
        if isinstance(settings["stages"], dict):
            return settings
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"{file} is none that a distillation wrote: delete it, or choose another output_dir")


def _delete_run(out: Path, names: Sequence[str]) -> None:
    """Deletes what a run wrote into `out`: the folders of its stages, whose names are checked, and its own files."""
    for name in filter(is_stage_name, names):
        if (out / name / LOG).is_file():
            shutil.rmtree(out / name, ignore_errors=True)
        for suffix in (".running", ".partial", ".old"):
            shutil.rmtree(out / f"{name}{suffix}", ignore_errors=True)
    if (out / PSEUDO_TARGETS / HEADER).is_file():
        shutil.rmtree(out / PSEUDO_TARGETS)
    weights = (path for path in out.glob("model*.safetensors*") if re.fullmatch(WEIGHTS, path.name))
    for path in (*weights, *(out / name for name in ("config.json", LOG, CURVES, CARD, SETTINGS))):
        path.unlink(missing_ok=True)


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [text for key in keys for text in _differences(old.get(key), new.get(key), f"{name}.{key}".strip("."))]
    return [] if old == new else [f"{name} was {_brief(old)}, now {_brief(new)}"]


def _brief(value: Any) -> str:
    return "absent" if value is None else "there" if isinstance(value, dict) else str(value)


# ---- Folders


def _last_checkpoint(running: Path) -> str | None:
    """The newest complete checkpoint: the Trainer writes its state last, so one without it is half written."""
    numbered = {int(path.name.split("-")[1]): path for path in running.glob("checkpoint-*")}
    for _, path in sorted(numbered.items(), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        except (OSError, ValueError):
            shutil.rmtree(path)
    return None


def _write_stage(
    out: Path,
    stages: Sequence[Stage],
    student,
    processor,
    rows: list[dict[str, Any]],
    finish_folder: FinishFolder | None,
) -> None:
    """Writes the folder under another name first, so that it is there whole or not at all."""
    with whole_folder(out / stages[-1].name) as folder:
        student.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / LOG).write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = _logged(out, stages[:-1]) + rows
        plot_training_log(rows, folder / CURVES)
        if finish_folder is not None:
            finish_folder(folder, stages, rows)


def _logged(out: Path, stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """The rows of the logs of finished stages."""
    return [json.loads(line) for stage in stages for line in (out / stage.name / LOG).read_text().splitlines()]


def _load_weights(student, folder: Path) -> None:
    saved = type(student).from_pretrained(folder, dtype=student.dtype)
    student.load_state_dict(saved.state_dict())


def _publish(stage: Path, out: Path, rows: list[dict[str, Any]]) -> None:
    """
    Copies the last stage into `out`; the config comes last, so `out` loads only when it is complete. A card that is
    there may have been edited, and stays.
    """
    files = (path for path in stage.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path.name == "config.json"):
        target = out / path.relative_to(stage)
        if path.name != LOG and not (path.name == CARD and target.exists()):
            target.parent.mkdir(exist_ok=True, parents=True)
            copy_file(path, target)
    write_text(out / LOG, "".join(json.dumps(row) + "\n" for row in rows))
