"""README and docs against the tree and the commands that they describe."""

import importlib
import re
import shlex
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "linmu_hf"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {"linmu-eval": "evaluate", "linmu-pseudo-targets": "pseudo_targets"}
TESTBED = {"linmu-ablate": "ablate"}


def test_every_folder_is_described():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([a-z0-9_/]+)`", text))
    for folder in {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}:
        name = folder.relative_to(PACKAGE).as_posix()
        described = name in named or any(other.startswith(f"{name}/") for other in named)
        assert described or name == "testbed/student", f"docs/architecture.md does not say what {name} holds"
    rows = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    for name in re.findall(r"`([^` ]+)`", " ".join(rows)):
        assert (PACKAGE / name).is_dir() or (ROOT / name).is_dir() or name.startswith("src/"), f"there is no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


def commands():
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("linmu-"):
                    yield line


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_commands_have_these_flags(line, capsys):
    name, *words = shlex.split(line, comments=True)
    module = f"testbed.{TESTBED[name]}" if name in TESTBED else f"commands.{COMMANDS.get(name, name[6:])}"
    command = importlib.import_module(f"linmu_hf.{module}")
    with pytest.raises(SystemExit):
        command.main(["--help"])
    known = set(re.findall(r"--[a-z0-9_]+", capsys.readouterr().out))
    assert {word for word in words if word.startswith("--")} <= known
