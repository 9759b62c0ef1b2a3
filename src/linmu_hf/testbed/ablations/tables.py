"""What the plans show: means and error bars over seeds, as values, Markdown and a picture."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .plans import INTRODUCTIONS, TITLES


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and the sample standard deviation (n - 1), `None` for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def accuracies(right: Sequence[int], tasks: Sequence[str]) -> dict[str, float]:
    """Returns the accuracy per task and `mean`, the mean over tasks."""
    counted = np.array(right, dtype=float)
    by_task = {task: float(counted[[name == task for name in tasks]].mean()) for task in dict.fromkeys(tasks)}
    return {**by_task, "mean": float(np.mean(list(by_task.values())))}


def summarise(
    rows: Sequence[tuple[str, tuple[float, ...], Sequence[Sequence[int]], Sequence[float]]],
    tasks: Sequence[str],
    teacher: Sequence[int],
    whole_scene: Collection[str] = (),
) -> list[dict[str, Any]]:
    """
    Returns the rows of a table.

    Args:
        rows (`Sequence[tuple]`):
            Label, the paper's figures, for every seed which test rows are right (0 or 1), and the relative errors.
        tasks (`Sequence[str]`): the task of every test row.
        teacher (`Sequence[int]`): which of them the teacher has right.
        whole_scene (`Collection[str]`, *optional*): tasks that have columns for their mean.

    Returns:
        `list[dict]`: `label`, `seeds`, and by task, for `mean`, `retention` (mean accuracy over the teacher's),
        `error` and `difference` (of the mean accuracy from the first row's, seed by seed) a mean and a standard
        deviation; `paper`, the mean of the paper's figures as a share, and its difference from the first row's. With
        tasks of `whole_scene` also `whole_scene`, the mean accuracy on these, and `whole_scene_difference`.
    """
    known = accuracies(teacher, tasks)["mean"]
    table: list[dict[str, Any]] = []
    whole = [task for task in dict.fromkeys(tasks) if task in whole_scene]
    first: dict[str, list[float]] = {}
    for label, paper, seeds, errors in rows:
        scores = [accuracies(right, tasks) for right in seeds]
        means = [score["mean"] for score in scores]
        columns = {name: [score[name] for score in scores] for name in scores[0]}
        if whole:
            columns["whole_scene"] = [math.fsum(score[task] for task in whole) / len(whole) for score in scores]
        first = first or dict(columns)
        columns["retention"] = [mean / known if known else math.nan for mean in means]
        columns["difference"] = [mean - base for mean, base in zip(means, first["mean"])]
        if whole:
            pairs = zip(columns["whole_scene"], first["whole_scene"])
            columns["whole_scene_difference"] = [mean - base for mean, base in pairs]
        if errors:
            columns["error"] = list(errors)
        figures = {name: dict(zip(("mean", "deviation"), spread(values))) for name, values in columns.items()}
        shown = math.fsum(paper) / len(paper) / 100 if paper else None
        base = table[0]["paper"] if table else shown
        lead = shown - base if shown is not None and base is not None else None
        table.append({"label": label, "seeds": len(seeds), **figures, "paper": shown, "paper_difference": lead})
    return table


def against_paper(table: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """
    Sorts the rows after the first by the sign of their difference from it: `"as"` in the paper, `"other"`, or
    `"undecided"` where the mean over seeds is not more than its standard deviation.
    """
    sorted_rows: dict[str, list[str]] = {"as": [], "other": [], "undecided": []}
    for row in table[1:]:
        here, deviation, paper = row["difference"]["mean"], row["difference"]["deviation"], row["paper_difference"]
        if paper is not None:
            decided = abs(here) > (deviation or 0)
            kind = "undecided" if not decided else "as" if here * paper > 0 else "other"
            sorted_rows[kind].append(row["label"])
    return sorted_rows


def format_plan(
    plan: str, table: Sequence[Mapping[str, Any]], tasks: Sequence[str], picture: str | None = None
) -> str:
    """Returns a plan's section in Markdown."""
    names = list(dict.fromkeys(tasks))
    with_error = any("error" in row for row in table)
    whole = ["whole_scene", "whole_scene_difference"] if "whole_scene" in table[0] else []
    shown = [name.replace("_", " ").replace("scene difference", "scene, difference") for name in whole]
    head = [
        "",
        "seeds",
        *names,
        "mean",
        "retention",
        "difference",
        *shown,
        *(["error"] if with_error else []),
        "paper",
    ]
    introduction = [INTRODUCTIONS[plan], ""] if plan in INTRODUCTIONS else []
    lines = [f"## {TITLES[plan]}", "", *introduction, "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in table:
        cells = [row["label"], str(row["seeds"]), *(_percent(row[name]) for name in (*names, "mean", "retention"))]
        cells.append(_percent(row["difference"], sign="+"))
        cells += [_percent(row[name], sign="+" if "difference" in name else "") for name in whole]
        if with_error:
            cells.append(_plus_minus(row["error"], 1, 3) if "error" in row else "")
        paper = "" if row["paper"] is None else f"{100 * row['paper']:.1f} ({100 * row['paper_difference']:+.1f})"
        lines.append("| " + " | ".join([*cells, paper]) + " |")
    if any(row["paper"] is not None for row in table):
        found = {kind: ", ".join(labels) or "none" for kind, labels in against_paper(table).items()}
        lines += [
            "",
            f"Order against the first row: as in the paper: {found['as']}; the other way round: {found['other']}; not "
            f"told apart by these seeds: {found['undecided']}.",
        ]
    if picture:
        lines += ["", f"![{TITLES[plan]}]({picture})"]
    return "\n".join(lines) + "\n"


def plot_plan(plan: str, table: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draws the mean accuracy of every row, and that on whole scenes, with bars of one standard deviation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 1 + 0.4 * len(table)))
    columns = (
        {"mean": "all tasks", "whole_scene": "whole scene"} if "whole_scene" in table[0] else {"mean": "all tasks"}
    )
    height = 0.8 / len(columns)
    for i, (name, title) in enumerate(columns.items()):
        means = [100 * row[name]["mean"] for row in table]
        deviations = [100 * (row[name]["deviation"] or 0) for row in table]
        places = [place + height * (i - (len(columns) - 1) / 2) for place in range(len(table))]
        axis.barh(places, means, height, xerr=deviations, color=f"C{i}", capsize=3, label=title)
    axis.set_yticks(range(len(table)), [row["label"] for row in table])
    if len(columns) > 1:
        axis.legend(fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("accuracy, percent; bars are one standard deviation over seeds")
    axis.set_title(TITLES[plan])
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _percent(value: Mapping[str, float | None], sign: str = "") -> str:
    return _plus_minus(value, 100, 1, sign)


def _plus_minus(value: Mapping[str, float | None], factor: float, digits: int, sign: str = "") -> str:
    mean, deviation = value["mean"], value["deviation"]
    assert mean is not None
    text = f"{factor * mean:{sign}.{digits}f}"
    return text if deviation is None else f"{text} ± {factor * deviation:.{digits}f}"
