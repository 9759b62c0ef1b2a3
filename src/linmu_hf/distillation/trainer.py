"""One stage of a distillation as a `transformers.Trainer`."""

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ..conversion.teacher import check_pair
from ..modeling.mixers import recurrent_layers
from .config import DistillConfig
from .losses import IGNORE_INDEX, hidden_loss, next_token_targets, output_losses, squared_errors
from .muon import Muon
from .packing import LengthBuckets, arrange
from .plots import LAYER_PREFIX
from .stages import Stage, parameter_groups
from .training_rows import GROUPED, TrainingRows


TRAINED_WEIGHTS = "trained.safetensors"


class DistillTrainer(Trainer):
    """
    Trains the student's trainable parameters on one stage's losses against a frozen teacher.

    Logs every loss term (`loss_hid`, `loss_tok`, `loss_seq`, `loss_sup`, without their weights), `agreement` (share of
    answer tokens that student and teacher both prefer), and the squared error of the mixers relative to the teacher's,
    `relative_error`, for each layer and as their mean. Checkpoints hold the trainable parameters alone.

    Args:
        model (`LinMUForConditionalGeneration`):
            The student, with LoRA in place and [`set_trainable`] done; see [`distill`] for the whole way.
        teacher (`LinMUForConditionalGeneration`):
            The teacher, as [`load_teacher`] gives it; it is frozen and put into evaluation mode.
        args (`DistillConfig`): the arguments.
        stage (`Stage`): the losses, the steps and the learning rate.
        train_dataset (`EncodedDataset` or `EncodedStream`): the rows, which are packed or padded as `args` say.
        kwargs: passed on to [`~transformers.Trainer`].
    """

    # Every loss here is divided by the counts of the whole accumulated batch. Transformers before 5.19 asks
    # `model_accepts_loss_kwargs` instead.
    loss_is_scaled_for_ga = True
    optimizer: Any  # set by the Trainer, which is not type-checked

    def __init__(
        self,
        model,
        teacher,
        args: DistillConfig,
        stage: Stage,
        train_dataset: TrainingRows,
        **kwargs,
    ):
        args.refuse_push_to_hub()
        check_pair(model.config, teacher.config)
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
        super().__init__(model=model, args=args, train_dataset=dataset, data_collator=collator, **kwargs)
        self.model_accepts_loss_kwargs = True
        if args.world_size > 1 or args.n_gpu > 1:
            raise ValueError(f"found {max(args.world_size, args.n_gpu)} devices; distillation runs on one so far")
        self.stage = stage
        self.student = model
        self.teacher = teacher.requires_grad_(False).eval().to(args.device)
        self.teacher_is_causal = set(teacher.config.text_config.layer_types) == {"full_attention"}
        self.replaced = recurrent_layers(model.config.text_config.layer_types)
        self.shares_vision = _equal_weights(model.model.visual, teacher.model.visual)
        if args.gradient_checkpointing:  # the name in every Transformers of the range
            # Nothing in front of the first mixer trains: a reentrant checkpoint would find no input to differentiate
            # and silently drop all gradients.
            model.enable_input_require_grads()
        self._sums: dict[str, Tensor] = {}
        self._first_unlogged_step = 0
        self.add_callback(LogLastStep)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(StageProgress(stage.name))

    # ---- Losses

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        Computes the weighted sum of the stage's losses on one micro-batch.

        Args:
            inputs (`dict[str, Tensor]`): a batch of [`DistillCollator`].
            num_items_in_batch (`Tensor`, *optional*):
                [3], the real tokens, answer tokens and pseudo-target tokens of the global batch.
        """
        counts = self._count([inputs]) if num_items_in_batch is None else num_items_in_batch
        with self.accelerator.autocast():
            losses = self._losses(dict(inputs), counts.to(self.args.device))
        weights = {key: getattr(self.stage, key) for key in ("hid", "tok", "seq", "sup")}
        loss = sum(weight * losses[key] for key, weight in weights.items() if weight)
        if not torch.isfinite(loss):
            terms = ", ".join(f"{key} {losses[key].item():.4g}" for key, weight in weights.items() if weight)
            raise FloatingPointError(
                f"{self.stage.name}: the loss of step {self.state.global_step + 1} is not finite ({terms}). Lower the "
                f"stage's learning rate ({self.stage.learning_rate}), warm up longer, or lower max_grad_norm "
                f"({self.args.max_grad_norm})"
            )
        return (loss, None) if return_outputs else loss

    def _losses(self, inputs: dict[str, Tensor], counts: Tensor) -> dict[str, Tensor]:
        stage, student, teacher = self.stage, self.student, self.teacher
        num_tokens, num_answers, num_pseudo = counts
        labels, pseudo_labels = inputs.pop("labels"), inputs.pop("pseudo_labels", None)
        mask = inputs["attention_mask"]
        compares = stage.hid > 0 or self._logs_after(self.state.global_step + 1)

        with torch.no_grad():
            positions, inputs["vision_layout"] = student.model.get_positions(**inputs)
            inputs["position_ids"] = self._shift(positions)
            if self.shares_vision:
                inputs["mm_encoder_outputs"] = _encode_vision(student.model, inputs)
            target: Any = None
            if compares or stage.tok:
                # Padding is on the right, where no real token sees it: full attention then needs no mask of t x t.
                masked = {} if self.teacher_is_causal else {"attention_mask": mask}
                others = {key: value for key, value in inputs.items() if key != "attention_mask"}
                target = teacher.model(**others, **masked, use_cache=False, output_mixer_states=compares)

        if stage.hidden_input == "teacher":
            outputs = student.model.language_model.run_mixers(
                target.mixer_inputs,
                attention_mask=mask,
                position_ids=inputs["position_ids"],
                vision_layout=inputs["vision_layout"],
            )
        else:
            answer = student.model(**inputs, use_cache=False, output_mixer_states=compares)
            outputs = answer.mixer_outputs

        losses: dict[str, Tensor] = {}
        if compares:
            outputs = [outputs[index] if stage.hid else outputs[index].detach() for index in self.replaced]
            errors, energies = squared_errors(outputs, [target.mixer_outputs[index] for index in self.replaced], mask)
            self._add(errors=errors, energies=energies)
            if stage.hid:
                losses["hid"] = hidden_loss(errors, num_tokens)

        targets = {"tok": labels} if stage.tok else {}
        if stage.sup:
            targets["sup"] = labels
        if stage.seq:
            targets["seq"] = pseudo_labels
        if targets:
            targets = {key: next_token_targets(value) for key, value in targets.items()}
            counted = torch.stack([value != IGNORE_INDEX for value in targets.values()]).any(0)
            losses |= output_losses(
                answer.last_hidden_state[counted],
                student.lm_head,
                {key: value[counted] for key, value in targets.items()},
                {"tok": num_answers, "sup": num_answers, "seq": num_pseudo},
                teacher_hidden=target.last_hidden_state[counted] if stage.tok else None,
                teacher_head=teacher.lm_head,
                temperature=self.args.temperature,
                chunk_size=self.args.logits_chunk_size,
            )
        self._add(**losses)
        return losses

    def _shift(self, positions: Tensor) -> Tensor:
        """Adds one number to all positions [3, b, t] or [b, t] of a row, another for every row."""
        if not self.args.position_shift:
            return positions
        shift = torch.randint(self.args.position_shift + 1, (positions.shape[-2], 1))
        return positions + shift.to(positions.device)

    def _get_num_items_in_batch(self, batch_samples, device):
        return self._count(batch_samples).to(device)

    def _count(self, batches: list[dict[str, Tensor]]) -> Tensor:
        """Real tokens, answer tokens and pseudo-target tokens of one accumulated batch, [3]."""
        keys = ("labels", "pseudo_labels")
        answers = [sum((b[key][:, 1:] != IGNORE_INDEX).sum() for b in batches if key in b) for key in keys]
        return torch.tensor([sum(b["attention_mask"].sum() for b in batches), *answers]).clamp_min(1)

    def _get_train_sampler(self, train_dataset=None):
        args = self.args
        if args.train_sampling_strategy != GROUPED:
            return super()._get_train_sampler(train_dataset)
        seed = args.seed if args.data_seed is None else args.data_seed
        return LengthBuckets(self.features.lengths(), args.train_batch_size * args.world_size, seed)

    # ---- Optimizer

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.student)
            a, rates = self.args, self.stage.learning_rates
            groups = parameter_groups(
                self.student, a.learning_rate, a.weight_decay, a.slow_lr_multiplier, rates, muon=a.muon
            )
            self.optimizer = (Muon if a.muon else kind)(groups, **kwargs)
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
        if "loss" in logs and self._sums:
            steps = max(self.state.global_step - self._first_unlogged_step, 1)
            sums, self._sums = self._sums, {}
            errors, energies = sums.pop("errors", None), sums.pop("energies", None)
            for key, value in sums.items():
                logs[key if key == "agreement" else f"loss_{key}"] = float(value) / steps
            if errors is not None:
                relative = (errors / energies.clamp_min(torch.finfo(energies.dtype).tiny)).tolist()
                logs["relative_error"] = sum(relative) / len(relative)
                logs.update({f"{LAYER_PREFIX}{index}": e for index, e in zip(self.replaced, relative, strict=True)})
        super().log(logs, start_time)

    # ---- Checkpoints: what trains, and no more

    def _save(self, output_dir=None, state_dict=None):
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().contiguous() for name, p in self.student.named_parameters() if p.requires_grad}
        save_file(tensors, folder / TRAINED_WEIGHTS, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        saved = load_file(Path(resume_from_checkpoint) / TRAINED_WEIGHTS)
        trained = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        if saved.keys() != trained.keys():
            names = sorted(saved.keys() ^ trained.keys())
            raise ValueError(f"{resume_from_checkpoint} was written by another stage or model: {names[:3]} differ")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])


class LogLastStep(TrainerCallback):
    """Logs the last steps of a stage that do not fill `logging_steps`."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps and args.logging_strategy == IntervalStrategy.STEPS:
            control.should_log = True


class StageProgress(ProgressCallback):
    """The Trainer's progress bar, with the stage's name in front and without a figure for each layer."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.training_bar.set_description(self.name)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {key: value for key, value in (logs or {}).items() if not key.startswith(LAYER_PREFIX)}
        super().on_log(args, state, control, logs=shown, **kwargs)


def _encode_vision(model: nn.Module, inputs: dict[str, Tensor]) -> dict:
    """Vision features for both models; takes the pixels out of `inputs`."""
    images, videos = inputs.pop("pixel_values", None), inputs.pop("pixel_values_videos", None)
    encoded = {}
    if images is not None:
        encoded["image"] = model.get_image_features(images, inputs["image_grid_thw"], return_dict=True)
    if videos is not None:
        encoded["video"] = model.get_video_features(videos, inputs["video_grid_thw"], return_dict=True)
    return encoded


def _equal_weights(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and a[key].shape == b[key].shape and torch.equal(a[key], b[key].to(a[key].device))
        for key in a
    )
