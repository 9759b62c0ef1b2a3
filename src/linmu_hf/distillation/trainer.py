"""One stage of a distillation as a `transformers.Trainer`."""

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ..conversion.teacher import check_pair
from .checkpoints import load_optimizer, load_trained, save_optimizer, save_trained
from .config import DistillConfig
from .engines.wrapping import prepare_fsdp, reshard, touch_parameters
from .engines.zero import join_gradients, settle_zero
from .engines.zero3 import ReduceEachGradient, is_zero3, prepare_zero3
from .held_out import count_own, loader, means, measure, relative_errors
from .losses import IGNORE_INDEX
from .model import WEIGHTS, DistillationModel
from .muon import Muon
from .on_policy import OnPolicy, check_on_policy
from .plots import LAYER_PREFIX
from .rows.collator import DistillCollator, EncodedDataset, Features, Item
from .rows.packing import LengthBuckets, arrange
from .rows.sampling import Order, StageSampler, in_order, shuffled
from .rows.stream import EncodedStream
from .rows.training_rows import GROUPED, TrainingRows
from .stages import Stage, parameter_groups
from .teacher import as_teacher


class DistillTrainer(Trainer):
    """
    A trainer of the student's trainable parameters on one stage's losses against a frozen teacher, on any number of
    processes.

    Logs every loss term (`loss_hid`, `loss_tok`, `loss_seq`, `loss_sup`, without their weights), `agreement` (share of
    answer tokens that student and teacher both prefer), and the squared error of the mixers relative to the teacher's,
    `relative_error`, for each layer and as their mean; all of them over the whole batch of all processes. Checkpoints
    hold the trainable parameters alone, and fit any number of processes. Of held-out rows it logs the same, with
    `eval_` in front, as means over all of them.

    Args:
        model (`LinMUForConditionalGeneration`):
            The student, with LoRA in place and [`set_trainable`] done; see [`distill`] for the whole way.
        teacher (`Teacher` or `LinMUForConditionalGeneration`):
            The teacher, as [`as_teacher`] or [`load_teacher`] gives it; it is frozen and put into evaluation mode.
        args (`DistillConfig`): the arguments.
        stage (`Stage`): the losses, the steps and the learning rate.
        train_dataset (`EncodedDataset` or `EncodedStream`): the rows, which are packed or padded as `args` say.
        eval_dataset (`EncodedDataset`, *optional*): held-out rows.
        title (`str`, *optional*): what the progress bar is called; by default the stage's name.
        layers (`Sequence[int]`, *optional*): the only layers that are compared, see [`DistillationModel`].
        kwargs: passed on to [`~transformers.Trainer`].
    """

    # Every loss here is divided by the counts of the whole accumulated batch. Transformers before 5.19 asks
    # `model_accepts_loss_kwargs` instead.
    loss_is_scaled_for_ga = True
    # Set by the Trainer, which is not type-checked.
    optimizer: Any
    control: Any

    def __init__(
        self,
        model,
        teacher,
        args: DistillConfig,
        stage: Stage,
        train_dataset: TrainingRows,
        eval_dataset: EncodedDataset | None = None,
        title: str | None = None,
        layers: Sequence[int] | None = None,
        **kwargs,
    ):
        args.refuse_push_to_hub()
        check_on_policy(args, [stage], stored=train_dataset.stored_topk is not None)
        check_pair(model.config, teacher.config, hidden=stage.hid > 0)
        tokenizer = train_dataset.processor.tokenizer
        args = copy.copy(args)
        self.features, rows = train_dataset, args.per_device_train_batch_size * args.world_size
        dataset, collator = arrange(
            train_dataset,
            tokenizer.pad_token_id,
            pseudo=stage.seq > 0,
            packing=bool(args.packing),
            max_length=args.max_length,
            batch_size=rows,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        args.max_steps, args.learning_rate = stage.max_steps, stage.learning_rate
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs: start one for each, `torchrun --nproc_per_node {args.n_gpu} -m "
                "linmu_hf.commands.distill ...`, or set CUDA_VISIBLE_DEVICES"
            )
        wrapped = DistillationModel(
            model,
            as_teacher(model, teacher, args.shared_teacher),
            stage,
            temperature=args.temperature,
            logits_chunk_size=args.logits_chunk_size,
            checkpoints=args.gradient_checkpointing,  # the name in every Transformers of the range
            position_shift=args.position_shift,
            layers=layers,
        )
        super().__init__(
            model=wrapped,
            args=args,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            data_collator=collator.load if stage.lmbda else collator,  # the student's answers are missing
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True
        self.stage, self.distillation, self.collator = stage, wrapped, collator
        self.on_policy = OnPolicy(model, train_dataset.processor, stage, args.max_completion_length, args.seed)
        self._sums: dict[str, Tensor] = {}
        self._first_unlogged_step = 0
        self._seconds_before: float | None = None  # of the run that this one continues
        if args.world_size > 1:
            complete = touch_parameters if args.deepspeed_plugin is None else join_gradients
            for index in wrapped.compared:
                complete(model.model.language_model.layers[index].mixer)
        if args.deepspeed_plugin is None:  # which takes a missing gradient for zeros itself
            self.add_callback(FillGradients)
        if is_zero3(args):
            prepare_zero3(wrapped, args.device)
            self.add_callback(ReduceEachGradient)
        if isinstance(train_dataset, EncodedStream):
            self.add_callback(PassOver(train_dataset))
        self.add_callback(LogLastStep)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(StageProgress(title or stage.name))

    @property
    def student(self):
        return self.distillation.student

    @property
    def teacher(self):
        return self.distillation.teacher

    # ---- Losses

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        Computes the weighted sum of the stage's losses on one micro-batch, times the number of processes, over which
        engines take the mean of the gradients.

        Args:
            inputs (`dict[str, Tensor]`): a batch of [`DistillCollator`].
            num_items_in_batch (`Tensor`, *optional*):
                [3], the real tokens, answer tokens and pseudo-target tokens of the global batch.
        """
        counts = self._count([inputs]).clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        with self.accelerator.autocast():
            loss, sums = model(dict(inputs), counts.to(self.args.device), self._logs_after(self.state.global_step + 1))
        if not torch.isfinite(loss):
            terms = ", ".join(f"{key} {sums[key].item():.4g}" for key in WEIGHTS if key in sums)
            raise FloatingPointError(
                f"{self.stage.name}: the loss of step {self.state.global_step + 1} is not finite ({terms}). Lower the "
                f"stage's learning rate ({self.stage.learning_rate}), warm up longer, or lower max_grad_norm "
                f"({self.args.max_grad_norm})"
            )
        self._add(**sums)
        loss = loss * self.args.world_size
        return (loss, None) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples, device):
        self._share_skipped(self.features)
        counts = self._count(batch_samples).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return counts.clamp_min(1)

    def _count(self, batches: list[dict[str, Tensor]]) -> Tensor:
        """Real tokens, answer tokens and pseudo-target tokens of one accumulated batch of this process, [3]."""
        keys = ("labels", "pseudo_labels")
        answers = [sum((b[key][:, 1:] != IGNORE_INDEX).sum() for b in batches if key in b) for key in keys]
        tokens = sum(b["attention_mask"].sum() if "attention_mask" in b else b["input_ids"].numel() for b in batches)
        return torch.tensor([tokens, *answers])

    # ---- Rows

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.stage.lmbda:  # answers first, for the losses are divided by the number of their tokens
            epoch_iterator = map(self._let_answer, epoch_iterator, range(num_batches))
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _let_answer(self, items: list[Item | None], number: int) -> Features:
        """Makes micro-batch `number` of a step of rows with the student's answers."""
        args = self.args
        place = (number * args.world_size + args.process_index) * args.per_device_train_batch_size
        with self.accelerator.autocast():
            return self.collator.batch(self.on_policy(items, self.state.global_step, place))

    def _share_skipped(self, rows: TrainingRows) -> None:
        """Counts the unreadable rows of all processes together, so that `max_bad_rows` is their limit."""
        if self.args.world_size > 1 and rows.skipped.limit:
            rows.skipped.merge(set().union(*gather_object([rows.skipped.skipped()])))

    @property
    def rows_per_step(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size

    def _get_train_sampler(self, train_dataset=None):
        args, dataset = self.args, self.train_dataset
        if not hasattr(dataset, "__len__"):
            return None
        rows, seed = len(dataset), args.seed if args.data_seed is None else args.data_seed
        order: Order = shuffled(rows, seed)
        if args.train_sampling_strategy == GROUPED:
            order = LengthBuckets(self.features.lengths(), args.per_device_train_batch_size * args.world_size, seed)
        elif args.train_sampling_strategy == "sequential":
            order = in_order(rows)
        return StageSampler(order, self.stage.max_steps * self.rows_per_step)

    # ---- Optimizer

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.student)
            a, rates = self.args, self.stage.learning_rates
            groups = parameter_groups(
                self.student, a.learning_rate, a.weight_decay, a.slow_lr_multiplier, rates, muon=self.stage.muon
            )
            self.optimizer = (Muon if self.stage.muon else kind)(groups, **kwargs)
        return self.optimizer

    def _get_learning_rate(self) -> float:
        """The stage's rate: that of the fastest group, not of the first."""
        return float(max(group["lr"] for group in self.optimizer.param_groups))

    # ---- Logs

    def _logs_after(self, step: int) -> bool:
        every = self.state.logging_steps
        return step == self.stage.max_steps or (bool(every) and step % every == 0)

    def _add(self, **values: Tensor) -> None:
        if not self._sums:
            self._first_unlogged_step = self.state.global_step
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0.0) + value.detach()

    def log(self, logs, start_time=None):
        # the Trainer's own count takes all the rows of a stage for one pass
        if hasattr(self.train_dataset, "__len__"):
            self.state.epoch = self.state.global_step * self.rows_per_step / len(self.train_dataset)
        if "loss" in logs and start_time is not None:
            if self._seconds_before is None:
                history = reversed(self.state.log_history)
                self._seconds_before = next((row["seconds"] for row in history if "seconds" in row), 0.0)
            logs["seconds"] = round(self._seconds_before + time.time() - start_time, 3)
        if "loss" in logs and self._sums:
            steps = max(self.state.global_step - self._first_unlogged_step, 1)
            sums, self._sums = self._sums, {}
            if self.args.world_size > 1:
                sums = {key: self.accelerator.reduce(value, "sum") for key, value in sorted(sums.items())}
            for key, value in sums.items():
                if key not in ("errors", "energies"):
                    logs[key if key == "agreement" else f"loss_{key}"] = float(value) / steps
            logs.update(relative_errors(sums, self.distillation.compared))
        super().log(logs, start_time)

    # ---- Held-out rows

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """
        Measures all held-out rows of all processes, and changes neither weights nor random numbers.

        Args:
            eval_dataset (`EncodedDataset`, *optional*): Others than those of the trainer.
            ignore_keys: Not used.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): What the figures' names begin with.

        Returns:
            `dict[str, float]`: `eval_loss`, which is the weighted sum of the stage's losses, `eval_loss_hid` and so
            on, `eval_agreement`, `eval_relative_error` and that of each layer, `eval_runtime` in seconds.
        """
        start, args, rows = time.perf_counter(), self.args, eval_dataset or self.eval_dataset
        if rows is None:
            raise ValueError("no held-out rows: give eval_dataset")
        model, training = self.model_wrapped, self.model_wrapped.training
        collator = DistillCollator(
            rows.processor.tokenizer.pad_token_id,
            pseudo=self.stage.seq > 0,
            packing=bool(args.packing),
            topk=rows.stored_topk is not None,
        )
        batches = self.callback_handler.eval_dataloader = loader(rows, collator, args)

        def step(batch: Features) -> dict[str, Tensor]:
            with self.accelerator.autocast():
                _, sums = model(self._prepare_inputs(batch), torch.ones(3, device=args.device), True)
            self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
            return sums

        model.eval()
        try:
            sums, counts = measure(step, batches, self._count, count_own(rows, args))
        finally:
            model.train(training)
            reshard(model)
        self._share_skipped(rows)
        figures = means(sums, counts, self.stage, self.distillation.compared)
        figures["runtime"] = round(time.perf_counter() - start, 3)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in figures.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    def _determine_best_metric(self, metrics, trial):
        is_best = super()._determine_best_metric(metrics=metrics, trial=trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True  # whatever save_steps say
        return is_best

    # ---- Engines

    def create_accelerator_and_postprocess(self):
        if self.args.deepspeed_plugin is not None:
            AcceleratorState._reset_state()  # it takes one plugin, that of the stage before
            settle_zero(self.args)
        super().create_accelerator_and_postprocess()
        self.is_deepspeed_enabled = False  # accelerate knows; the Trainer would ask for checkpoints of DeepSpeed's
        self.is_fsdp_enabled = prepare_fsdp(self.accelerator, self.args.fsdp_plugin_args)

    # ---- Checkpoints: what trains, and no more

    def save_model(self, output_dir=None, _internal_call=False):
        save_trained(self.student, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        load_trained(self.student, resume_from_checkpoint)

    def _load_best_model(self):
        load_trained(self.student, self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir):
        save_optimizer(self.student, self.optimizer, self.lr_scheduler, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is not None:
            load_optimizer(self.student, self.optimizer, self.lr_scheduler, checkpoint)


class FillGradients(TrainerCallback):
    """
    A callback that gives parameters that a batch did not use a gradient of zeros, as those of several processes have
    where one of them did: the optimizer then does the same on any number of processes.
    """

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


class PassOver(TrainerCallback):
    """A callback that tells a stream what a resumed run has passed. Where bad rows count, all are met again."""

    def __init__(self, stream: EncodedStream):
        self.stream = stream

    def on_train_begin(self, args, state, control, **kwargs):
        batches = 0 if self.stream.skipped.limit else state.global_step * args.gradient_accumulation_steps
        self.stream.passed = batches * self.stream.batch_size


class LogLastStep(TrainerCallback):
    """
    A callback that logs the last steps of a stage that do not fill `logging_steps`, and evaluates after the last one.
    """

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            control.should_log |= args.logging_strategy == IntervalStrategy.STEPS
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.STEPS


class StageProgress(ProgressCallback):
    """The Trainer's progress bar, with the stage in front, its loss, and without a figure for each layer."""

    def __init__(self, title: str):
        super().__init__()
        self.title = title

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {key: value for key, value in (logs or {}).items() if LAYER_PREFIX not in key}
        if self.training_bar is not None and "loss" in shown:
            self.training_bar.set_postfix_str(f"loss {shown['loss']:.4g}")
        super().on_log(args, state, control, logs=shown, **kwargs)
