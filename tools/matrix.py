"""
Runs the core tests with every supported minor of Transformers, each in a virtual environment of its own that holds the
core install and pytest, no extras: `make test-matrix`, or `make test-matrix MINORS="5.17 5.24"`.

The wheel is built once, from a copy of the sources, and installed as a user would. The oldest minor runs with the
lowest version of every dependency that setup.cfg allows, torch aside; the others with what pip chooses; `newest` takes
the newest release of Transformers, supported or not. Distillation's core tests run in a second environment, which has
the extras `train` and `video`. Environments stay in `.venvs/` for the next run. What happened is in
`runs/matrix.json`, brought up to date after every minor.
"""

import argparse
import configparser
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path


# The one list of the supported minors, without gaps; setup.cfg declares the same range, which a test compares.
MINORS = ("5.17", "5.18", "5.19", "5.20", "5.21", "5.22", "5.23", "5.24")

NEWEST = "newest"  # whatever is released, past the range too

ROOT = Path(__file__).parents[1]
TESTS = ("tests/modeling", "tests/families")  # tests/ops has nothing of Transformers, which a test looks after
TEST_TOOLS = ("pytest", "pytest-xdist", "hypothesis")
TRAINING_TESTS = ("tests/distillation", "tests/data")
TRAINING_EXTRAS = ("train", "video")
PACKAGED = ("src", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def core_requirements() -> list[str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup["options"]["install_requires"].split()


def name_of(requirement: str) -> str:
    return re.split("[>=<]", requirement)[0]


def extra_requirements() -> list[str]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return [one for extra in TRAINING_EXTRAS for one in setup["options.extras_require"][extra].split()]


def constraints(minor: str) -> list[str]:
    """
    torch, the test tools and the extras as in `.venv`; with the oldest minor the lowest versions that setup.cfg
    allows; with the newest release none but torch and the test tools.
    """
    pins = (ROOT / "constraints.txt").read_text().split("\n")
    kept = ("torch", *TEST_TOOLS, *(() if minor == NEWEST else map(name_of, extra_requirements())))
    pins = [pin for pin in pins if pin.split("==")[0] in (*kept, "torchvision")]
    if minor == NEWEST:
        return pins
    if minor == MINORS[0]:
        floors = [re.match(r"([\w-]+)>=([\w.]+)", requirement).groups() for requirement in core_requirements()]
        pins += [f"{name}=={version}" for name, version in floors if name not in ("torch", "transformers")]
    return [*pins, f"transformers=={minor}.*"]


def build_wheel(folder: Path) -> Path:
    """
    The wheel of the working tree, complete: a copy is built, because a `build/` left in the tree would leak into it.

    Raises:
        `SystemExit`: A file of the package is missing in the wheel.
    """
    copy = folder / "linmu-hf"
    for name in PACKAGED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--wheel-dir", str(folder), str(copy)]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    missing = missing_files(copy / "src", wheel)
    if missing:
        raise SystemExit(f"the wheel lacks {missing}; name them in [options.package_data] of setup.cfg")
    return wheel


def missing_files(source: Path, wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    return sorted(file for file in files - packed if "__pycache__" not in file and ".egg-info" not in file)


def prepare(minor: str, wheel: Path, folder: Path, training: bool = False) -> Path:
    """
    The Python of the environment of a minor, with the wheel of today; built anew if the requirements changed, and
    always for the newest release.
    """
    environment = folder / f"transformers-{minor}{'-training' if training else ''}"
    python, ready = environment / "bin" / "python", environment / ".ready"
    pins = "\n".join(constraints(minor)) + "\n"
    wanted = hashlib.sha256(
        "\n".join([pins, *core_requirements(), *extra_requirements(), sys.version]).encode()
    ).hexdigest()
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    packages = [f"{wheel}[{','.join(TRAINING_EXTRAS)}]" if training else str(wheel), *TEST_TOOLS]
    if minor == NEWEST:  # without the wheel's own requirements, which end with the range
        packages = [*map(name_of, core_requirements() + extra_requirements() * training), *TEST_TOOLS]
    if minor == NEWEST or not ready.exists() or ready.read_text() != wanted:
        shutil.rmtree(environment, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        (environment / "constraints.txt").write_text(pins)
        subprocess.run([*pip, "-c", str(environment / "constraints.txt"), *packages], check=True)
        if training:
            subprocess.run([str(python), str(ROOT / "tools" / "torchvision_cpu_shim.py")], check=True)
        ready.write_text(wanted)
    subprocess.run([*pip, "--no-deps", "--force-reinstall", str(wheel)], check=True)
    return python


def versions(python: Path) -> dict[str, str]:
    names = [name_of(requirement) for requirement in core_requirements()]
    code = (
        f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {names}}}))"
    )
    return json.loads(subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout)


def count(report: Path) -> dict[str, int]:
    """Passed, failed and skipped of a JUnit report; a run that ended before writing one counts as one failure."""
    try:
        suites = ElementTree.parse(report).getroot().iter("testsuite")
    except (FileNotFoundError, ElementTree.ParseError):
        return {"passed": 0, "failed": 1, "skipped": 0}
    totals = [[int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")] for suite in suites]
    tests, failures, errors, skipped = (sum(column) for column in zip(*totals))
    return {"passed": tests - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}


def run_minor(minor: str, wheel: Path, folder: Path, pytest_args: list[str]) -> dict:
    """Installs, checks the core install, runs the tests; what came of it as a row of the table."""
    began = time.monotonic()
    row = {"minor": minor, "versions": {}, "core": "failed", "passed": 0, "failed": 0, "skipped": 0, "ok": False}
    try:
        python, training_python = (prepare(minor, wheel, folder, training) for training in (False, True))
    except subprocess.CalledProcessError as error:
        return {**row, "core": "not installed", "error": str(error), "seconds": round(time.monotonic() - began, 1)}
    row["versions"] = versions(python)
    cells = folder / f"transformers-{minor}" / "parity.json"
    settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    settings["LINMU_PARITY_JSON"] = str(cells)  # the table of tests/modeling/test_parity.py
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | settings
    row["install_seconds"] = round(time.monotonic() - began, 1)
    check = subprocess.run([str(python), str(ROOT / "tools" / "check_core.py")], env=environment, cwd=folder)
    row["core"] = "passed" if check.returncode == 0 else "failed"
    report = folder / f"transformers-{minor}" / "report.xml"
    training_report = report.with_name("training.xml")
    for file in (report, training_report, cells):
        file.unlink(missing_ok=True)
    options = ["-q", "-p", "no:cacheprovider", *pytest_args]
    core = ["-m", "pytest", *TESTS, "-m", "not extras", f"--junitxml={report}", *options]
    tests = subprocess.run([str(python), *core], env=environment, cwd=ROOT)
    core = ["-m", "pytest", *TRAINING_TESTS, "-m", "core_training", f"--junitxml={training_report}", *options]
    training = subprocess.run([str(training_python), *core], env=environment, cwd=ROOT)
    counts = [count(one) for one in (report, training_report)]
    row |= {key: sum(one[key] for one in counts) for key in counts[0]}
    if cells.exists():
        row["parity"] = {key: value for key, value in json.loads(cells.read_text()).items() if key != "results"}
    row["ok"] = check.returncode == tests.returncode == training.returncode == 0
    row["seconds"] = round(time.monotonic() - began, 1)
    return row


def table(rows: list[dict]) -> str:
    lines = [f"{'minor':8}{'version':10}{'hub':10}{'core':15}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}"]
    for row in rows:
        known = row["versions"]
        lines.append(
            f"{row['minor']:8}{known.get('transformers', '-'):10}{known.get('huggingface-hub', '-'):10}"
            f"{row['core']:15}{row['passed']:8}{row['failed']:8}{row['skipped']:9}{row['seconds']:9.1f}"
        )
    return "\n".join(lines)


def write(rows: list[dict], wanted: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    content = {"wanted": wanted, "python": sys.version.split()[0], "minors": rows}
    beside.write_text(json.dumps(content, indent=2) + "\n")
    beside.replace(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minors", nargs="*", help=f"some of {', '.join(MINORS)}; `oldest`, or `newest` released")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "matrix.json")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venvs")
    parser.add_argument("--pytest-args", default="", help="further arguments for pytest, in one string")
    parser.add_argument("--install-only", action="store_true", help="build the environments, test nothing yet")
    args = parser.parse_args(argv)
    wanted = args.minors or list(MINORS)
    wanted = [MINORS[0] if minor == "oldest" else minor for minor in wanted]
    unknown = [minor for minor in wanted if minor not in (*MINORS, NEWEST)]
    if unknown:
        parser.error(f"minors {unknown} are not supported; choose some of {', '.join(MINORS)}")
    folder = args.environments.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as temporary:
        wheel = build_wheel(Path(temporary))
        for index, minor in enumerate(wanted, 1):
            if args.install_only:
                for training in (False, True):
                    prepare(minor, wheel, folder, training)
                continue
            print(f"\n== Transformers {minor} ({index} of {len(wanted)})", flush=True)
            rows.append(run_minor(minor, wheel, folder, args.pytest_args.split()))
            write(rows, wanted, args.output)
    if args.install_only:
        return 0
    print("\n" + table(rows), flush=True)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
