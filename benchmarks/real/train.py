"""
A short training loop on raw text, in which every token counts.

`linmu-distill` counts the answers of conversations. Here rows begin anywhere in a text, and the hidden loss is
relative and leaves out the first token, so the loop is written out; losses and optimizer groups are the package's.
"""

import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from linmu_hf.distillation.losses import next_token_targets, output_losses, squared_errors
from linmu_hf.distillation.muon import Muon
from linmu_hf.distillation.stages import Stage, parameter_groups, set_trainable
from linmu_hf.files import whole_file
from linmu_hf.modeling.mixers import recurrent_layers

from .settings import Train
from .text import TextRows


def train(student, teacher, rows: TextRows, step: Train, checkpoint: Path) -> list[dict[str, Any]]:
    """
    Trains the student in place; called again after it was killed, it goes on from its checkpoint to the same result.

    Args:
        student, teacher (`LinMUForConditionalGeneration`): the teacher is not changed.
        rows (`TextRows`): step i takes rows i * batch_size and following.
        step (`Train`): the losses and for how long.
        checkpoint (`Path`): the file to keep the state in while it runs.

    Returns:
        `list[dict]`: the losses of every optimizer step.
    """
    stage = Stage(step.name, trains=step.trains, max_steps=step.steps, learning_rate=step.learning_rate, tok=1.0)
    names = set_trainable(student, stage)
    trained = {name: p for name, p in student.named_parameters() if name in set(names)}
    groups = parameter_groups(student, step.learning_rate, step.weight_decay, step.slow_lr_multiplier, muon=step.muon)
    rates = [group["lr"] for group in groups]
    optimizer = (Muon if step.muon else torch.optim.AdamW)(groups, betas=(0.9, 0.95))
    settings = json.loads(json.dumps(asdict(step)))
    log: list[dict[str, Any]] = []
    if checkpoint.exists():
        state = torch.load(checkpoint)
        if state["settings"] != settings:
            raise ValueError(f"{checkpoint} is of a step with other settings: delete it, or use {state['settings']}")
        optimizer.load_state_dict(state["optimizer"])
        log = state["log"]
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state["parameters"][name])

    student.train()
    bar = tqdm(range(len(log), step.steps), desc=step.name, initial=len(log), total=step.steps, unit="step")
    for i in bar:
        start = time.perf_counter()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * rate_factor(i, step)
        terms = losses(student, teacher, rows.batch(i * step.batch_size, step.batch_size), step)
        loss = sum(getattr(step, name) * terms[name] for name in ("kl", "hidden") if name in terms)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), step.max_grad_norm)
        if not math.isfinite(float(norm)):
            raise FloatingPointError(f"{step.name}: the gradient of step {i + 1} is not finite: lower learning_rate")
        optimizer.step()
        values = {name: float(value.detach()) for name, value in terms.items()}
        seconds = time.perf_counter() - start
        log.append({"step": i + 1, "loss": float(loss.detach()), **values, "norm": float(norm), "seconds": seconds})
        bar.set_postfix({name: f"{value:.3f}" for name, value in values.items()})
        if len(log) % step.checkpoint_steps == 0 and len(log) < step.steps:
            save_checkpoint(checkpoint, trained, optimizer, log, settings)
    student.eval().requires_grad_(False)
    return log


def losses(student, teacher, ids: Tensor, step: Train) -> dict[str, Tensor]:
    """Returns `kl`, `hidden` and `agreement` of a batch [b, t], those of them that the step asks for."""
    replaced = recurrent_layers(student.config.text_config.layer_types)
    compares = step.hidden > 0
    with torch.no_grad():
        known = teacher.model(input_ids=ids, use_cache=False, output_mixer_states=compares)
    terms: dict[str, Tensor] = {}
    if step.fed == "teacher":
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        outputs = student.model.language_model.run_mixers(known.mixer_inputs, position_ids=positions)
    else:
        answer = student.model(input_ids=ids, use_cache=False, output_mixer_states=compares)
        outputs = answer.mixer_outputs
        targets = next_token_targets(ids).flatten()
        found = output_losses(
            answer.last_hidden_state.flatten(0, 1),
            student.lm_head,
            {"tok": targets},
            {"tok": ids.shape[0] * (ids.shape[1] - 1)},
            teacher_hidden=known.last_hidden_state.flatten(0, 1),
            teacher_head=teacher.lm_head,
            chunk_size=512,
        )
        terms |= {"kl": found["tok"], "agreement": found["agreement"]}
    if compares:
        chosen = [outputs[layer] for layer in replaced]
        terms["hidden"] = relative_error(chosen, [known.mixer_outputs[layer] for layer in replaced])
    return terms


def relative_error(outputs: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Returns |output - target|^2 / |target|^2 over all tokens but the first of every row, mean over layers."""
    mask = torch.ones(targets[0].shape[:2])
    mask[:, 0] = 0
    errors, energies = squared_errors(outputs, targets, mask)
    return (errors / energies).mean()


def rate_factor(i: int, step: Train) -> float:
    """Returns the share of the peak learning rate at step i: a linear rise, then half a cosine to zero."""
    rise = max(1, round(step.warmup * step.steps))
    if i < rise:
        return (i + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (i - rise + 1) / (step.steps - rise + 1)))


def save_checkpoint(file: Path, trained: dict, optimizer, log: list, settings: dict) -> None:
    """Writes what training goes on from; the file is either the old one or the new one."""
    state = {"parameters": trained, "optimizer": optimizer.state_dict(), "log": log, "settings": settings}
    with whole_file(file, "wb") as stream:
        torch.save(state, stream)
