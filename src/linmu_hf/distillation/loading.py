"""A teacher from its checkpoint: with a backbone of its own only where it cannot run on the student's."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..conversion.teacher import load_attention, load_teacher
from .runner import why_separate
from .stages import Stage
from .teacher import SharedTeacher, Teacher, as_teacher


def load_as_teacher(
    student,
    path: str | Path,
    stages: Sequence[Stage],
    shared: bool | None = None,
    attn_implementation: str | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
) -> Teacher:
    """
    Loads the teacher of a distillation in as little memory as its stages allow.

    Args:
        student (`LinMUForConditionalGeneration`): The student.
        path (`str` or `Path`): Folder or Hub id of the teacher.
        stages (`Sequence[Stage]`): What is going to be trained.
        shared (`bool`, *optional*): Whether the teacher runs on the student's backbone; by default where it can.
        attn_implementation (`str`, *optional*): Of the teacher; by default one that needs no mask of t x t.
        dtype, revision: Of a teacher with a backbone of its own, as in [`load_teacher`].

    Raises:
        `ValueError`: `shared=True`, and the backbones differ or a stage changes the student's.
    """
    reason = why_separate(student, stages)
    if shared and reason:
        raise ValueError(f"shared_teacher=True, but {reason}: leave it out")
    if shared is not False and reason is None and dtype in (None, str(student.dtype).removeprefix("torch.")):
        loaded = load_attention(student, path, revision)
        if not isinstance(loaded, str):
            attention, config = loaded
            config.text_config._attn_implementation = attn_implementation or "sdpa"
            return SharedTeacher(student, attention, config)
    teacher = load_teacher(path, dtype=dtype, revision=revision)
    if attn_implementation is not None:
        teacher.set_attn_implementation(attn_implementation)
    return as_teacher(student, teacher, False if reason else shared)
