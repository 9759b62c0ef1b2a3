"""Held-out rows: the figures of a training step over all of them, which leave no trace in the training."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .model import WEIGHTS
from .plots import LAYER_PREFIX
from .rows.collator import DistillCollator, Features
from .stages import Stage


def own_batches(rows: int, batch_size: int, processes: int = 1, process: int = 0) -> list[list[int]]:
    """
    Returns the rows of each batch of one process. All processes have equally many batches, for what they exchange
    within one needs all of them: a process that would have none gets the first row, which does not count once more.
    """
    batches = [list(range(start, min(start + batch_size, rows))) for start in range(0, rows, batch_size)]
    batches += [[0]] * (-len(batches) % processes)
    return batches[process::processes]


def count_own(dataset: Dataset, args) -> int:
    """Returns how many of this process's batches count."""
    rows, batch_size, processes, process = _shares(dataset, args)
    return len(range(0, rows, batch_size)[process::processes])


class HeldOutCollator:
    """A collator that also says whether any row of a batch could be read: else the batch must not count."""

    def __init__(self, collator: DistillCollator):
        self.collator = collator

    def __call__(self, items: Sequence[Any]) -> tuple[Features, bool]:
        kept = [item for item in items if item is not None]
        return self.collator(kept), bool(kept)


def loader(dataset: Dataset, collator: DistillCollator, args) -> DataLoader:
    """Returns what loads this process's batches of held-out rows, each row once and in order."""
    return DataLoader(
        dataset,
        batch_sampler=own_batches(*_shares(dataset, args)),
        collate_fn=HeldOutCollator(collator),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        # One of its own: the loader draws a number, which would move the random numbers of the training.
        generator=torch.Generator().manual_seed(args.seed),
    )


def _shares(dataset: Any, args) -> tuple[int, int, int, int]:
    return len(dataset), args.per_device_eval_batch_size, args.world_size, args.process_index


@torch.no_grad()
def measure(
    step: Callable[[Features], dict[str, Tensor]],
    batches: Iterable[tuple[Features, bool]],
    count: Callable[[list[Features]], Tensor],
    own: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """
    Sums the figures of all held-out rows.

    Args:
        step (`Callable`): Returns the sums of [`DistillationModel`] for a batch, with counts of 1.
        batches (`Iterable`): See [`loader`].
        count (`Callable`): Real tokens, answer tokens and pseudo-target tokens of batches, [3].
        own (`int`): How many of the batches count, see [`count_own`].

    Returns:
        `tuple[dict[str, Tensor], Tensor]`: The sums of all processes in float64, and the counts [3].
    """
    total: dict[str, Tensor] = {}
    counts = torch.zeros(3, dtype=torch.float64)
    for number, (batch, readable) in enumerate(batches):
        sums = step(batch)
        if readable and number < own:
            counts += count([batch])
            _add(total, sums)
    everything: dict[str, Tensor] = {}
    for sums in gather_object([total | {"counts": counts}]):
        _add(everything, sums)
    return everything, everything.pop("counts")


def _add(total: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
    for key, value in sums.items():
        total[key] = total.get(key, 0) + value.cpu().double()


def means(sums: dict[str, Tensor], counts: Tensor, stage: Stage, replaced: Sequence[int]) -> dict[str, float]:
    """
    Returns the figures of held-out rows: `loss`, which is the stage's weighted sum, every term of it, `agreement`, and
    the relative error of the mixers.

    Args:
        sums (`dict[str, Tensor]`), counts (`Tensor`): See [`measure`].
        stage (`Stage`): The weights.
        replaced (`Sequence[int]`): The layers that are compared.
    """
    tokens, answers, pseudo = counts.clamp_min(1).tolist()
    per = {"hid": tokens, "tok": answers, "sup": answers, "seq": pseudo}
    terms = {key: float(sums[key]) / per[key] for key in WEIGHTS if key in sums}
    figures = {"loss": sum(getattr(stage, key) * value for key, value in terms.items())}
    figures |= {f"loss_{key}": value for key, value in terms.items()}
    if "agreement" in sums:
        figures["agreement"] = float(sums["agreement"]) / answers
    return figures | relative_errors(sums, replaced)


def relative_errors(sums: dict[str, Tensor], replaced: Sequence[int]) -> dict[str, float]:
    """Returns the squared error of the mixers relative to the teacher's, as the mean of the layers and for each."""
    if "errors" not in sums:
        return {}
    energies = sums["energies"]
    relative = (sums["errors"] / energies.clamp_min(torch.finfo(energies.dtype).tiny)).tolist()
    layers = zip(replaced, relative, strict=True)
    return {"relative_error": sum(relative) / len(relative)} | {f"{LAYER_PREFIX}{i}": error for i, error in layers}


# ---- Before work starts


def settle_evaluation(config) -> None:
    """
    Decides about evaluation where the user does not, and raises the `ValueError` of arguments that would have no
    effect. To be called before `TrainingArguments` rewrites its fields.
    """
    best = config.load_best_model_at_end
    for name in ("metric_for_best_model", "greater_is_better"):
        if getattr(config, name) is not None and not best:
            raise ValueError(f"{name}={getattr(config, name)!r} has no effect without load_best_model_at_end=True")
    strategy = str(getattr(config.eval_strategy, "value", config.eval_strategy))
    if strategy == "no" and (best or config.eval_steps is not None or config.eval_on_start or config.eval_delay):
        strategy = config.eval_strategy = "steps"
    if strategy == "steps" and config.eval_steps is None:
        config.eval_steps = config.save_steps
    if best and config.greater_is_better is None and config.metric_for_best_model is not None:
        config.greater_is_better = config.metric_for_best_model.endswith("agreement")


def check_evaluation(config, stages: Sequence[Stage], replaced: Sequence[int], held_out: bool) -> None:
    """Raises a `ValueError` for an evaluation without rows, and for a best model by a figure that a stage lacks."""
    if not held_out:
        if config.do_eval:
            raise ValueError(
                "eval_strategy, eval_steps, do_eval and load_best_model_at_end have no effect without held-out rows: "
                "give eval_dataset, or leave them out"
            )
        return
    if not config.load_best_model_at_end:
        return
    metric = config.metric_for_best_model.removeprefix("eval_")
    for stage in stages:
        known = ["loss", *(f"loss_{key}" for key in WEIGHTS if getattr(stage, key))]
        known += ["agreement"] if stage.tok else []
        known.append("relative_error")
        if metric not in (*known, *(f"{LAYER_PREFIX}{index}" for index in replaced)):
            raise ValueError(
                f"metric_for_best_model={config.metric_for_best_model!r} is not measured in {stage.name}: choose one "
                f"of {known}"
            )
