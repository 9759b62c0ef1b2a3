"""Writes `docs/conformance.md` from the outcome of a run."""

import importlib
import platform
from collections import defaultdict

import torch
import transformers


LIMIT = 0.45  # of the collected tests may be skipped


def outcomes(stats) -> dict[str, tuple[str, str]]:
    """
    Outcome (`"passed"`, `"skipped"`, `"failed"`) and reason of every test. A test of which a part failed counts as
    failed, and else one of which a part was skipped as skipped.
    """
    found: dict[str, tuple[str, str]] = {}
    ranks = ("passed", "skipped", "failed")
    for reports in stats.values():
        for report in reports:
            if getattr(report, "when", None) is None or (report.passed and report.when != "call"):
                continue
            reason = str(report.longrepr[2]).removeprefix("Skipped: ") if report.skipped else ""
            known = found.get(report.nodeid, ("passed", ""))
            found[report.nodeid] = max(known, (report.outcome, reason), key=lambda one: ranks.index(one[0]))
    return found


def counts(found) -> dict[str, int]:
    """Number of tests by outcome."""
    return {name: sum(outcome == name for outcome, _ in found.values()) for name in ("passed", "failed", "skipped")}


def write(path, found):
    """Writes the report of a whole run to `path`."""
    number = counts(found)
    share = 100 * number["skipped"] / len(found)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    lines = [
        "# Conformance with Transformers",
        "",
        "Written by `make conformance`, which runs Transformers' own test mixins on LinMU's classes; do not edit.",
        "",
        f"Transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, Python "
        f"{platform.python_version().rpartition('.')[0]}, {device}.",
        "",
        "| collected | passed | failed | skipped |",
        "|---|---|---|---|",
        f"| {len(found)} | {number['passed']} | {number['failed']} | {number['skipped']} ({share:.0f}%) |",
        "",
        "A test of which a part was skipped counts as skipped. The mixins come from the source distribution of the",
        "installed version. It carries the files `tests/test_*.py` and none of the folders beside them. What these",
        "folders hold is therefore not run:",
        "",
        "- `tests/generation` (`GenerationTesterMixin`). `conformance/test_generation.py` stands in for it, beside",
        "  `tests/modeling/test_generation.py`.",
        "- `tests/exporters` (`ExportTesterMixin`).",
        "- `tests/pipelines` and the tiny checkpoints on the Hub that `PipelineTesterMixin` needs.",
        "- the helpers that start the processes of `TensorParallelTesterMixin`, `FSDPTesterMixin` and",
        "  `ExpertParallelTesterMixin`. The decoder has no tensor-parallel plan and no experts.",
        "",
        "## By class",
        "",
        "| class | what it is | passed | failed | skipped |",
        "|---|---|---|---|---|",
    ]
    groups = defaultdict(dict)
    for nodeid, result in found.items():
        groups[_class(nodeid)][nodeid] = result
    for group, tests in sorted(groups.items()):
        number = counts(tests)
        lines.append(
            f"| `{group}` | {_purpose(group)} | {number['passed']} | {number['failed']} | {number['skipped']} |"
        )
    failed = sorted(nodeid for nodeid, (outcome, _) in found.items() if outcome == "failed")
    if failed:
        lines += ["", "## Failed", "", *(f"- `{nodeid}`" for nodeid in failed)]
    lines += ["", "## Skipped", "", "| test | of | reason |", "|---|---|---|"]
    skipped = defaultdict(list)
    for nodeid, (outcome, reason) in found.items():
        if outcome == "skipped":
            skipped[nodeid.rpartition("::")[2], reason.replace("|", "\\|")].append(_class(nodeid).removeprefix("Test"))
    for (test, reason), classes in sorted(skipped.items()):
        lines.append(f"| `{test}` | {', '.join(sorted(classes))} | {reason} |")
    path.write_text("\n".join(lines) + "\n")


def _class(nodeid: str) -> str:
    """The class of a test, or the file of a plain function."""
    parts = nodeid.split("::")
    return parts[1] if len(parts) > 2 else parts[0].rpartition("/")[2]


def _purpose(group: str) -> str:
    """What the tests of a class are about, from its docstring."""
    if group.endswith(".py"):
        return (importlib.import_module(group.removesuffix(".py")).__doc__ or "").strip().rstrip(".")
    return (getattr(importlib.import_module("test_models"), group).__doc__ or "").strip().rstrip(".")
