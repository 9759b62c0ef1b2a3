"""Stores a teacher's answers: `sys.argv` has the folder of teacher and data, and that of the store."""

import sys

import torch
from transformers import AutoProcessor

from linmu_hf import LinMUForConditionalGeneration
from linmu_hf.data import load_rows
from linmu_hf.distillation.targets.fill import decode_pseudo_targets


def main() -> None:
    torch.set_num_threads(1)
    root, out = sys.argv[1:]
    teacher = LinMUForConditionalGeneration.from_pretrained(f"{root}/teacher")
    processor = AutoProcessor.from_pretrained(f"{root}/teacher")
    decode_pseudo_targets(teacher, processor, load_rows(f"{root}/data"), out, max_new_tokens=2, batch_size=1, top_k=3)
