"""Stages in files: what is read, and what is refused with the file, the stage, the key and the remedy."""

import json

import pytest

from linmu_hf.distillation.recipes import RECIPES, format_stages, read_stages, recipe_file
from linmu_hf.distillation.stages import FLEX, SWIN, Stage


pytestmark = pytest.mark.core_training

GOOD = """
- name: one
  trains: [flex, swin]
  max_steps: 10
  learning_rate: 5e-4
  hid: 1
  learning_rates: {swin: 0.5}
"""


@pytest.fixture
def file(tmp_path):
    def write(text, name="stages.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_yaml_and_json_are_the_same(file):
    expected = Stage("one", (FLEX, SWIN), 10, 5e-4, hid=1.0, learning_rates={SWIN: 0.5})
    assert read_stages(file(GOOD)) == (expected,)
    values = {"name": "one", "trains": ["flex", "swin"], "max_steps": 10, "learning_rate": 5e-4, "hid": 1}
    text = json.dumps([{**values, "learning_rates": {"swin": 0.5}}], indent="\t")
    assert read_stages(file(text, "stages.json")) == (expected,)
    assert read_stages([expected]) == (expected,)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_being_written(file, name):
    stages = read_stages(recipe_file(name))
    assert read_stages(file(format_stages(stages))) == stages


def test_measured_recipes_start_fed_by_the_teacher():
    for name in ("default", "quick"):
        assert read_stages(recipe_file(name))[0].hidden_input == "teacher"
    paper, default = (sum(s.max_steps for s in read_stages(recipe_file(name))) for name in ("paper", "default"))
    assert paper == default == 50_000


def test_overrides(file):
    def read(*overrides):
        return read_stages(file(GOOD + GOOD.replace("one", "two")), overrides)

    one, two = read("two.max_steps=3", "all.learning_rate=1e-4", "one.trains=[flex]", "one.learning_rates={}")
    assert (one.max_steps, two.max_steps) == (10, 3)
    assert (one.learning_rate, two.learning_rate) == (1e-4, 1e-4)
    assert one.trains == (FLEX,) and two.trains == (FLEX, SWIN)
    assert [stage.name for stage in read("one.max_steps=0")] == ["two"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_steps", "max_step", "one: unknown key 'max_step': write max_steps"),
        ("hid: 1", "loss: 1", "one: unknown key 'loss': the keys are name, trains"),
        ("  max_steps: 10\n", "", "one: max_steps is missing: write `max_steps:` with a whole number"),
        ("max_steps: 10", "max_steps: 1.5", "one: max_steps=1.5 must be a whole number, such as 1000"),
        ("max_steps: 10", "max_steps: true", "one: max_steps=True must be a whole number"),
        ("5e-4", "fast", "one: learning_rate='fast' must be a number, such as"),
        ("5e-4", "-1", "one: learning_rate=-1 must be positive"),
        ("[flex, swin]", "flex", "one: trains='flex' must be a list of texts, such as [flex, swin]"),
        ("[flex, swin]", "['(']", "one: '(' is no regular expression"),
        ("{swin: 0.5}", "{swin: x}", "one: learning_rates={'swin': 'x'} must be a mapping of numbers"),
        ("hid: 1", "hid: .nan", "must not be negative"),
        ("hid: 1", "hid: 1\n  hid: 2", "'hid' comes twice"),
        ("hid: 1", "hid: 1\n  lora_alpha: 8", "one: lora_alpha=8 has no effect, but lora_r is 0"),
        ("swin]", "lora]", "one: trains lora, but lora_r is 0: set the rank of the adapters, or leave lora out"),
        ("name: one", "name: ../one", "one: stage name '../one' names a folder"),
        ("name: one", "name: pseudo_targets", "names a folder: use letters"),
        ("  trains", "  tr: [ains", "cannot be read"),
        ("- name: one", "- nome: one", "stage 1 of 1 has no name: write `name: stage-1`"),
        (GOOD, GOOD + GOOD, "two stages are named 'one', and each names a folder: rename one of them"),
        (GOOD, "", "holds no list of stages; linmu-distill --print_stages shows one"),
    ],
)
def test_refusals_name_the_file_the_stage_and_the_remedy(file, old, new, message):
    path = file(GOOD.replace(old, new))
    with pytest.raises(ValueError) as error:
        read_stages(path)
    assert str(path) in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("one.max_steps", "is not STAGE.KEY=VALUE, such as stage-1.max_steps=100"),
        ("max_steps=3", "is not STAGE.KEY=VALUE"),
        ("two.max_steps=3", "has no stage 'two', but one; or all"),
        ("one.name=two", "a name is changed in a file"),
        ("one.steps=3", "one: unknown key 'steps'"),
        ("one.max_steps=", "one: max_steps=None must be a whole number"),
        ("one.trains=[", "the value is no YAML"),
    ],
)
def test_overrides_that_cannot_be(file, override, message):
    with pytest.raises(ValueError) as error:
        read_stages(file(GOOD), [override])
    assert f"stage_overrides {override!r}" in str(error.value) and message in str(error.value)
