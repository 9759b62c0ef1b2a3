"""The matrix of Transformers minors: what it tests is what setup.cfg declares, and a failure does not go unseen."""

import configparser
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement


ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("matrix_tool", ROOT / "tools" / "matrix.py")
matrix = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(matrix)


def declared(name: str) -> Requirement:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    requirements = map(Requirement, setup["options"]["install_requires"].split())
    return next(requirement for requirement in requirements if requirement.name == name)


def test_declared_range_is_the_tested_one():
    range_ = declared("transformers").specifier
    first, last = (tuple(map(int, minor.split("."))) for minor in (matrix.MINORS[0], matrix.MINORS[-1]))
    assert list(matrix.MINORS) == [f"{first[0]}.{minor}" for minor in range(first[1], last[1] + 1)]
    assert str(range_) == f"<{last[0]}.{last[1] + 1},>={first[0]}.{first[1]}"


def test_make_installs_the_newest_minor():
    assert f"transformers=={matrix.MINORS[-1]}." in (ROOT / "constraints.txt").read_text()


def test_the_oldest_minor_runs_with_the_lowest_versions():
    pins = matrix.constraints(matrix.MINORS[0])
    assert f"transformers=={matrix.MINORS[0]}.*" in pins
    floor = next(iter(declared("huggingface-hub").specifier)).version
    assert f"huggingface-hub=={floor}" in pins
    assert [pin for pin in pins if pin.startswith("torch==")] == [
        line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith("torch==")
    ]
    assert not any(pin.startswith("huggingface") for pin in matrix.constraints(matrix.MINORS[-1]))


def test_the_newest_release_is_not_held_back():
    names = {pin.split("==")[0] for pin in matrix.constraints(matrix.NEWEST)}
    assert names == {"torch", "torchvision", *matrix.TEST_TOOLS}
    assert {"transformers", "accelerate"} <= {
        *map(matrix.name_of, matrix.core_requirements() + matrix.extra_requirements())
    }


@pytest.mark.parametrize("training", [False, True])
def test_what_is_installed(training, tmp_path, monkeypatch):
    """Distillation's tests have an environment of their own, so that the core install stays one."""
    commands = []

    def run(command, check):
        commands.append([str(part) for part in command])
        if command[1:3] == ["-m", "venv"]:
            Path(command[3]).mkdir()

    monkeypatch.setattr(matrix.subprocess, "run", run)
    for minor, expected in {
        "5.24": ["a.whl[train,video]" if training else "a.whl"],
        "newest": ["transformers"],
    }.items():
        commands.clear()
        python = matrix.prepare(minor, Path("a.whl"), tmp_path, training)
        assert python.parents[1].name == f"transformers-{minor}" + "-training" * training
        install = next(command for command in commands if "-c" in command)
        assert set(expected) <= set(install)
        assert ("peft" in install) == (training and minor == "newest")
        assert commands[-1][-1] == "a.whl" and "--no-deps" in commands[-1]
        assert any("torchvision_cpu_shim" in part for command in commands for part in command) == training


def test_environments_can_be_built_alone(tmp_path, monkeypatch):
    prepared = []
    monkeypatch.setattr(matrix, "build_wheel", lambda folder: Path("a.whl"))
    monkeypatch.setattr(matrix, "prepare", lambda minor, wheel, folder, training: prepared.append((minor, training)))
    assert matrix.main(["oldest", "--install-only", "--environments", str(tmp_path)]) == 0
    assert prepared == [("5.17", False), ("5.17", True)]


def test_unknown_minor_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        matrix.main(["4.57"])
    assert error.value.code == 2
    assert "['4.57'] are not supported; choose some of 5.17" in capsys.readouterr().err


@pytest.mark.parametrize(
    "body, expected",
    [
        ("def test_a(): pass\n", {"passed": 1, "failed": 0, "skipped": 0}),
        ("def test_a(): pass\ndef test_b(): assert 0\n", {"passed": 1, "failed": 1, "skipped": 0}),
        ("import pytest\n@pytest.mark.skip\ndef test_a(): pass\n", {"passed": 0, "failed": 0, "skipped": 1}),
        ("import a_module_that_is_not_there\n", {"passed": 0, "failed": 1, "skipped": 0}),
    ],
    ids=["passes", "fails", "skips", "does not import"],
)
def test_results_are_counted(body, expected, tmp_path):
    (tmp_path / "test_it.py").write_text(body)
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "-p", "no:cacheprovider", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert matrix.count(report) == expected


def test_a_run_without_a_report_counts_as_failed(tmp_path):
    assert matrix.count(tmp_path / "report.xml")["failed"] == 1


@pytest.mark.parametrize("broken", ["5.18", None])
def test_every_row_is_kept_and_a_failure_gives_a_failing_exit(broken, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(matrix, "build_wheel", lambda folder: folder / "a.whl")
    row = {"versions": {}, "core": "passed", "passed": 3, "failed": 0, "skipped": 0, "seconds": 1.0}
    monkeypatch.setattr(matrix, "run_minor", lambda minor, *_: {**row, "minor": minor, "ok": minor != broken})
    paths = ["--output", str(tmp_path / "matrix.json"), "--environments", str(tmp_path / "venvs")]
    assert matrix.main(["oldest", "5.18", "5.19", *paths]) == (1 if broken else 0)
    rows = json.loads((tmp_path / "matrix.json").read_text())["minors"]
    assert [row["minor"] for row in rows] == ["5.17", "5.18", "5.19"]
    printed = capsys.readouterr().out
    assert all(f"\n{minor} " in printed for minor in ("5.17", "5.18", "5.19"))


def test_the_wheel_is_complete_or_refused(tmp_path, monkeypatch):
    wheel = matrix.build_wheel(tmp_path)
    assert not matrix.missing_files(ROOT / "src", wheel)
    monkeypatch.setattr(matrix, "ROOT", tmp_path / "tree")
    (tmp_path / "tree" / "src" / "linmu_hf").mkdir(parents=True)
    for name in matrix.PACKAGED[1:]:
        (tmp_path / "tree" / name).write_text((ROOT / name).read_text().replace("linmu_hf.__version__", "linmu_hf.v"))
    (tmp_path / "tree" / "src" / "linmu_hf" / "__init__.py").write_text('v = "1.0"\n')
    (tmp_path / "tree" / "src" / "linmu_hf" / "forgotten.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"the wheel lacks \['linmu_hf/forgotten.json'\]"):
        matrix.build_wheel(tmp_path / "second")
