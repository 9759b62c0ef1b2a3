"""Lists of stages in files: the shipped recipes, a user's own, and single values set on top."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from ..stages import ALL, TRAINS, Stage


RECIPES = ("paper", "default", "quick")
DEFAULT_RECIPE = "paper"

NUMBER = "a number, such as 0.5 or 5e-4"
KINDS = {
    "name": ("a text, such as stage-1", (str,)),
    "trains": ("a list of texts, such as [flex, swin]", (list, tuple)),
    "max_steps": ("a whole number, such as 1000", (int,)),
    "lora_r": ("a whole number, such as 8", (int,)),
    "learning_rates": ("a mapping of numbers, such as {flex: 0.5}", (Mapping,)),
    "muon": ("true or false", (bool,)),
    "hidden_input": ("student or teacher", (str,)),
    **dict.fromkeys(
        ("learning_rate", "hid", "tok", "seq", "sup", "lora_alpha", "beta", "lmbda", "sampling_temperature"),
        (NUMBER, (int, float)),
    ),
}
REQUIRED = [field.name for field in fields(Stage) if field.default is field.default_factory is MISSING]


def recipe_file(name: str) -> Path:
    """Returns the file of a shipped recipe, one of `RECIPES`."""
    if name not in RECIPES:
        raise ValueError(f"recipe={name!r} is none of {', '.join(RECIPES)}: name one of them, or a file as `stages`")
    return Path(__file__).parent / f"{name}.yaml"


def read_stages(
    source: str | Path | Sequence[Stage | Mapping[str, Any]], overrides: Sequence[str] = ()
) -> tuple[Stage, ...]:
    """
    Reads a list of stages and checks it.

    Args:
        source (`str`, `Path`, or `Sequence[Stage | Mapping]`):
            A file, YAML or JSON: a list of mappings whose keys are the fields of [`Stage`]. Or the list itself.
        overrides (`Sequence[str]`, *optional*):
            `STAGE.KEY=VALUE`, the value in YAML, set on top; `all` names every stage.

    Returns:
        `tuple[Stage, ...]`: those with more than 0 steps.

    Raises:
        `ValueError`: a key, value or name that cannot be, with the file, the stage and what to write.
    """
    entries, said = _entries(source)
    values = [dict(entry) for entry in entries]
    names = [str(stage["name"]) for stage in values]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ValueError(f"{said}: two stages are named {double!r}, and each names a folder: rename one of them")
    where = dict.fromkeys(names, said)
    for text in overrides:
        name, key, value = _override(text, said, names)
        for stage in values:
            if name in (stage["name"], ALL):
                stage[key] = value
                where[stage["name"]] = f"stage_overrides {text!r}"
    stages = []
    for stage in values:
        try:
            _check_types(stage)
            if stage["max_steps"] != 0:
                stages.append(Stage(**stage))
        except ValueError as error:
            text = str(error)
            text = text if text.startswith(f"{stage['name']}: ") else f"{stage['name']}: {text}"
            raise ValueError(f"{where[str(stage['name'])]}: {text}") from None
    if not stages:
        raise ValueError(f"{said} leaves nothing to do: it needs a stage with max_steps above 0")
    return tuple(stages)


def stage_values(stage: Stage) -> dict[str, Any]:
    """Returns a stage as it is written in a file: what is not a default, and names in place of expressions."""
    names = {pattern: name for name, pattern in TRAINS.items()}
    values: dict[str, Any] = {}
    for field in fields(stage):
        value = getattr(stage, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if value != default:
            values[field.name] = value
    values["trains"] = [names.get(pattern, pattern) for pattern in stage.trains]
    if stage.learning_rates:
        values["learning_rates"] = {names.get(key, key): rate for key, rate in stage.learning_rates.items()}
    return values


def format_stages(stages: Sequence[Stage]) -> str:
    """Returns stages as YAML that [`read_stages`] reads back to the same."""
    entries = [yaml.safe_dump([stage_values(stage)], sort_keys=False, default_flow_style=None) for stage in stages]
    return "\n".join(entries)


def _entries(source) -> tuple[list[Mapping[str, Any]], str]:
    """The stages as mappings with a name each, and what to call their source."""
    if isinstance(source, (str, Path)):
        file = Path(source).expanduser()
        content, said = _read_file(file), str(file)
    else:
        content, said = list(source), "stages"
    if not isinstance(content, list) or not content:
        raise ValueError(f"{said} holds no list of stages; linmu-distill --print_stages shows one")
    entries = [stage_values(entry) if isinstance(entry, Stage) else entry for entry in content]
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            raise ValueError(f"{said}: stage {number} of {len(entries)} has no name: write `name: stage-{number}`")
    return entries, said


def _read_file(file: Path) -> Any:
    try:
        text = file.read_text()
        return json.loads(text) if file.suffix == ".json" else yaml.load(text, _Loader)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"the stages in {file} cannot be read: {error}") from error


class _Loader(yaml.SafeLoader):
    """Reads 5e-4 as a number, as YAML 1.2 and JSON have it, and refuses a key that comes twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value]
        for (key, _), name in zip(node.value, keys):
            if keys.count(name) > 1:
                text = f"{name!r} comes twice: leave one of them out"
                raise yaml.constructor.ConstructorError(None, None, text, key.start_mark)
        return super().construct_mapping(node, deep)


_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def _override(text: str, said: str, names: list[str]) -> tuple[str, str, Any]:
    place, equals, value = text.partition("=")
    name, dot, key = place.partition(".")
    if not (name and dot and key and equals):
        raise ValueError(f"stage_overrides {text!r} is not STAGE.KEY=VALUE, such as stage-1.max_steps=100")
    if name not in (*names, ALL):
        raise ValueError(f"stage_overrides {text!r}: {said} has no stage {name!r}, but {', '.join(names)}; or {ALL}")
    if key == "name":
        raise ValueError(f"stage_overrides {text!r}: a name is changed in a file of stages, see --print_stages")
    try:
        return name, key, yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"stage_overrides {text!r}: the value is no YAML: {error}") from error


def _check_types(stage: Mapping[str, Any]) -> None:
    for key, value in stage.items():
        if key not in KINDS:
            near = difflib.get_close_matches(str(key), KINDS, n=1)
            remedy = f"write {near[0]}" if near else f"the keys are {', '.join(KINDS)}"
            raise ValueError(f"unknown key {key!r}: {remedy}")
        kind, types = KINDS[key]
        fits = _is(value, types) or (key == "lora_alpha" and value is None)
        if fits and key == "trains":
            fits = all(_is(each, (str,)) for each in value)
        if fits and key == "learning_rates":
            fits = all(_is(each, (int, float)) for each in value.values())
        if not fits:
            raise ValueError(f"{key}={value!r} must be {kind}")
    for key in REQUIRED:
        if key not in stage:
            raise ValueError(f"{key} is missing: write `{key}:` with {KINDS[key][0]}")


def _is(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, types) and (isinstance(value, bool) == (types == (bool,)))
