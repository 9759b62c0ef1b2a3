"""The arguments of a distillation."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from .arguments import check_layers_at_a_time, refuse_ignored, settle_packing, settle_precision
from .engines.zero import check_zero, check_zero_asked
from .held_out import settle_evaluation
from .recipes import DEFAULT_RECIPE, RECIPES, read_stages, recipe_file, stage_values
from .stages import Stage


TEACHER_REMEDIES = {
    "torch_dtype": "`dtype` is given, too: leave one of them out",
    "revision": "it differs from teacher_model_revision: leave one of them out",
    "device_map": "the teacher runs where the student trains: leave it out",
    "trust_remote_code": "no code of a checkpoint is run: leave it out",
}


@dataclass
class DistillConfig(TrainingArguments):
    """
    Arguments of [`distill`] and [`DistillTrainer`]: those of [`~transformers.TrainingArguments`] and the ones below.

    The stages have `learning_rate` and `max_steps` of their own, and each its own warm-up and decay. An argument that
    would have no effect here is refused: `arguments.py` has the table.

    `push_to_hub`, `hub_model_id`, `hub_private_repo`, `hub_revision` and `hub_token` are for `linmu-distill`, which
    uploads the finished model with its processor and card once all stages are done and the folder has been checked.
    Of the values of `hub_strategy` only `"end"` is left: what the Trainer uploads while it runs are checkpoints, and
    here they hold the parameters that train and nothing that loads. [`distill`] and [`DistillTrainer`] upload nothing.

    With held-out rows (`eval_dataset` of [`distill`]), `eval_steps` is `save_steps` by default, and a stage always
    ends with an evaluation. `load_best_model_at_end` ends every stage with the weights of its best one, by
    `metric_for_best_model` (`eval_loss`, the stage's weighted loss, by default).

    Args:
        teacher_model_name_or_path (`str`, *optional*): Hub id or folder of the teacher.
        teacher_model_revision (`str`, *optional*): revision of the teacher on the Hub.
        teacher_model_init_kwargs (`dict`, *optional*):
            Keyword arguments for loading the teacher: `dtype` (or `torch_dtype`), `revision`, `attn_implementation`.
        shared_teacher (`bool`, *optional*):
            Whether the teacher runs on the student's own backbone, with its attention beside M-MATE: one model in
            memory in place of two. By default where all other weights are equal and no stage trains them.
        layers_at_a_time (`int`, *optional*):
            Stages that the teacher feeds (`hidden_input="teacher"`) train this many layers at a time, each group
            with all the steps of its stage, so that gradients and optimizer states of no more layers are held. One
            process and a shared teacher; `max_grad_norm` bounds the gradients of a group. Other stages run as without.
        recipe (`str`, *optional*, defaults to `"paper"`):
            A list of stages that is shipped: `"paper"`, `"default"` (AdamW, a long teacher-fed start) or `"quick"`
            (Muon, that of the testbed).
        stages (`str` or `Sequence[Stage | Mapping]`, *optional*):
            A file of stages, YAML or JSON, in place of a recipe, or the stages themselves; see [`read_stages`].
            `linmu-distill --print_stages` writes such a file.
        stage_overrides (`list[str]`, *optional*):
            Single values, such as `"stage-1.max_steps=100"`, or `"all.learning_rate=1e-4"` for every stage. A stage
            of 0 steps is left out.
        temperature (`float`, *optional*, defaults to 1.0): tau of Eq. 7.
        max_completion_length (`int`, *optional*, defaults to 128): longest answer that the teacher decodes, or the
            student where a stage has `lmbda`, in tokens.
        pseudo_targets (`str`, *optional*):
            Folder of teacher answers that `linmu-pseudo-targets` or [`decode_pseudo_targets`] made of this dataset, in
            place of decoding them now.
        slow_lr_multiplier (`float`, *optional*, defaults to 0.2):
            Learning rate of decays, step sizes and gates, relative to the stage's.
        position_shift (`int`, *optional*, defaults to 0):
            Every row starts at a position drawn from 0 to this one, in both models. The teacher, which knows positions
            by their differences, gives the same answer; features of B and C read where a token is, and a student that
            saw images at one place alone does not know them at another.
        logits_chunk_size (`int`, *optional*, defaults to 1024): positions whose logits exist at a time.
        packing (`bool`, *optional*):
            Whether the rows of a micro-batch become one row without padding, in which they do not see each other. By
            default on GPUs, and wherever `max_length` is given.
        max_length (`int`, *optional*):
            Tokens of a packed row, into which as many rows go as find room; `per_device_train_batch_size` then counts
            packed rows. No row is cut: a longer one is alone. By default that number of rows is packed.
        shuffle_buffer_size (`int`, *optional*, defaults to 1000):
            Rows of a stream in memory among which the next one is drawn.
        max_bad_rows (`int`, *optional*, defaults to 0):
            How many rows that cannot be read are logged and left out, before there is an error.
        feature_cache_gb (`float`, *optional*, defaults to 2.0):
            Memory in GiB for rows that are encoded already, so that later epochs skip the processor. 0 caches nothing.
        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether to delete an earlier distillation in `output_dir` and start anew, instead of continuing it.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of the teacher."})
    teacher_model_revision: str | None = field(default=None, metadata={"help": "Revision of the teacher on the Hub."})
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword arguments for loading the teacher, as JSON."}
    )
    shared_teacher: bool | None = field(
        default=None, metadata={"help": "Whether teacher and student share one backbone, by default where they can."}
    )

    layers_at_a_time: int | None = field(
        default=None,
        metadata={"help": "Layers that a teacher-fed stage trains at a time, all its steps for each group of them."},
    )

    recipe: str | None = field(
        default=None, metadata={"help": f"Stages that are shipped: {', '.join(RECIPES)}. By default {DEFAULT_RECIPE}."}
    )
    stages: list[Any] | str | None = field(
        default=None, metadata={"help": "File of stages, YAML or JSON, in place of a recipe; see --print_stages."}
    )
    stage_overrides: list[str] = field(
        default_factory=list,
        metadata={"help": "Single values: stage-1.max_steps=100 all.learning_rate=1e-4. 0 steps leave a stage out."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the token-level distillation loss."})
    max_completion_length: int = field(
        default=128, metadata={"help": "Longest answer that teacher or student decodes, in tokens."}
    )
    pseudo_targets: str | None = field(
        default=None, metadata={"help": "Folder of teacher answers that linmu-pseudo-targets made of this dataset."}
    )
    slow_lr_multiplier: float = field(
        default=0.2, metadata={"help": "Learning rate of decays, step sizes and gates, relative to the stage's."}
    )
    position_shift: int = field(default=0, metadata={"help": "Largest position at which a row may start."})
    logits_chunk_size: int = field(default=1024, metadata={"help": "Positions whose logits exist at a time."})
    packing: bool | None = field(
        default=None, metadata={"help": "Whether rows are packed instead of padded. By default on GPUs."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a packed row. Rows are never cut."})
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Rows of a stream in memory among which the next one is drawn."}
    )
    max_bad_rows: int = field(default=0, metadata={"help": "Rows that cannot be read and are left out, at most."})
    feature_cache_gb: float = field(default=2.0, metadata={"help": "Memory in GiB for rows encoded already."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Whether to delete an earlier distillation in `output_dir` and start anew."}
    )

    # Other defaults than in `TrainingArguments`.
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The scheduler type to use in each stage."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Warm-up steps of each stage, or their share of the stage if below 1."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every X updates steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept while a stage runs."})
    hub_strategy: str = field(default="end", metadata={"help": "Must stay `end`: checkpoints are no models."})
    # A loss that is not finite is an error here, not something to filter.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must stay off."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: rows are encoded whole."})

    def __post_init__(self):
        refuse_ignored(self)
        settle_precision(self)
        stages = self.get_stages()
        by_muon = next((stage.name for stage in stages if stage.muon), None)
        if by_muon and not str(getattr(self.optim, "value", self.optim)).startswith("adamw_torch"):
            raise ValueError(f"{by_muon}: muon takes AdamW for all but matrices: leave optim={self.optim!r} out")
        settle_evaluation(self)
        check_zero_asked(self)
        super().__post_init__()
        check_zero(self)
        settle_packing(self)
        check_layers_at_a_time(self)
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False
        for name in ("temperature", "slow_lr_multiplier"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("logits_chunk_size", "max_completion_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.position_shift < 0:
            raise ValueError(f"position_shift={self.position_shift} must not be negative")
        if self.push_to_hub and self.hub_strategy != HubStrategy.END:
            raise ValueError(
                f"hub_strategy={HubStrategy(self.hub_strategy).value!r} would upload checkpoints, which hold only "
                "the parameters that train: leave it at 'end', which uploads the finished model"
            )
        if self.save_total_limit is not None and self.save_total_limit < 2:
            raise ValueError(
                f"save_total_limit={self.save_total_limit} must be at least 2, or a run killed while it writes a "
                "checkpoint has none to resume from"
            )
        self.teacher_options()
        if self.stages is not None and not isinstance(self.stages, str):
            # Trackers want arguments that are JSON.
            self.stages, self.stage_overrides = [stage_values(stage) for stage in stages], []

    def teacher_options(self) -> dict[str, Any]:
        """Returns those of `dtype`, `revision` and `attn_implementation` that are given for the teacher."""
        kwargs = self.teacher_model_init_kwargs or {}
        if not isinstance(kwargs, dict):
            raise ValueError(f"teacher_model_init_kwargs={kwargs!r} must be a JSON object")
        given = {name: value for name, value in kwargs.items() if value is not None}
        if "dtype" not in given and "torch_dtype" in given:
            given["dtype"] = given.pop("torch_dtype")
        options = {"revision": self.teacher_model_revision}
        for name, value in given.items():
            same_revision = name == "revision" and options["revision"] in (None, value)
            if name in ("dtype", "attn_implementation") or same_revision:
                options[name] = value
            elif not (name == "trust_remote_code" and value is False):
                raise ValueError(
                    f"teacher_model_init_kwargs: {name}={value!r} is not supported: "
                    + TEACHER_REMEDIES.get(name, "give `dtype`, `revision` and `attn_implementation` at most")
                )
        return options

    def refuse_push_to_hub(self) -> None:
        """Raises a `ValueError` where `push_to_hub` would be silently ignored."""
        if self.push_to_hub:
            raise ValueError(
                "push_to_hub=True: this only trains. Use `linmu-distill --push_to_hub True`, or call "
                "linmu_hf.hub.push_folder(output_dir, hub_model_id) afterwards"
            )

    def get_stages(self) -> tuple[Stage, ...]:
        """Returns the stages that these arguments ask for."""
        if self.stages is not None and self.recipe is not None:
            raise ValueError(
                f"recipe={self.recipe!r} has no effect beside stages={self.stages!r}: leave one of them out"
            )
        source = recipe_file(self.recipe or DEFAULT_RECIPE) if self.stages is None else self.stages
        return read_stages(source, self.stage_overrides)
