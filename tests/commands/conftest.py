"""The models, rows and Hub of the rooms whose commands are tested here."""

from distillation_fixtures import frozen_heap, make_student, make_teacher, processor, rows, teacher_config  # noqa: F401
from evaluation_fixtures import dataset_folder, student_folder, teacher, teacher_folder, text_only_folder  # noqa: F401
from hub_fixtures import hub, saved, server  # noqa: F401
