"""A teacher checkpoint in, a LinMU checkpoint out: streamed, resumable, atomic and verified."""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from tqdm.auto import tqdm

from ..files import locked, replace_folder, write_text
from ..modeling.configuration_linmu import LinMUConfig
from ..modeling.mixers import recurrent_layers, state_bytes
from ..modeling.remote_code import add_remote_code
from ..safetensors_io import (
    OutputTensor,
    file_hash,
    pack_shards,
    read_checkpoint,
    tensor_chunks,
    write_index,
    write_shard,
)
from .calibrate import CalibrationReport, calibrate
from .choose_layers import choose_attention_layers, number_to_keep
from .plan import ConversionPlan, parse_dtype
from .source import open_source
from .teacher import build_model, load_teacher
from .weight_map import decoder_config


INCOMPLETE_SUFFIX = ".incomplete"
MANIFEST = "conversion.json"
UNFINISHED = "This conversion has not finished: run linmu-convert again.\n"
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
Shards = dict[str, list[OutputTensor]]


@dataclass(frozen=True)
class ConversionReport:
    """A report of what a conversion did, or with `dry_run` would do."""

    teacher: str
    output: str
    layers_replaced: list[int]
    layers_kept: list[int]
    parameters_before: int
    parameters_after: int
    bytes_written: int
    state_bytes: int
    shards: int
    dtype: str
    dropped: list[str]
    scaled_heads: dict[str, float]  # whose features a large bias would saturate, and that bias
    seconds: float
    peak_memory_bytes: int
    dry_run: bool
    calibration: CalibrationReport | None = None

    def __str__(self) -> str:
        n_layers = len(self.layers_replaced) + len(self.layers_kept)
        kept = f", attention kept in {self.layers_kept}" if self.layers_kept else ""
        growth = self.parameters_after / self.parameters_before - 1
        verb = "would write" if self.dry_run else "wrote"
        lines = [
            f"{self.teacher} -> {self.output}",
            f"  layers       {len(self.layers_replaced)} of {n_layers} replaced by M-MATE{kept}",
            f"  parameters   {self.parameters_before:,} -> {self.parameters_after:,} ({growth:+.1%})",
            f"  weights      {verb} {self.bytes_written / 1e6:,.1f} MB of {self.dtype} in {self.shards} file(s)",
            f"  took         {self.seconds:.1f} s, peak memory {self.peak_memory_bytes / 1e6:,.0f} MB",
        ]
        if self.layers_replaced:
            lines.insert(-1, f"  state        {self.state_bytes / 1e6:,.1f} MB for each sequence, however long")
        if self.dropped:
            lines.insert(-1, f"  dropped      {len(self.dropped)} teacher tensor(s): {', '.join(self.dropped[:4])}")
        if self.scaled_heads:
            worst = max(self.scaled_heads, key=self.scaled_heads.__getitem__)
            lines.append(
                f"  scaled       features of {len(self.scaled_heads)} head(s), whose biases of up to "
                f"{self.scaled_heads[worst]:.3g} ({worst}) would saturate them"
            )
        if self.calibration:
            lines.append(str(self.calibration))
        return "\n".join(lines)

    def to_dict(self) -> dict:
        return asdict(self)


def convert(
    teacher: str,
    output: str,
    *,
    dtype: str | torch.dtype | None = None,
    keep_attention: Sequence[int] | str = (),
    preset: str = "default",
    mixer_options: dict | None = None,
    revision: str | None = None,
    max_shard_size: int | str = "2GB",
    calibration_batches: Sequence[Mapping] | None = None,
    calibration_steps: int = 0,
    overwrite: bool = False,
    dry_run: bool = False,
    finish_folder: Callable[[Path], object] | None = None,
) -> ConversionReport:
    """
    Converts a Qwen2.5-VL or NVILA checkpoint into a LinMU checkpoint by weight reuse (Eq. 4 and 5).

    Tensors are streamed in chunks, so memory does not grow with the model. Work goes into `<output>.incomplete`, which
    a later run with the same arguments takes up again, and becomes `output` only when complete and verified.

    Args:
        teacher (`str`): Folder, or model on the Hub.
        output (`str`): Folder to be written.
        dtype (`str` or `torch.dtype`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`; by default each tensor
            keeps the teacher's. Decays (`A_log`, `dt_bias`, `D`) are float32 whatever it says.
        keep_attention (`Sequence[int]`, `"all"` or `"auto:K"`, *optional*): Layers that keep full attention; with
            `"auto:K"` the K that are costliest to replace on the calibration batches, see [`choose_attention_layers`].
        preset (`str`, *optional*, defaults to `"default"`): `"paper"` or `"default"`.
        mixer_options (`dict`, *optional*): M-MATE fields of [`LinMUTextConfig`], over the preset.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        max_shard_size (`int` or `str`, *optional*, defaults to `"2GB"`): Largest weight file, in bytes.
        calibration_batches (`Sequence[Mapping]`, *optional*): Model inputs for a closed-form start, see [`calibrate`];
            for this both models are held in memory, and of everything else what one layer needs.
        calibration_steps (`int`, *optional*, defaults to 0): Its `scan_steps`.
        overwrite (`bool`, *optional*, defaults to `False`): Whether a model that is in `output` may be replaced.
        dry_run (`bool`, *optional*, defaults to `False`): Check and report without writing.
        finish_folder (`Callable`, *optional*): Called with the complete folder before it gets its name, for example to
            add a model card.

    Raises:
        `FileNotFoundError`, `FileExistsError`, `ValueError`: Something is wrong with an argument or the teacher;
            always raised before any work.
    """
    start = time.perf_counter()
    target = check_output(output, overwrite, teacher)
    max_bytes = parse_size(max_shard_size)
    dtype = parse_dtype(dtype)
    source = open_source(teacher, revision)
    kept = keep_attention if isinstance(keep_attention, str) else tuple(keep_attention)
    assert source.teacher is not None
    teacher_config = source.teacher.config
    to_choose = number_to_keep(kept, teacher_config.text_config.num_hidden_layers)
    if to_choose and calibration_batches is None:
        raise ValueError(f"keep_attention={kept!r} is chosen on data: give calibration samples, or name the layers")
    if calibration_steps < 0 or (calibration_steps and calibration_batches is None):
        raise ValueError(f"calibration_steps={calibration_steps} must be 0, or positive with samples to calibrate on")

    def plan_with(kept: Sequence[int] | str) -> ConversionPlan:
        try:
            config = LinMUConfig.from_teacher(
                teacher_config, keep_attention=kept, preset=preset, **(mixer_options or {})
            )
        except StrictDataclassError as error:  # a value of the wrong type
            raise ValueError(str(error)) from error
        return ConversionPlan(source, config, dtype)

    plan = plan_with(() if to_choose else kept)
    if calibration_batches is not None and not recurrent_layers(decoder_config(plan.config).layer_types or []):
        raise ValueError(f"keep_attention={kept!r} leaves no layer to calibrate: leave the samples out, or keep fewer")
    known = load_teacher(source.folder) if calibration_batches is not None and not dry_run else None
    if to_choose and known is not None and calibration_batches is not None:
        student = build_model(plan.config, plan.dtype, {tensor.name: tensor for tensor in plan.tensors}).eval()
        plan = plan_with(choose_attention_layers(student, known, calibration_batches, to_choose))
        del student
    shards = pack_shards(plan.tensors, max_bytes)

    calibration = None
    if not dry_run:
        work = target.with_name(target.name + INCOMPLETE_SUFFIX)
        with locked(target):
            hashes = _write(work, plan, shards)
            if calibration_batches is not None:
                calibration = _calibrate(work, plan, shards, hashes, known, calibration_batches, calibration_steps)
            _verify(work, plan, hashes)
            _finish(work, target, plan, finish_folder)

    layer_types = decoder_config(plan.config).layer_types or []
    replaced = recurrent_layers(layer_types)
    return ConversionReport(
        teacher=str(teacher),
        output=str(output),
        layers_replaced=replaced,
        layers_kept=[layer for layer in range(len(layer_types)) if layer not in replaced],
        parameters_before=sum(source.tensors[key].numel for key in plan.used),
        parameters_after=sum(math.prod(tensor.shape) for tensor in plan.tensors),
        bytes_written=sum(tensor.nbytes for tensor in plan.tensors),
        state_bytes=state_bytes(decoder_config(plan.config), plan.dtype.itemsize),
        shards=len(shards),
        dtype=str(plan.dtype).removeprefix("torch."),
        dropped=plan.dropped,
        scaled_heads=plan.scaled_heads(),
        seconds=time.perf_counter() - start,
        peak_memory_bytes=peak_memory(),
        dry_run=dry_run,
        calibration=calibration,
    )


def parse_size(size: int | str) -> int:
    """Reads a size, such as `"500MB"` as 500,000,000 bytes."""
    text = str(size).upper().replace(" ", "")
    number, unit = (text[:-2], UNITS[text[-2:]]) if text[-2:] in UNITS else (text, 1)
    if not number.isdecimal() or int(number) == 0:
        raise ValueError(f"max_shard_size={size!r} must be a number of bytes, or such as '500MB' or '2GB'")
    return int(number) * unit


def peak_memory() -> int:
    """Returns the most memory this process has held, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def check_output(output: str, overwrite: bool, teacher: str) -> Path:
    """Returns the output folder as an absolute path; a `FileExistsError` if something is in the way."""
    target = Path(output).expanduser().resolve()
    if target.is_file():
        raise FileExistsError(f"{output} is a file: name a folder that does not exist yet")
    if target == Path.cwd().resolve() or os.path.ismount(target):  # it could not be put in place of these
        raise FileExistsError(f"{output} is the current folder, or a disk's own: name a folder in it")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{output} exists and is not empty: name another folder, or allow it with overwrite")
        if Path(teacher).expanduser().resolve().is_relative_to(target.resolve()):
            raise FileExistsError(f"{output} holds the teacher, which overwrite would delete: name another folder")
        if not (target / "config.json").is_file():
            raise FileExistsError(f"{output} holds no model that overwrite could replace: name another folder")
    return target


def _write(work: Path, plan: ConversionPlan, shards: Shards) -> dict[str, dict[str, str]]:
    """Writes what is not there yet, noting each finished shard in the manifest; returns the hashes of every shard."""
    fingerprint = plan.fingerprint(shards)
    manifest = _read_manifest(work)
    if manifest.get("fingerprint") != fingerprint:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        manifest = {"fingerprint": fingerprint, "hashes": {}}
    # Without a config.json, from_pretrained falls back on the class's defaults; with this one, nothing loads.
    write_text(work / "config.json", UNFINISHED)
    with _progress("writing", plan.tensors) as bar:
        for file, tensors in shards.items():
            if file in manifest["hashes"] and (work / file).is_file():
                bar.update(sum(tensor.nbytes for tensor in tensors))
                continue
            manifest["hashes"][file] = write_shard(work / file, tensors, bar.update)
            write_text(work / MANIFEST, json.dumps(manifest))
    write_index(work, shards)
    return manifest["hashes"]


def _calibrate(
    work: Path,
    plan: ConversionPlan,
    shards: Shards,
    hashes: dict[str, dict[str, str]],
    teacher: torch.nn.Module,
    batches: Sequence[Mapping],
    steps: int,
) -> CalibrationReport:
    """Calibrates the converted weights and rewrites the shards that hold changed tensors."""
    stored = read_checkpoint(work)
    student = build_model(plan.config, plan.dtype, stored)
    report = calibrate(student, teacher, batches, scan_steps=steps)
    state = student.state_dict()
    for name in report.changed:
        if not state[name].isfinite().all():
            raise ValueError(f"calibration left {name!r} with values that are not finite: choose another dtype")
    touched = {file: tensors for file, tensors in shards.items() if {t.name for t in tensors} & set(report.changed)}
    # A run that is killed from here on writes these shards anew from the teacher.
    manifest = _read_manifest(work)
    manifest["hashes"] = {file: value for file, value in hashes.items() if file not in touched}
    write_text(work / MANIFEST, json.dumps(manifest))
    with _progress("calibrated", [tensor for tensors in touched.values() for tensor in tensors]) as bar:
        for file, tensors in touched.items():
            renewed = [
                replace(tensor, chunks=partial(tensor_chunks, state[tensor.name].to(tensor.dtype)))
                if tensor.name in report.changed
                else replace(tensor, chunks=stored[tensor.name].chunks)
                for tensor in tensors
            ]
            hashes[file] = write_shard(work / file, renewed, bar.update)
    return report


def _verify(work: Path, plan: ConversionPlan, hashes: dict[str, dict[str, str]]) -> None:
    """Reads everything back: names, shapes and dtypes against the model, bytes against what their source gave."""
    wanted = {name: value for shard in hashes.values() for name, value in shard.items()}
    stored = read_checkpoint(work)
    expected = {tensor.name: tensor for tensor in plan.tensors}
    bad = sorted(set(expected) ^ set(stored))
    with _progress("verifying", plan.tensors) as bar:
        for name, tensor in stored.items() if not bad else ():
            same = (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype)
            if not same or file_hash(tensor, bar.update) != wanted[name]:
                bad.append(name)
    if bad:
        (work / MANIFEST).unlink()
        raise OSError(f"what was written to {work} does not read back ({bad[0]!r} first): check the disk, run again")


def _finish(work: Path, target: Path, plan: ConversionPlan, finish_folder: Callable[[Path], object] | None) -> None:
    """Adds processor and configuration, config.json last, and gives the folder its name."""
    plan.source.write_processor(work)
    add_remote_code(plan.config, work)
    write_text(work / "config.json", plan.config.to_json_string())
    if finish_folder is not None:
        finish_folder(work)
    (work / MANIFEST).unlink()
    replace_folder(work, target)


def _progress(what: str, tensors: Sequence[OutputTensor]) -> tqdm:
    return tqdm(total=sum(tensor.nbytes for tensor in tensors), unit="B", unit_scale=True, desc=what)


def _read_manifest(work: Path) -> dict:
    try:
        return json.loads((work / MANIFEST).read_text())
    except (FileNotFoundError, ValueError):
        return {}
