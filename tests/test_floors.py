"""The floors of the package: every room imports only from the floors below it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "src" / "linmu_hf"

# Room -> the rooms it may import from, its own aside. A file outside every folder is a room of its own.
FLOORS = {"ops": set(), "files": set(), "data": {"files"}, "safetensors_io": {"files"}, "configuration": {"files"}}
FLOORS["quiet_import"] = set()
FLOORS["modeling"] = {"ops", "configuration"}
FLOORS["families"] = FLOORS["modeling"] | {"modeling", "files", "safetensors_io"}
FLOORS["__init__"] = FLOORS["families"] | {"families", "quiet_import"}
FLOORS["conversion"] = FLOORS["__init__"] | {"__init__", "data"}
FLOORS["distillation"] = FLOORS["evaluation"] = FLOORS["conversion"] | {"conversion"}
FLOORS["hub"] = FLOORS["distillation"] | {"distillation", "evaluation"}
FLOORS["commands"] = FLOORS["hub"] | {"hub"}
FLOORS["testbed"] = FLOORS["commands"] | {"commands"}

# What `pip install linmu-hf` brings, extras aside.
CORE = {"torch", "transformers", "safetensors", "huggingface_hub", "numpy", "PIL", "tqdm", "linmu_hf"}


def room(module: Path) -> str:
    parts = module.relative_to(PACKAGE).with_suffix("").parts
    if parts in (("modeling", "configuration_linmu"), ("modeling", "remote_code")):
        return "configuration"
    return parts[0]


def locate(name: str) -> Path | None:
    """The file of a module of ours, or None where `name` is not a module."""
    path = PACKAGE.joinpath(*name.split(".")[1:])
    candidates = (path.with_suffix(".py"), path / "__init__.py") if path != PACKAGE else (PACKAGE / "__init__.py",)
    return next((candidate for candidate in candidates if candidate.exists()), None)


def imported_names(module: Path, tree: ast.AST) -> set[str]:
    """Every dotted name a file imports, in functions too; `from a import b` counts as `a` and as `a.b`."""
    package = ["linmu_hf", *module.relative_to(PACKAGE).parts[:-1]]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            names |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return names


def broken_floors(module: Path) -> list[str]:
    here = room(module)
    broken = []
    for name in imported_names(module, ast.parse(module.read_text())):
        target = locate(name) if name.split(".")[0] == "linmu_hf" else None
        if target is None:
            continue
        there = room(target)
        if target.name == "__init__.py" and target.parent != PACKAGE:
            there = target.relative_to(PACKAGE).parts[0]
        if there != here and there not in FLOORS[here]:
            broken.append(f"{module.relative_to(PACKAGE)} ({here}) imports {name} ({there})")
    return broken


MODULES = sorted(PACKAGE.rglob("*.py"))


def is_kernel(module: Path) -> bool:
    """Whether a file needs Triton, which is not on every machine."""
    return room(module) == "ops" and ("triton" in module.stem or module.stem == "launch")


def identify(module: Path) -> str:
    return str(module.relative_to(PACKAGE))


@pytest.mark.parametrize("module", MODULES, ids=identify)
def test_imports_only_downward(module):
    assert room(module) in FLOORS, f"{module} is in no known room"
    assert not broken_floors(module)


@pytest.mark.parametrize(
    "module",
    [m for m in MODULES if room(m) in {"ops", "configuration", "modeling", "families", "data", "hub"}],
    ids=identify,
)
def test_lower_floors_import_core_dependencies_only(module):
    tree = ast.parse(module.read_text())
    tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = imported_names(module, tree)
    allowed = CORE | sys.stdlib_module_names
    if is_kernel(module):
        allowed |= {"triton"}
    else:
        kernels = [name for name in names if (file := locate(name)) and is_kernel(file)]
        assert not kernels, "kernels are imported where they are used, not above"
    assert {name.split(".")[0] for name in names} <= allowed


def test_operations_know_nothing_of_transformers():
    """And are therefore tested with one version of it alone: tools/matrix.py."""
    tests = Path(__file__).parent / "ops"
    assert not [
        file
        for folder in (PACKAGE / "ops", tests)
        for file in folder.rglob("*.py")
        if "transformers" in file.read_text()
    ]


def imported_files(module: Path) -> set[Path]:
    """The files of ours that a file imports, in functions too; of `from package import module` the module alone."""
    names = {n for n in imported_names(module, ast.parse(module.read_text())) if n.split(".")[0] == "linmu_hf"}
    longer = {name.rpartition(".")[0] for name in names if locate(name)}
    return {file for name in names - longer if (file := locate(name)) and file != module}


def test_files_import_each_other_in_no_circle():
    left = {module: imported_files(module) for module in MODULES}
    while free := [module for module, files in left.items() if not files & left.keys()]:
        for module in free:
            left.pop(module)
    assert not left, sorted(str(module.relative_to(PACKAGE)) for module in left)


def test_conversion_and_upload_need_no_extra():
    """Distillation needs the extra `train`: `linmu-convert` and `linmu-push` must not import it."""
    script = "import sys, linmu_hf.commands.convert, linmu_hf.commands.push\n"
    script += "assert 'linmu_hf.distillation' not in sys.modules\n"
    script += "assert not {'peft', 'datasets', 'matplotlib', 'trl'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)}, check=True)


def test_a_broken_floor_is_seen(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    for name in ("ops/ssd.py", "distillation/trainer.py", "evaluation/retention.py", "testbed/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "ops/ssd.py").write_text("def f():\n    from ..distillation import trainer\n")
    (tmp_path / "evaluation/retention.py").write_text(
        "import linmu_hf.distillation.trainer\nfrom ..testbed import x\n"
    )
    assert len(broken_floors(tmp_path / "ops/ssd.py")) == 1
    assert len(broken_floors(tmp_path / "evaluation/retention.py")) == 2
