"""Every field of the installed TrainingArguments is honoured or refused, never accepted and ignored."""

import dataclasses
import re

import pytest
from transformers import TrainingArguments

from linmu_hf.distillation.arguments import FREE, REFUSED_VALUES, RESULT, refused_fields
from linmu_hf.distillation.config import DistillConfig


pytestmark = pytest.mark.core_training

FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments) if field.init}


def another(field):
    """A value that is not the default of a field."""
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if isinstance(default, bool) or default is None:
        return not default
    return default + 1 if isinstance(default, (int, float)) else "something" if isinstance(default, str) else ["x"]


def test_the_table_names_fields_once():
    names = [*RESULT, *FREE]
    assert len(set(names)) == len(names)
    # Some are fields of a newer Transformers; the bulk must be there, or a spelling is wrong.
    assert len(set(names) - FIELDS.keys()) <= 5


@pytest.mark.parametrize("name", refused_fields())
def test_refused_by_name_value_and_remedy(tmp_path, name):
    field = next(f for f in dataclasses.fields(DistillConfig) if f.name == name)
    value = another(field)
    with pytest.raises(ValueError, match=rf"^{name}={re.escape(repr(value))} is not .*leave {name} at"):
        DistillConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_a_field_that_nobody_decided_on_is_refused():
    assert not set(refused_fields()) & {*RESULT, *FREE}
    assert {*refused_fields(), *RESULT, *FREE} >= FIELDS.keys()


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"max_steps": 100}, "stage-1.max_steps"),
        ({"num_train_epochs": 1.0}, "stage-1.max_steps"),
        ({"learning_rate": 1.0}, "stage-1.learning_rate"),
        ({"resume_from_checkpoint": "/nonexistent"}, "output_dir"),
        ({"fp16": True}, "bf16"),
        ({"eval_accumulation_steps": 2}, "linmu-eval"),
        ({"do_predict": True}, "linmu-eval"),
        ({"remove_unused_columns": True}, "rows are encoded whole"),
    ],
)
def test_a_refusal_names_the_remedy(tmp_path, changes, remedy):
    with pytest.raises(ValueError, match=remedy):
        DistillConfig(output_dir=str(tmp_path), use_cpu=True, **changes)


@pytest.mark.parametrize(("name", "value"), [(n, f"{v}") for n, values in REFUSED_VALUES.items() for v in values])
def test_values_that_cannot_work_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        DistillConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_defaults_may_be_repeated(tmp_path):
    values = {name: getattr(DistillConfig(output_dir=str(tmp_path), use_cpu=True), name) for name in ("fp16", "debug")}
    DistillConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=-1, eval_strategy="no", **values)


def test_lora_has_the_scale_of_equation_12(tmp_path):
    for changes, alpha in (([], 8), (["lora_r=4"], 4), (["lora_r=4", "lora_alpha=8"], 8)):
        overrides = [f"stage-3.{change}" for change in changes]
        config = DistillConfig(output_dir=str(tmp_path), use_cpu=True, stage_overrides=overrides)
        assert config.get_stages()[-1].alpha() == alpha


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"dtype": "float32"}, {"dtype": "float32"}),
        ({"torch_dtype": "bfloat16", "revision": "v1"}, {"dtype": "bfloat16", "revision": "v1"}),
        ({"attn_implementation": "eager", "trust_remote_code": False}, {"attn_implementation": "eager"}),
        ('{"dtype": "float32", "device_map": null}', {"dtype": "float32"}),
    ],
)
def test_how_the_teacher_is_loaded(tmp_path, kwargs, expected):
    config = DistillConfig(output_dir=str(tmp_path), use_cpu=True, teacher_model_init_kwargs=kwargs)
    assert config.teacher_options() == {"revision": None} | expected


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"device_map": "auto"}, "device_map='auto' .*leave it out"),
        ({"trust_remote_code": True}, "trust_remote_code=True .*leave it out"),
        ({"torch_dtype": "float32", "dtype": "bfloat16"}, "torch_dtype='float32' .*leave one of them out"),
        ({"revision": "v2"}, "revision='v2' .*leave one of them out"),
        ({"load_in_8bit": True}, "load_in_8bit=True .*`dtype`"),
        ("dtype=float32", "must be a JSON object"),
    ],
)
def test_other_ways_to_load_the_teacher_are_refused(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(
            output_dir=str(tmp_path), use_cpu=True, teacher_model_revision="v1", teacher_model_init_kwargs=kwargs
        )
