"""
One process of a distillation on CPUs, to be started by torchrun:

    distil_worker.py FOLDER OUT [--batch N] [--fsdp] [--die STEP] [--stages N] [--own] [--temperature T]
        [--worst] [--rows NAME --max_bad_rows N [--topk]] [--plain] [--zero STAGE] [--bf16]
        [--thrifty] [--separate]

FOLDER holds `student`, `teacher`, `rows.pt` or other rows, and for `--topk` the teacher's answers to these, `topk`.
Prints what the trained parameters were before every step: `elsewhere` is what ZeRO-3 leaves in the place of one.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoProcessor

from linmu_hf import LinMUForConditionalGeneration
from linmu_hf.distillation import DistillConfig, DistillTrainer, Stage, distill
from linmu_hf.distillation.stages import FLEX, LORA, SWIN


STAGES = (
    Stage("align", trains=(FLEX, SWIN), max_steps=3, learning_rate=1e-3, hid=0.1, hidden_input="teacher"),
    Stage("fed", trains=(FLEX,), max_steps=3, learning_rate=1e-3, hid=0.1, tok=0.5, muon=True),
    Stage("lora", trains=(FLEX, SWIN, LORA), max_steps=3, learning_rate=1e-3, tok=0.5, sup=0.5, lora_r=2),
)
OWN = Stage("own", trains=(FLEX, SWIN), max_steps=3, learning_rate=1e-3, hid=0.1, tok=1.0, beta=1.0, lmbda=0.75)
TOPK = (Stage("topk", trains=(FLEX, SWIN), max_steps=2, learning_rate=1e-3, tok=1.0),)


# No parameter is so small here that each process keeps it whole.
ZERO = {2: {"stage": 2}, 3: {"stage": 3, "stage3_param_persistence_threshold": 0}}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--die", type=int, default=-1, help="step, counted over all stages, in which to be killed")
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--own", action="store_true", help="a stage on the student's own answers, and no other")
    parser.add_argument("--worst", action="store_true", help="end with the weights of the largest held-out loss")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rows", default="rows", help="others are taken in their own order, none held out")
    parser.add_argument("--max_bad_rows", type=int, default=0)
    parser.add_argument("--topk", action="store_true", help="learn from stored log-probabilities")
    parser.add_argument("--plain", action="store_true", help="AdamW for all parameters")
    parser.add_argument("--zero", type=int, choices=(2, 3), help="DeepSpeed's stage")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument(
        "--thrifty", action="store_true", help="checkpointed layers, and logits of few tokens at a time"
    )
    parser.add_argument("--separate", action="store_true", help="a teacher with a backbone of its own")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    student, teacher = (
        LinMUForConditionalGeneration.from_pretrained(
            arguments.folder / name, dtype=torch.bfloat16 if arguments.bf16 else torch.float32
        )
        for name in ("student", "teacher")
    )
    evaluated = {"eval_steps": 1 if arguments.worst else 2}
    config = DistillConfig(
        output_dir=arguments.out,
        use_cpu=True,
        per_device_train_batch_size=arguments.batch,
        gradient_accumulation_steps=arguments.accumulate,
        logging_steps=1,
        save_steps=2,
        temperature=arguments.temperature,
        max_completion_length=4,
        adam_epsilon=1e-3,  # else rounding decides the sign of steps whose gradients are next to zero
        per_device_eval_batch_size=1,
        disable_tqdm=True,
        bf16=arguments.bf16,
        gradient_checkpointing=arguments.thrifty,
        logits_chunk_size=2 if arguments.thrifty else 1024,
        shared_teacher=False if arguments.separate else None,
        max_bad_rows=arguments.max_bad_rows,
        **({"train_sampling_strategy": "sequential"} if arguments.max_bad_rows else evaluated),
        **({"pseudo_targets": str(arguments.folder / "topk")} if arguments.topk else {}),
        **({"load_best_model_at_end": True, "greater_is_better": True} if arguments.worst else {}),
        **({"deepspeed": {"zero_optimization": ZERO[arguments.zero]}} if arguments.zero else {}),
        **({"fsdp": True, "fsdp_config": {"version": 2}} if arguments.fsdp else {}),
    )
    kinds, steps, step = set(), [], DistillTrainer.training_step

    def watched(self, model, *args, **kwargs):
        steps.append(1)
        if len(steps) == arguments.die:
            os.kill(os.getpid(), 9)
        trained = [p for p in self.student.parameters() if p.requires_grad]
        here = [p.numel() > 0 and 0 not in p.stride() for p in trained]
        kinds.update((type(p.data).__name__ if own else "elsewhere", str(p.dtype)) for p, own in zip(trained, here))
        return step(self, model, *args, **kwargs)

    DistillTrainer.training_step = watched
    processor = AutoProcessor.from_pretrained(arguments.folder / "student")
    rows = torch.load(arguments.folder / f"{arguments.rows}.pt", weights_only=False)
    held_out = None if arguments.max_bad_rows else rows[:3]  # no equal share for two processes
    stages = TOPK if arguments.topk else (OWN,) if arguments.own else STAGES[: arguments.stages]
    stages = [replace(stage, muon=False) for stage in stages] if arguments.plain else stages
    try:
        distill(config, student, teacher, rows, processor, eval_dataset=held_out, stages=stages)
    except ValueError as error:
        sys.exit(f"refused: {error}")
    print(f"trained {sorted(kinds)} in {len(steps)} steps of {config.world_size} processes", flush=True)


if __name__ == "__main__":
    main()
