"""The page of the evidence, made of the JSON files beside it."""

import json
import shlex
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...evaluation.fidelity.plots import format_report
from ..ablations.tables import format_plan
from .figures import beyond_tables


PARTS = ("fidelity", "beyond", "referees")
TITLES = {
    "fidelity": "Fidelity",
    "beyond": "Beyond training",
    "referees": "What referees asked for",
}
INTRODUCTION = """# Evidence

What readers ask of a linear model, on the testbed: where it differs from its teacher inside, what becomes of it at
sizes it was not trained on, and what each part of the block is for. The student is the shipped one of 1.8 million
parameters, its questions are about handwritten digits: what holds here need not hold for a large model. `make
evidence` measures all of it and writes this page anew; `make evidence-quick` runs the same parts with hardly any
budget into `runs/`. Every section names the command that its figures come from.
"""
QUICK = "\n**Made with hardly any budget, to see that all parts run: the figures mean nothing.**\n"
TEXTS = {
    "fidelity": """\
Held-out rows with their answers, read by both. `error` is the squared error of a mixer's output relative to the
teacher's, fed with the teacher's input; `own path` the same on what the student itself has reached; `exact` the share
of the teacher's attention that falls where the student attends exactly, which leaves the rest to the state; `far` the
share of the far branch, Flex-MA, in the output; lambda its weight on text and on vision tokens. `KL` is that of the
teacher's next token to the student's, `same` how often both choose the same one.
""",
    "beyond": """\
Held-out digits. Sizes within the training's range are bold, and grey in the picture. `frames`: "7 or 3 first?" about a
clip; beyond 16 frames each one is shown as often as it takes, so that the question stays the same and the distances
grow. `pixels`: one cell of a mosaic. `turns`: one cell of an 8x8 mosaic, asked last in a conversation of so many
different questions, the others with their right answers. In brackets 95% intervals, then the share of the teacher's.
TTFT is the whole forward pass over one prompt, vision side included, in {clock} on {threads}, the shortest of
{repeats}; the cache is what is held after it; operations are those of matrix products.
""",
}
MISSING = 'Not run yet: there are no figures here. `make evidence ARGS="--parts {part}"` measures them.\n'


def build_page(page: Path, quick: bool = False) -> str:
    """Returns the page, whose figures and pictures are in the folder of its name beside it."""
    folder = page.parent / page.stem
    sections = [INTRODUCTION + (QUICK if quick else "")]
    for part in PARTS:
        file = folder / f"{part}.json"
        body = _section(part, json.loads(file.read_text()), folder) if file.exists() else MISSING.format(part=part)
        sections.append(f"## {TITLES[part]}\n\n{body}")
    return "\n".join(sections)


def _section(part: str, found: Mapping[str, Any], folder: Path) -> str:
    pictures = sorted(folder.glob(f"{part}*.png")) if part != "referees" else []
    shown = "".join(f"\n![{picture.stem}]({folder.name}/{picture.name})\n" for picture in pictures)
    return f"{BODIES[part](found['report'], folder)}{shown}\n{_source(found)}"


def _source(found: Mapping[str, Any]) -> str:
    facts, versions = found["machine"], found["report"]["versions"]
    where = f"{facts['cores']} cores ({facts['processor']}), {facts.get('gpu', 'no GPU')}"
    made_with = f"torch {versions['torch']}, transformers {versions['transformers']}"
    return f"Made on {where}, {made_with}, in {found['seconds']:.0f} s, by\n\n    {shlex.join(found['command'])}\n"


def _fidelity(report: Mapping[str, Any], folder: Path) -> str:
    return f"{TEXTS['fidelity']}\n```text\n{format_report(report)}\n```\n"


def _beyond(report: Mapping[str, Any], folder: Path) -> str:
    count = report["threads"]
    text = TEXTS["beyond"].format(
        clock="processor time" if report["clock"] == "process" else "wall time",
        threads="one thread" if count == 1 else f"{count} threads",
        repeats=report["repeats"],
    )
    text = textwrap.fill(f"{text}{report['questions']} questions at every size.", 119)
    return f"{text}\n\n{beyond_tables(report)}"


def _referees(report: Mapping[str, Any], folder: Path) -> str:
    seeds = len(report["seeds"])
    bars = f"± is one standard deviation over {seeds} seeds" if seeds > 1 else "one seed, so there are no error bars"
    picture = f"{folder.name}/ablations_referees.png"
    section = format_plan("referees", report["plans"]["referees"], report["tasks"], picture)
    body = section.partition("\n\n")[2]
    return f"Accuracy in percent on {report['test_rows']} held-out questions; {bars}.\n\n{body}"


BODIES = {"fidelity": _fidelity, "beyond": _beyond, "referees": _referees}
