"""All stages in order, each leaving a folder; a killed run continues where it was."""

import copy
import json
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy

from ..conversion.teacher import check_pair
from ..files import disk_errors, locked
from ..modeling.mixers import recurrent_layers
from .arguments import RESULT, check_layers_at_a_time
from .config import DistillConfig
from .engines.processes import on_main
from .engines.zero import check_zero_stages
from .fingerprint import fingerprint_processor, fingerprint_rows, fingerprint_weights
from .folders import (
    PSEUDO_TARGETS,
    FinishFolder,
    check_output,
    logged,
    prepare_output,
    publish,
    write_stage,
)
from .held_out import check_evaluation
from .lora import add_lora
from .on_policy import check_on_policy
from .recipes import read_stages
from .rows.collator import EncodedDataset, EncodePseudo, encode_row
from .rows.training_rows import TrainingRows, check_rows, first_row, open_held_out, open_rows, readable_rows
from .stage_training import StageRun, train_stage
from .stages import Stage, check_stages
from .targets.encode import encode_stored, stored_topk
from .targets.fill import decode_pseudo_targets, describe
from .targets.store import PseudoTargets
from .teacher import SharedTeacher, Teacher, as_teacher


PSEUDO_COLUMN = "pseudo_messages"

# The arguments that decide the result, apart from the stages. Everything else may differ when a run is continued.
ARGUMENTS = (
    *RESULT,
    "packing",
    "layers_at_a_time",
    "max_length",
    "shuffle_buffer_size",
    "slow_lr_multiplier",
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
    eval_dataset=None,
    stages: Sequence[Stage] | None = None,
    finish_folder: FinishFolder | None = None,
) -> list[dict[str, Any]]:
    """
    Distils `teacher` into `student`, stage by stage (Algorithm 2).

    Every stage leaves `output_dir/<stage>`, a folder that `from_pretrained` opens, processor included; `output_dir`
    itself becomes the last one, with `training_log.jsonl`, `loss_curves.png` and `error_map.png`. Called again after
    it was killed, with the same arguments, it skips finished stages and resumes the running one at its last
    checkpoint, with the result that it would have had.

    Args:
        config (`DistillConfig`): the arguments.
        student (`LinMUForConditionalGeneration`): a converted model; trained in place.
        teacher (`LinMUForConditionalGeneration`): see [`load_teacher`]; not changed.
        dataset (`datasets.Dataset` or `Sequence[Mapping]`, or a stream: `datasets.IterableDataset` or `Iterable`):
            conversational rows, see [`encode_rows`].
        processor (`ProcessorMixin`): the processor of both.
        eval_dataset (`datasets.Dataset` or `Sequence[Mapping]`, *optional*):
            held-out rows, which are measured as the others are, every `eval_steps`.
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
        `OSError`: `output_dir` cannot be written any more, its disk being full; the same call goes on.
    """
    config.refuse_push_to_hub()
    stages = config.get_stages() if stages is None else read_stages(stages)
    check_layers_at_a_time(config, stages)
    out = Path(config.output_dir)
    on_main(lambda: check_output(config))
    check_on_policy(config, stages)
    features = open_rows(config, processor, dataset)
    _check_inputs(config, stages, student, teacher, features)
    check_stages(student, stages)
    check_zero_stages(config, student, stages)
    config = _evaluating(config) if eval_dataset is not None else config
    check_evaluation(config, stages, _replaced(student), eval_dataset is not None)
    held_out = open_held_out(config, processor, eval_dataset)
    teacher = _teacher(config, stages, student, teacher)
    store, answers = _open_pseudo_targets(config, stages, teacher, features)
    if held_out is not None:
        _open_pseudo_targets(config, stages, teacher, held_out)
    with disk_errors(out), ExitStack() as held:
        on_main(lambda: held.enter_context(locked(out)) and None)

        def prepare() -> int:
            settings = _settings(config, stages, student, teacher, features, held_out, store, answers)
            prepare_output(out, settings, config.overwrite_output_dir)
            return len(list(takewhile(lambda stage: (out / stage.name).is_dir(), stages)))

        finished = on_main(prepare)
        if finished:
            _load_weights(student, out / stages[finished - 1].name)
        for index, stage in enumerate(stages[finished:], finished):
            for rows in (features, held_out):
                if rows is not None:
                    rows.encode_pseudo = _pseudo_encoder(config, teacher, rows, out) if stage.seq else None
                    rows.stored_topk = partial(stored_topk, store) if store and store.top_k and stage.tok else None
            args = _stage_arguments(config, index, stage, out)
            title = f"{stage.name} ({index + 1} of {len(stages)})"
            _run_stage(args, stages[: index + 1], title, student, teacher, features, held_out, out, finish_folder)
        on_main(lambda: publish(out / stages[-1].name, out, logged(out, stages)))
        return on_main(lambda: logged(out, stages))


def why_separate(student, stages: Sequence[Stage]) -> str | None:
    """Returns why the teacher cannot share the student's backbone, which some stage changes, or `None`."""
    replaced = recurrent_layers(student.config.text_config.layer_types)
    mixers = tuple(f"model.language_model.layers.{index}.mixer." for index in replaced)
    backbone = [name for name, _ in student.named_parameters() if not name.startswith(mixers)]
    for stage in stages:
        trained = [name for name in backbone if any(re.search(pattern, name) for pattern in stage.trains)]
        if trained:
            return f"{stage.name} trains {trained[0]}"
        if stage.lora_r and stage is not stages[-1]:
            return f"{stage.name} merges LoRA into the backbone before other stages"
    return None


def _teacher(config: DistillConfig, stages: Sequence[Stage], student, teacher) -> Teacher:
    """The teacher as a value: on the student's backbone where that stays what it is to the end."""
    reason = why_separate(student, stages)
    if reason and (config.shared_teacher or isinstance(teacher, SharedTeacher)):
        raise ValueError(
            f"the teacher shares the student's backbone, but {reason}: set shared_teacher=False, and it gets memory "
            "of its own"
        )
    teacher = as_teacher(student, teacher, False if reason else config.shared_teacher)
    if config.layers_at_a_time and not isinstance(teacher, SharedTeacher):
        raise ValueError(
            f"layers_at_a_time={config.layers_at_a_time} needs a teacher on the student's backbone, but "
            f"{reason or 'their weights differ'}: leave it out"
        )
    return teacher


def _run_stage(
    args: DistillConfig,
    stages: Sequence[Stage],
    title: str,
    student,
    teacher: Teacher,
    features: TrainingRows,
    held_out: EncodedDataset | None,
    out: Path,
    finish_folder: FinishFolder | None,
) -> None:
    """Runs the last of `stages`, the others being finished."""
    stage, running = stages[-1], Path(args.output_dir)
    set_seed(args.seed)  # LoRA starts from random numbers
    if stage.lora_r:
        add_lora(student, stage.lora_r, stage.alpha())
    rows = train_stage(StageRun(args, stage, title, student, teacher, features, held_out))
    rows = [{"stage": stage.name, **row} for row in rows]
    on_main(lambda: write_stage(out, stages, student, features.processor, rows, finish_folder))
    on_main(lambda: shutil.rmtree(running, ignore_errors=True))


def _stage_arguments(config: DistillConfig, index: int, stage: Stage, out: Path) -> DistillConfig:
    args = copy.copy(config)
    args.output_dir = str(out / f"{stage.name}.running")
    args.run_name = f"{config.run_name or out.absolute().name}-{stage.name}"  # what trackers call it
    args.seed = config.seed + index  # another order of the rows in every stage
    if config.data_seed is not None:
        args.data_seed = config.data_seed + index
    return args


def _pseudo_encoder(config: DistillConfig, teacher: Teacher, features: TrainingRows, out: Path) -> EncodePseudo:
    """Returns what encodes a row with the teacher's answers: from a column, from a store, or decoded into one now."""
    processor = features.processor
    if PSEUDO_COLUMN in first_row(features):
        return partial(_encode_column, processor)
    folder = out / PSEUDO_TARGETS if config.pseudo_targets is None else Path(config.pseudo_targets)
    if config.pseudo_targets is None:
        decode_pseudo_targets(
            teacher.as_model().to(config.device),
            processor,
            readable_rows(features),
            folder,
            max_new_tokens=config.max_completion_length,
            batch_size=config.per_device_train_batch_size,
            shard=(config.process_index, config.world_size),
        )
        on_main(lambda: None)  # all shards are there
    return partial(encode_stored, PseudoTargets(folder), processor)


def _encode_column(processor, row, index: int):
    return encode_row(processor, {**row, "messages": row[PSEUDO_COLUMN]}, index)


# ---- Before work starts


def _evaluating(config: DistillConfig) -> DistillConfig:
    """The arguments with an evaluation, which held-out rows alone ask for, too."""
    config = copy.copy(config)
    if config.eval_strategy == IntervalStrategy.NO:
        config.eval_strategy, config.eval_steps, config.do_eval = IntervalStrategy.STEPS, config.save_steps, True
    return config


def _replaced(student) -> list[int]:
    return recurrent_layers(student.config.text_config.layer_types)


def _check_inputs(config: DistillConfig, stages: Sequence[Stage], student, teacher, features: TrainingRows) -> None:
    if find_spec("matplotlib") is None:  # reported now and not after the first stage
        raise ImportError('the curves of a distillation need matplotlib: pip install "linmu-hf[train]"')
    check_pair(student.config, teacher.config, hidden=any(stage.hid for stage in stages))
    check_rows(features)
    if student.dtype.itemsize < 4 and not config.bf16:
        raise ValueError(f"the student is in {student.dtype}: load it in float32, or train in mixed precision (bf16)")
    if not _replaced(student):
        raise ValueError("the student has no M-MATE layer to train: convert the teacher with `linmu-convert` first")


def _open_pseudo_targets(
    config: DistillConfig, stages: Sequence[Stage], teacher: Teacher, features: TrainingRows
) -> tuple[PseudoTargets | None, str | None]:
    """
    Opens `pseudo_targets`, and hashes its answers; raises a `ValueError` unless it is used and holds this teacher's
    answers to all rows.
    """
    if config.pseudo_targets is None:
        return None, None
    given = f"pseudo_targets={config.pseudo_targets!r}"
    answers = any(stage.seq for stage in stages)
    if answers and PSEUDO_COLUMN in first_row(features):
        raise ValueError(f"{given} has no effect: the dataset has a column {PSEUDO_COLUMN}; leave one of them out")
    store = PseudoTargets(
        config.pseudo_targets, describe(teacher.as_model(), features.processor, config.max_completion_length)
    )
    if not answers and not (store.top_k and any(stage.tok for stage in stages)):
        raise ValueError(f"{given} has no effect: no stage learns from the teacher's answers, which `seq` weighs")
    if store.top_k and config.temperature != 1:
        raise ValueError(
            f"temperature={config.temperature} needs all logits, and {given} holds the {store.top_k} likeliest: leave "
            "the temperature at 1, or make the answers without --top_k"
        )
    check_on_policy(config, stages, stored=store.top_k > 0)
    return store, store.check_rows(readable_rows(features))


def _settings(config, stages, student, teacher, features, held_out, store, answers) -> dict[str, Any]:
    """All that decides the result; a run is continued only if it is the same."""
    settings = {name: getattr(config, name) for name in ARGUMENTS}
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    settings |= {
        "rows_per_step": rows_per_step,  # however they are split
        "stages": {stage.name: asdict(stage) for stage in stages},
        "top_k": store.top_k if store else 0,
        "pseudo_targets": answers,
        "student": fingerprint_weights(student),
        "teacher": fingerprint_weights(teacher.as_model()),
        "processor": fingerprint_processor(features.processor),
        "dataset": fingerprint_rows(features.rows),
    }
    if config.load_best_model_at_end:
        names = ("metric_for_best_model", "greater_is_better", "eval_steps", "eval_delay")
        best = {name: getattr(config, name) for name in names}
        settings["load_best_model_at_end"] = best | {"eval_dataset": fingerprint_rows(held_out.rows)}
    return json.loads(json.dumps(settings, default=str))


def _load_weights(student, folder: Path) -> None:
    saved = type(student).from_pretrained(folder, dtype=student.dtype)
    student.load_state_dict(saved.state_dict())
