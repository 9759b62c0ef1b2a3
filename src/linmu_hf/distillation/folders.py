"""The folders of a distillation: what it was made of, its stages, what it publishes, and where it goes on."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..files import copy_file, whole_folder, write_text
from .checkpoints import save_trained
from .config import DistillConfig
from .plots import plot_error_map, plot_training_log
from .stages import Stage, is_stage_name
from .targets.store import HEADER


SETTINGS = "distillation.json"
LOG = "training_log.jsonl"
CURVES = "loss_curves.png"
ERROR_MAP = "error_map.png"
CARD = "README.md"
PSEUDO_TARGETS = "pseudo_targets"
EVENTS = "runs"  # of TensorBoard, a folder for each stage
RESTS = r"\.(running|partial|old)$"  # of a stage
WEIGHTS = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"

# Gets a stage's complete folder, the stages so far and the rows of their logs.
FinishFolder = Callable[[Path, Sequence[Stage], list[dict[str, Any]]], object]


def check_output(config: DistillConfig, *inputs: str | Path | None) -> None:
    """
    Raises a `ValueError` if `output_dir` is a file, holds a model that no distillation put there, or `inputs` that
    overwriting it would delete.
    """
    out = Path(config.output_dir)
    for path in (*inputs, config.pseudo_targets) if config.overwrite_output_dir else ():
        if path and (out / SETTINGS).exists() and _would_be_deleted(Path(path).expanduser(), out):
            raise ValueError(f"overwrite_output_dir would delete {path}, which is read: choose another output_dir")
    if out.is_file():
        raise ValueError(f"{out} is a file: name a folder as output_dir")
    if (out / "config.json").exists() and not (out / SETTINGS).exists():
        raise ValueError(f"{out} holds a model that no distillation put there: choose another output_dir")


def prepare_output(out: Path, settings: dict[str, Any], overwrite: bool) -> None:
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
        for file in (out / EVENTS / name).rglob("events.out.tfevents.*"):
            file.unlink()
    if (out / PSEUDO_TARGETS / HEADER).is_file():
        shutil.rmtree(out / PSEUDO_TARGETS)
    weights = (path for path in out.glob("model*.safetensors*") if re.fullmatch(WEIGHTS, path.name))
    for path in (*weights, *(out / name for name in ("config.json", LOG, CURVES, ERROR_MAP, CARD, SETTINGS))):
        path.unlink(missing_ok=True)


def _would_be_deleted(path: Path, out: Path) -> bool:
    """Whether a file or folder is what [`_delete_run`] deletes, or in it."""
    path, out = path.resolve(), out.resolve()
    if not path.is_relative_to(out):
        return False
    first = out / next(iter(path.relative_to(out).parts), "")
    return path == out or (first / LOG).is_file() or first.name == PSEUDO_TARGETS or bool(re.search(RESTS, first.name))


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [text for key in keys for text in _differences(old.get(key), new.get(key), f"{name}.{key}".strip("."))]
    return [] if old == new else [f"{name} was {_brief(old)}, now {_brief(new)}"]


def _brief(value: Any) -> str:
    return "absent" if value is None else "there" if isinstance(value, dict) else str(value)


def last_checkpoint(running: Path) -> str | None:
    """Returns the newest complete checkpoint: the Trainer writes its state last, so one without it is half written."""
    numbered = {int(path.name.split("-")[1]): path for path in running.glob("checkpoint-*")}
    for _, path in sorted(numbered.items(), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return str(path)
        except (OSError, ValueError):
            shutil.rmtree(path)
    return None


def write_stage(
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
        _write_log(folder, rows)
        rows = logged(out, stages[:-1]) + rows
        plot_training_log(rows, folder / CURVES)
        plot_error_map(rows, folder / ERROR_MAP)
        if finish_folder is not None:
            finish_folder(folder, stages, rows)


def write_group(folder: Path, student, rows: list[dict[str, Any]]) -> None:
    """Writes what a group of layers has become and its log, whole or not at all; no model."""
    with whole_folder(folder) as partial:
        save_trained(student, partial)
        _write_log(partial, rows)


def logged(out: Path, stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Returns the rows of the logs of finished stages."""
    return [row for stage in stages for row in read_log(out / stage.name)]


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of the log in a folder."""
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def _write_log(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(folder / LOG, "".join(json.dumps(row) + "\n" for row in rows))


def publish(stage: Path, out: Path, rows: list[dict[str, Any]]) -> None:
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
    _write_log(out, rows)
