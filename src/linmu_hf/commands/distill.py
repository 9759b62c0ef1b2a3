"""`linmu-distill`: a converted model and its teacher in, a distilled model out."""

import argparse
import copy
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import logging

from ..conversion.source import load_whole, read_processor, read_raw_config
from ..conversion.teacher import check_tokenizers, load_processor
from ..data import choose_split, is_single_file, load_training_rows
from ..evaluation.loading import check_model, library_versions
from ..evaluation.speed.models import PRESETS, text_config, vision_config
from ..files import check_report
from ..hub import find_origin, prepare_repo, push_folder, write_model_card
from ..modeling.configuration_linmu import LinMUConfig
from ..modeling.modeling_linmu import LinMUForConditionalGeneration
from .common import TypedParser, check_positive, run_command, write_report


PRINT, ESTIMATE = "--print_stages", "--estimate"
DEFAULT_GPU = "h100"


@dataclass
class ScriptArguments:
    """The arguments of `linmu-distill` besides those of [`DistillConfig`]."""

    model: str = field(metadata={"help": "The student: folder or Hub id of a converted model."})
    dataset: str = field(
        metadata={"help": "A folder or file of rows, anything load_dataset opens, or a YAML file that mixes several."}
    )
    teacher: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the teacher; short for --teacher_model_name_or_path."}
    )
    dataset_train_split: str | None = field(
        default=None, metadata={"help": "Split to learn from, by default `train`; a single file is read whole."}
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Held-out rows, in any form of --dataset, measured every --eval_steps."}
    )
    dataset_eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Their split, by default `test`; without --eval_dataset it is one of --dataset, no single file."
        },
    )
    streaming: bool = field(default=False, metadata={"help": "Whether rows are read as they are needed."})
    json: str | None = field(default=None, metadata={"help": "File that gets the run's last figures."})
    print_stages: bool = field(
        default=False, metadata={"help": "Print the stages as YAML, to edit and give back as --stages, and end."}
    )
    estimate: bool = field(
        default=False,
        metadata={"help": "Print memory and time of every stage, from --teacher's config.json alone, and end."},
    )
    gpu: str | None = field(
        default=None, metadata={"help": f"GPU of the estimate, such as {DEFAULT_GPU}, its default, or rtx4090."}
    )
    gpus: int | None = field(default=None, metadata={"help": "How many GPUs the estimate is for. By default 1."})
    engine: str | None = field(
        default=None, metadata={"help": "Engine of the estimate: ddp, fsdp2, zero2 or zero3. By default fsdp2."}
    )
    sequence_length: int | None = field(
        default=None, metadata={"help": "Tokens of a row, for the estimate. By default 8192."}
    )


ESTIMATE_ONLY = ("gpu", "gpus", "engine", "sequence_length")


def run(script: ScriptArguments, config) -> dict:
    from ..distillation.arguments import check_layers_at_a_time
    from ..distillation.engines.processes import is_main, on_main
    from ..distillation.loading import load_as_teacher
    from ..distillation.runner import check_output, distill

    teacher_path = script.teacher or config.teacher_model_name_or_path
    if teacher_path is None:
        raise ValueError("no teacher: give --teacher FOLDER_OR_HUB_ID")
    config.teacher_model_name_or_path = teacher_path
    check_model(script.model)
    if read_raw_config(script.model)["model_type"] != LinMUConfig.model_type:
        raise ValueError(f"{script.model} is no LinMU model: make one of it with `linmu-convert` first")
    check_output(config, script.model, teacher_path, script.dataset, script.eval_dataset)
    stages = config.get_stages()
    check_layers_at_a_time(config, stages)
    dataset, held_out = _load_rows(script, config.seed)
    student = load_whole(LinMUForConditionalGeneration, script.model, dtype="auto" if config.bf16 else "float32")
    processor = read_processor(script.model)
    options = {"dtype": None if config.bf16 else "float32", **config.teacher_options()}
    attention, revision = options.pop("attn_implementation", None), options["revision"]
    check_tokenizers(processor.tokenizer, load_processor(teacher_path, revision=revision).tokenizer)
    teacher = load_as_teacher(student, teacher_path, stages, config.shared_teacher, attention, **options)

    repo = on_main(lambda: _prepare_push(config))
    origin = find_origin(teacher_path, revision, script.model)

    def write_card(folder, stages, rows):
        machine = describe_machine(config)
        write_model_card(folder, origin, stages=stages, rows=rows, dataset=script.dataset, machine=machine)

    for stage in stages:
        done = Path(config.output_dir, stage.name).is_dir() and not config.overwrite_output_dir
        if is_main():
            print(f"{stage.name:14}{describe(stage)}{', finished before' if done else ''}", flush=True)
    start = time.perf_counter()
    trains = copy.copy(config)
    trains.push_to_hub = False  # the stages upload nothing, the finished model is uploaded below
    rows = distill(
        trains,
        student,
        teacher,
        dataset,
        processor,
        eval_dataset=held_out,
        stages=stages,
        finish_folder=write_card,
    )
    seconds = time.perf_counter() - start
    if repo:
        url = on_main(lambda: _push(config, repo))
        if is_main():
            print(url)
    figures: dict[str, dict] = {}
    for row in rows:
        figures.setdefault(row["stage"], {}).update(row)
    return {
        "output_dir": config.output_dir,
        "model": script.model,
        "teacher": teacher_path,
        "dataset": script.dataset,
        "rows": None if script.streaming else len(dataset),
        "held_out_rows": None if held_out is None else len(held_out),
        "machine": describe_machine(config),
        "seconds": round(seconds, 1),
        "stages": figures,
        "versions": library_versions(),
    }


def estimate(script: ScriptArguments, config) -> str:
    """Returns memory and time of every stage, and what to change if one does not fit."""
    from ..distillation.arguments import check_layers_at_a_time
    from ..distillation.costs import estimate as estimates
    from ..distillation.costs.tracing import Shape

    name = script.teacher or config.teacher_model_name_or_path
    if name is None:
        raise ValueError(f"no teacher: give --teacher FOLDER_OR_HUB_ID, or one of {', '.join(PRESETS)}")
    check_positive(argparse.Namespace(**vars(script)), "gpus", "sequence_length")
    teacher = _read_config(name)
    student = _read_config(script.model) if script.model else teacher
    estimates.check_fits_teacher(student, teacher)
    machine = estimates.Machine(script.gpu or DEFAULT_GPU, script.gpus or 1, script.engine)
    stages = config.get_stages()
    check_layers_at_a_time(config, stages, machine.count)
    shape = Shape(
        script.sequence_length or 8192,
        config.per_device_train_batch_size,
        half=config.bf16,
        shared=config.shared_teacher is not False,
        checkpoints=config.gradient_checkpointing,
        logits_chunk_size=config.logits_chunk_size,
        layers=config.layers_at_a_time,
        completion=config.max_completion_length,
    )
    micro_batches = config.gradient_accumulation_steps
    found: list[Any] = []
    for stage in stages:
        if shape.shared and any(one.stage.lora_r for one in found):
            shape = replace(shape, shared=False)  # adapters were merged into the backbone
        found.append(estimates.estimate_stage(student, stage, shape, machine, micro_batches))
    advice = estimates.advise(student, found, shape, machine, micro_batches)
    return "\n\n".join(
        [estimates.format_estimates(found, machine), *advice, estimates.describe(shape, machine, stages)]
    )


def _load_rows(script: ScriptArguments, seed: int) -> tuple[Any, Any]:
    """Returns the rows to learn from, and those held out, or `None`."""
    held_out, split = script.eval_dataset, script.dataset_eval_split
    if split and not held_out and is_single_file(script.dataset):
        raise ValueError(
            f"--dataset_eval_split {split}: {script.dataset} is a single file, all of whose rows are learned from: "
            "give the held-out rows as --eval_dataset"
        )
    learned = choose_split(script.dataset, script.dataset_train_split, "train", "--dataset_train_split")
    dataset = load_training_rows(script.dataset, learned, streaming=script.streaming, seed=seed)
    if not held_out and not split:
        return dataset, None
    held_out = held_out or script.dataset
    return dataset, load_training_rows(held_out, choose_split(held_out, split, "test", "--dataset_eval_split"))


def _read_config(name: str) -> LinMUConfig:
    """Returns the configuration of a student, or of the one that would be made of a teacher."""
    text = text_config(name)
    if name in PRESETS:
        return LinMUConfig(text_config=text, vision_config=vision_config(name))
    config = AutoConfig.from_pretrained(name)
    return config if isinstance(config, LinMUConfig) else LinMUConfig.from_teacher(config)


def _prepare_push(config) -> str | None:
    """The repository of `push_to_hub`, by default named like the output folder, as the Trainer does."""
    if not config.push_to_hub:
        return None
    return prepare_repo(
        config.hub_model_id or Path(config.output_dir).absolute().name,
        private=config.hub_private_repo,
        revision=config.hub_revision,
        token=config.hub_token,
    )


def _push(config, repo: str) -> str:
    return push_folder(config.output_dir, repo, revision=config.hub_revision, token=config.hub_token).commit_url


def describe(stage) -> str:
    """Describes a stage in one line, such as `100 steps at 0.001: 0.5 hid + 0.5 tok`."""
    return f"{stage.max_steps:,} steps at {stage.learning_rate:g}: {stage.objective()}"


def describe_machine(config) -> str:
    """Names the devices of all processes, such as `8 x NVIDIA A100`."""
    if config.device.type == "cuda":
        return f"{config.world_size} x {torch.cuda.get_device_name(config.device)}"
    return f"{config.world_size} process{'es' if config.world_size > 1 else ''} on {config.device.type.upper()}"


def format_table(stages: dict[str, dict]) -> str:
    """Returns a table of the last figures of every stage."""
    keys = (
        "loss_hid", "loss_tok", "loss_seq", "loss_sup", "agreement", "relative_error",
        "eval_loss", "eval_agreement", "best_step", "seconds",
    )  # fmt: skip
    shown = [key for key in keys if any(key in figures for figures in stages.values())]
    lines = [f"{'':14}" + "".join(f"{key:>16}" for key in shown)]
    for name, figures in stages.items():
        cells = (f"{figures[key]:.4g}" if key in figures else "-" for key in shown)
        lines.append(f"{name:14}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


# Arguments of the Trainer that mean something else here.
HELP = {
    "eval_steps": "Steps between measurements of held-out rows, by default `save_steps`.",
    "load_best_model_at_end": "Whether every stage ends with the weights of its best evaluation; needs held-out rows.",
    "push_to_hub": "Whether to upload the finished model, once all stages are done.",
}


def _parser(prints: bool) -> TypedParser:
    """Builds the parser, for printing alone or not; without the extra `train` this is where it is missed."""
    from ..distillation.arguments import refused_fields
    from ..distillation.config import DistillConfig

    description = __doc__.split(": ")[1]
    parser = TypedParser((ScriptArguments, DistillConfig), prog="linmu-distill", description=description)
    hidden = refused_fields()
    for action in parser._actions:
        if action.dest.removeprefix("no_") in hidden:
            action.help = argparse.SUPPRESS
        action.help = HELP.get(action.dest, action.help)
        if prints:
            action.required = False
    return parser


def main(argv: list[str] | None = None) -> int:
    logging.set_verbosity_warning()

    def work() -> None:
        from ..distillation.engines.processes import is_main, on_main
        from ..distillation.recipes import format_stages

        given = list(sys.argv[1:] if argv is None else argv)
        parser = _parser(PRINT in given or ESTIMATE in given)
        if ESTIMATE in given:
            given = [*given, "--use_cpu", "True"]  # the GPU of the estimate need not be there
        script, config = parser.parse_args_into_dataclasses(given)
        if script.estimate:
            print(estimate(script, config))
            return
        for name in ESTIMATE_ONLY:
            if getattr(script, name) is not None:
                raise ValueError(f"--{name} has no effect without --estimate: leave it out")
        if script.print_stages:
            print(format_stages(config.get_stages()), end="")
            return
        check_report(script.json)
        report = run(script, config)
        on_main(lambda: write_report(script.json, report))
        if is_main():
            print(f"\n{format_table(report['stages'])}\n\n{report['output_dir']}: {report['seconds']} s")

    return run_command("linmu-distill", work, "; the same command takes it up again")


if __name__ == "__main__":
    sys.exit(main())
