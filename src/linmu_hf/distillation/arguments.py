"""Which of `TrainingArguments` a distillation honours and which it refuses, in one table."""

import os
from collections.abc import Sequence
from dataclasses import MISSING, fields

from transformers import TrainingArguments

from .engines.wrapping import is_sharded
from .stages import Stage


# Honoured, and they decide the result: a run is continued only with the same values.
RESULT = (
    "seed", "data_seed", "train_sampling_strategy",
    "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "bf16",
)  # fmt: skip

# Honoured, and free to differ when a run is continued. `do_train` asks for what happens anyway.
FREE = (
    "per_device_train_batch_size", "gradient_accumulation_steps",  # their product, times the processes, is not
    "fsdp", "fsdp_config", "deepspeed", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "ddp_timeout", "ddp_backend", "local_rank", "accelerator_config",
    "output_dir", "tf32", "use_cpu", "full_determinism", "torch_empty_cache_steps", "do_train",
    "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "logging_strategy", "logging_steps", "logging_first_step", "include_num_input_tokens_seen", "log_level",
    "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id", "skip_memory_metrics",
    "save_strategy", "save_steps", "save_total_limit",
    "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_revision",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    # With the held-out rows, part of what decides the result where the best evaluation does: `runner._settings`.
    "do_eval", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
)  # fmt: skip

# Every other argument must keep its default. These say what to use in its place, by the start of the name.
REMEDIES = {
    "num_train_epochs": "every stage has its own: set stage_overrides, such as stage-1.max_steps=100",
    "max_steps": "every stage has its own: set stage_overrides, such as stage-1.max_steps=100",
    "learning_rate": "every stage has its own: set stage_overrides, such as stage-1.learning_rate=1e-4",
    "label_smoothing_factor": "soften the teacher instead: temperature",
    "resume_from_checkpoint": "the same call with the same output_dir continues a run by itself",
    "save_only_model": "checkpoints hold only what trains, and a run could not be continued",
    "auto_find_batch_size": "set per_device_train_batch_size and gradient_accumulation_steps",
    "dataloader_drop_last": "rows are drawn pass after pass, so that every batch is full",
    "remove_unused_columns": "rows are encoded whole, with images and messages",
    "fp16": "use bf16=True",
} | dict.fromkeys(
    ("eval", "do_predict", "bf16_full_eval", "fp16_full_eval", "batch_eval", "include_for", "prediction_loss_only"),
    "held-out rows are measured as the rows of the training are; for answers take linmu-eval",
) | dict.fromkeys(
    ("parallelism", "average_tokens", "save_on_each", "log_on_each"),
    "processes share the rows of a step by DDP, FSDP2 or ZeRO, and the first one writes and logs",
)  # fmt: skip

# Values, by their start, of arguments that are honoured otherwise: they need epochs, checkpoints
# that a run does not need to go on, lengths of the rows, or optimizers that choose their own parameters.
REFUSED_VALUES = {
    "save_strategy": ("best", "epoch"),
    "logging_strategy": ("epoch",),
    "eval_strategy": ("epoch",),
    "lr_scheduler_type": ("reduce_lr_on_plateau", "greedy"),
    "train_sampling_strategy": ("batch_rebalance",),
    "optim": ("galore", "apollo", "lomo", "adalomo"),
}


def refused_fields() -> list[str]:
    """Names the fields of the installed `TrainingArguments` that a distillation does not take."""
    return [field.name for field in fields(TrainingArguments) if field.init and field.name not in (*RESULT, *FREE)]


def refuse_ignored(config) -> None:
    """
    Raises the `ValueError` of the first argument of `config` that would be accepted and have no effect, or not the
    one it promises. To be called before `TrainingArguments` rewrites its fields.
    """
    defaults = {field.name: field for field in fields(config)}
    for name in refused_fields():
        field, value = defaults[name], getattr(config, name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if value != default and (value or default):
            specific = (remedy for start, remedy in REMEDIES.items() if name.startswith(start))
            remedy = next(specific, "a distillation has no use for it")
            raise ValueError(f"{name}={value!r} is not supported: {remedy}, and leave {name} at {default!r}")
    for name, starts in REFUSED_VALUES.items():
        value = str(getattr(getattr(config, name), "value", getattr(config, name)))
        if value.startswith(starts):
            raise ValueError(f"{name}={value!r} is not supported: use {defaults[name].default!r}, for example")


def settle_precision(config) -> None:
    """
    Takes the mixed precision that `accelerate launch` asks for, which the Trainer would follow unseen by all else. To
    be called before `TrainingArguments` reads it.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "bf16"):
        raise ValueError(f"accelerate launch asks for mixed_precision={asked}, which is not supported: take bf16")
    config.bf16 |= asked == "bf16"


def settle_packing(config) -> None:
    """
    Decides about `packing` where the user does not, and raises the `ValueError` of arguments about batches that would
    have no effect. To be called after `TrainingArguments` has rewritten its fields.
    """
    grouped = config.train_sampling_strategy == "group_by_length"
    if config.max_length is not None and config.max_length < 1:
        raise ValueError(f"max_length={config.max_length} must be at least 1")
    if config.max_length is not None and config.packing is False:
        raise ValueError(f"max_length={config.max_length} has no effect without packing, for rows are never cut")
    if grouped and (config.packing or config.max_length is not None):
        raise ValueError(
            "train_sampling_strategy='group_by_length' has no effect on packed rows, which have no padding: leave "
            "packing and max_length out, or the strategy"
        )
    for name in ("max_bad_rows", "shuffle_buffer_size"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name}={getattr(config, name)} must not be negative")
    if config.packing is None:
        asked = config.max_length is not None or config.device.type == "cuda"
        config.packing = asked and not grouped
    # Batches that one process cuts into the others' would cut pixels by the number of rows.
    if config.accelerator_config.dispatch_batches:
        raise ValueError(
            "accelerator_config: dispatch_batches=True is not supported: every process reads its own rows"
        )
    config.accelerator_config.dispatch_batches = False


def check_layers_at_a_time(config, stages: Sequence[Stage] | None = None, gpus: int = 1) -> None:
    """
    Raises a `ValueError` where `layers_at_a_time` cannot be had or would have no effect.

    Args:
        config (`DistillConfig`): The arguments.
        stages (`Sequence[Stage]`, *optional*): What is going to be trained.
        gpus (`int`, *optional*, defaults to 1): Those of an estimate.
    """
    if config.layers_at_a_time is None:
        return
    given = f"layers_at_a_time={config.layers_at_a_time}"
    if config.layers_at_a_time < 1:
        raise ValueError(f"{given} must be at least 1")
    if max(config.world_size, gpus) > 1 or is_sharded(config):
        raise ValueError(f"{given} is for one GPU: leave it out, and FSDP2 spreads layers and states over several")
    if config.shared_teacher is False:
        raise ValueError(f"{given} needs a teacher on the student's backbone: leave shared_teacher=False out")
    if config.load_best_model_at_end:
        raise ValueError(
            f"{given} ends one group of layers before the next begins, and load_best_model_at_end=True takes the best "
            "step of all: leave one of them out"
        )
    if stages is not None and not any(stage.hidden_input == "teacher" for stage in stages):
        raise ValueError(
            f"{given} has no effect, for no stage has hidden_input: teacher: set it for a stage of `hid` alone, or "
            "leave the option out"
        )
