"""The arguments of a distillation."""

from dataclasses import dataclass, field, replace
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from .arguments import refuse_ignored, settle_packing
from .stages import PAPER_STAGES, Stage


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

    `stage_learning_rates` and `stage_steps` take the place of `learning_rate`, `max_steps` and `num_train_epochs`;
    every stage has its own warm-up and decay. Lists of three hold one value for each stage. An argument that would
    have no effect here is refused: `arguments.py` has the table.

    `push_to_hub`, `hub_model_id`, `hub_private_repo`, `hub_revision` and `hub_token` are for `linmu-distill`, which
    uploads the finished model with its processor and card once all stages are done and the folder has been checked.
    Of the values of `hub_strategy` only `"end"` is left: what the Trainer uploads while it runs are checkpoints, and
    here they hold the parameters that train and nothing that loads. [`distill`] and [`DistillTrainer`] upload nothing.

    Args:
        teacher_model_name_or_path (`str`, *optional*): Hub id or folder of the teacher.
        teacher_model_revision (`str`, *optional*): revision of the teacher on the Hub.
        teacher_model_init_kwargs (`dict`, *optional*):
            Keyword arguments for loading the teacher: `dtype` (or `torch_dtype`), `revision`, `attn_implementation`.
        stage_steps (`list[int]`, *optional*, defaults to the paper's `[10000, 15000, 25000]`):
            Optimizer steps. 0 leaves a stage out.
        stage_learning_rates (`list[float]`, *optional*, defaults to the paper's `[5e-4, 5e-4, 2e-5]`):
            Peak learning rates.
        align_steps (`list[int]`, *optional*, defaults to `[0, 0, 0]`):
            Teacher-fed steps in front of each stage: the same parameters train on L_hid alone, every M-MATE block on
            the teacher's own layer input. They cost about one teacher forward and leave `stage-N-align`.
        align_learning_rate (`float`, *optional*, defaults to 1e-3): peak learning rate of these steps.
        hidden_input (`list[str]`, *optional*, defaults to `["student"]`):
            `"student"` (the paper) or `"teacher"`, one value or one for each stage. With `"teacher"` the whole stage
            is teacher-fed and L_hid is its only loss; not for a stage that trains LoRA.
        temperature (`float`, *optional*, defaults to 1.0): tau of Eq. 7.
        lambda_hid, lambda_tok, lambda_seq, lambda_sup (`float`, *optional*, defaults to 0.5):
            Weights of the losses. L_hid is a sum over the width, as printed: look at `loss_hid` in the logs, and lower
            its weight if it drowns the others.
        seq_kd (`bool`, *optional*, defaults to `True`):
            Whether the last stage learns from teacher-decoded answers (Eq. 8): from the column `pseudo_messages` if
            the dataset has it, else decoded once before that stage. `False` leaves L_seq out.
        max_completion_length (`int`, *optional*, defaults to 128): longest answer that the teacher decodes, in tokens.
        pseudo_targets (`str`, *optional*):
            Folder of teacher answers that `linmu-pseudo-targets` or [`decode_pseudo_targets`] made of this dataset, in
            place of decoding them now.
        lora_r (`int`, *optional*, defaults to 8): rank of the adapters on the decoder's FFNs in stage 3; 0 for none.
        lora_alpha (`float`, *optional*, defaults to `lora_r`): their scale is `lora_alpha / lora_r`; Eq. 12 has 1.
        slow_lr_multiplier (`float`, *optional*, defaults to 0.2):
            Learning rate of decays, step widths and gates, relative to the stage's.
        position_shift (`int`, *optional*, defaults to 0):
            Every row starts at a position drawn from 0 to this one, in both models. The teacher, which knows positions
            by their differences, gives the same answer; features of B and C read where a token is, and a student that
            saw images at one place alone does not know them at another.
        muon (`bool`, *optional*, defaults to `False`):
            Whether matrices take Muon's steps in place of AdamW's; see `muon.py`. Made for runs of few steps, and with
            rates several times those of AdamW.
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

    stage_steps: list[int] = field(
        default_factory=lambda: [stage.max_steps for stage in PAPER_STAGES],
        metadata={"help": "Optimizer steps of the three stages. 0 leaves a stage out."},
    )
    stage_learning_rates: list[float] = field(
        default_factory=lambda: [stage.learning_rate for stage in PAPER_STAGES],
        metadata={"help": "Peak learning rates of the three stages."},
    )
    align_steps: list[int] = field(
        default_factory=lambda: [0, 0, 0], metadata={"help": "Teacher-fed steps in front of each stage."}
    )
    align_learning_rate: float = field(
        default=1e-3, metadata={"help": "Peak learning rate of the teacher-fed steps in front of a stage."}
    )
    hidden_input: list[str] = field(
        default_factory=lambda: ["student"],
        metadata={"help": "What M-MATE blocks are fed with: `student` or `teacher`, once or for each stage."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the token-level distillation loss."})
    lambda_hid: float = field(default=0.5, metadata={"help": "Weight of the mixer output loss (stages 1 and 2)."})
    lambda_tok: float = field(default=0.5, metadata={"help": "Weight of the token-level distillation loss."})
    lambda_seq: float = field(default=0.5, metadata={"help": "Weight of the sequence-level loss (stage 3)."})
    lambda_sup: float = field(default=0.5, metadata={"help": "Weight of the ground-truth loss (stage 3)."})
    seq_kd: bool = field(default=True, metadata={"help": "Whether stage 3 learns from teacher-decoded answers."})
    max_completion_length: int = field(
        default=128, metadata={"help": "Longest answer that the teacher decodes, in tokens."}
    )
    pseudo_targets: str | None = field(
        default=None, metadata={"help": "Folder of teacher answers that linmu-pseudo-targets made of this dataset."}
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapters on the decoder's FFNs in stage 3."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Scale of the adapters times their rank, by default `lora_r`: a scale of 1."}
    )
    slow_lr_multiplier: float = field(
        default=0.2, metadata={"help": "Learning rate of decays, step widths and gates, relative to the stage's."}
    )
    position_shift: int = field(default=0, metadata={"help": "Largest position at which a row may start."})
    muon: bool = field(default=False, metadata={"help": "Muon's steps for matrices, AdamW's for all else."})
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
        super().__post_init__()
        settle_packing(self)
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False
        if len(self.hidden_input) == 1:
            self.hidden_input = list(self.hidden_input) * 3
        for name in ("stage_steps", "stage_learning_rates", "align_steps", "hidden_input"):
            value = getattr(self, name)
            if len(value) != 3:
                raise ValueError(f"{name}={value} must have 3 entries, one for each stage")
        for name in ("stage_steps", "align_steps"):
            if min(getattr(self, name)) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.lora_alpha is None:
            self.lora_alpha = max(self.lora_r, 1)
        for name in ("temperature", "slow_lr_multiplier", "lora_alpha", "align_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("logits_chunk_size", "max_completion_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.position_shift < 0:
            raise ValueError(f"position_shift={self.position_shift} must not be negative")
        if self.muon and not str(getattr(self.optim, "value", self.optim)).startswith("adamw_torch"):
            raise ValueError(f"muon=True takes AdamW for all but matrices: leave optim={self.optim!r} at its default")
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
        self.stages()

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

    def stages(self) -> tuple[Stage, ...]:
        """Returns the stages that these arguments ask for, teacher-fed steps as stages of their own."""
        stages = []
        for index, paper in enumerate(PAPER_STAGES):
            teacher_fed = self.hidden_input[index] == "teacher"
            if self.align_steps[index]:
                stages.append(
                    Stage(
                        f"{paper.name}-align",
                        trains=paper.trains,
                        max_steps=self.align_steps[index],
                        learning_rate=self.align_learning_rate,
                        hid=self.lambda_hid,
                        hidden_input="teacher",
                    )
                )
            if self.stage_steps[index]:
                stages.append(
                    replace(
                        paper,
                        max_steps=self.stage_steps[index],
                        learning_rate=self.stage_learning_rates[index],
                        hid=self.lambda_hid if paper.hid else 0.0,
                        tok=self.lambda_tok if paper.tok and not teacher_fed else 0.0,
                        seq=self.lambda_seq if paper.seq and self.seq_kd else 0.0,
                        sup=self.lambda_sup if paper.sup else 0.0,
                        lora_r=self.lora_r if paper.lora_r else 0,
                        hidden_input=self.hidden_input[index],  # type: ignore[arg-type]
                    )
                )
        if not stages:
            raise ValueError(f"stage_steps={self.stage_steps} and align_steps={self.align_steps} leave nothing to do")
        return tuple(stages)
