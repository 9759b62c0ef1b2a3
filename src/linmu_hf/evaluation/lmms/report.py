"""Benchmarks of students beside their teacher: what is kept, and what is kept above chance."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..retention import BOOTSTRAP_SAMPLES
from .tasks import Benchmark


def compare_benchmarks(
    results: Mapping[str, Mapping[str, Mapping[str, Any]]], benchmarks: Sequence[Benchmark], teacher: str | None
) -> dict[str, Any]:
    """
    Compares models on the same questions.

    Args:
        results (`Mapping`): Model -> task -> what [`run_model`] returns.
        benchmarks (`Sequence[Benchmark]`): The rows of the table.
        teacher (`str`, *optional*): Which of the models is the teacher.

    Returns:
        `dict`: `tasks`, for each task `metric`, `questions`, `chance` and by model `score`, `ttft`,
        `tokens_per_second` and, of students, `retention` (score / teacher's) and `above_chance`, (score - chance) /
        (teacher's - chance), each with the 95% `interval` of a bootstrap over questions, the same for both models; and
        `mean`, by student the means of both over the tasks.

    Raises:
        `ValueError`: Models have answered other questions.
    """
    tasks: dict[str, Any] = {}
    for one in benchmarks:
        found = {name: by_task[one.task] for name, by_task in results.items()}
        ids = {name: [sample["id"] for sample in result["samples"]] for name, result in found.items()}
        if len({tuple(each) for each in ids.values()}) > 1:
            raise ValueError(f"the models have answered other questions of {one.task}: run them with the same --limit")
        first = next(iter(found.values()))
        guess = float(np.mean([sample["chance"] for sample in first["samples"]])) if first["samples"] else 0.0
        models = {
            name: {k: result[k] for k in ("score", "ttft", "tokens_per_second")} for name, result in found.items()
        }
        for name in models:
            if teacher is not None and name != teacher:
                models[name] |= _kept(found[name], found[teacher], guess)
        entry = {"title": one.title, "metric": first["metric"], "questions": len(first["samples"]), "chance": guess}
        tasks[one.task] = {**entry, "models": models}
    students = [name for name in results if teacher is not None and name != teacher]
    mean = {
        name: {
            key: _mean([entry["models"][name][key]["value"] for entry in tasks.values()])
            for key in ("retention", "above_chance")
        }
        for name in students
    }
    return {"tasks": tasks, "mean": mean}


def _kept(student: Mapping[str, Any], teacher: Mapping[str, Any], guess: float) -> dict[str, Any]:
    scores = [
        np.array([sample["score"] for sample in result["samples"]], dtype=float) for result in (student, teacher)
    ]
    chances = np.array([sample["chance"] for sample in student["samples"]])
    draws = None
    if len(chances) and not any(np.isnan(each).any() for each in scores):
        picked = np.random.default_rng(0).integers(0, len(chances), (BOOTSTRAP_SAMPLES, len(chances)))
        draws = [each[picked].mean(1) for each in (*scores, chances)]
    return {
        "retention": _ratio(student["score"], teacher["score"], draws and draws[:2]),
        "above_chance": _ratio(
            student["score"] - guess,
            teacher["score"] - guess,
            draws and [draws[0] - draws[2], draws[1] - draws[2]],
        ),
    }


def _ratio(student: float, teacher: float, draws: Sequence[np.ndarray] | None) -> dict[str, Any]:
    if teacher <= 0:
        return {"value": None, "interval": None}
    interval = None
    if draws is not None and (defined := draws[1] > 0).any():
        interval = np.quantile(draws[0][defined] / draws[1][defined], [0.025, 0.975]).tolist()
    return {"value": student / teacher, "interval": interval}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def format_benchmarks(report: Mapping[str, Any]) -> str:
    """Returns a line for each task and model, in percent, in the form of the paper's Tables 1 and 5."""
    head = ["task", "questions", "model", "score", "retention", "above chance", "TTFT", "tokens/s"]
    rows = [head]
    for entry in report["tasks"].values():
        for name, model in entry["models"].items():
            kept = (_percent(model.get("retention")), _percent(model.get("above_chance")))
            ttft, speed = model["ttft"], model["tokens_per_second"]
            speeds = ("-" if ttft is None else f"{1000 * ttft:.0f} ms", "-" if speed is None else f"{speed:.1f}")
            score = f"{100 * model['score']:.1f}"
            rows.append([entry["title"], str(entry["questions"]), name, score, *kept, *speeds])
    for name, kept in report["mean"].items():
        rows.append(["mean", "", name, "", *(_share(kept[key]) for key in ("retention", "above_chance")), "", ""])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _percent(kept: Mapping[str, Any] | None) -> str:
    if kept is None:
        return ""
    if kept["interval"] is None:
        return _share(kept["value"])
    low, high = kept["interval"]
    return f"{_share(kept['value'])} [{100 * low:.1f}, {100 * high:.1f}]"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
