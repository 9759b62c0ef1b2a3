"""Runs tasks of lmms-eval with one model after the other, and keeps what each gives as soon as it is there."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import write_text
from ..loading import library_versions
from .tasks import SUITES, Benchmark, chance, sample_score, unit_of


KEY = "OPENAI_API_KEY"


def benchmarks_of_rows(folder: Path) -> list[Benchmark]:
    """Returns the benchmarks that [`write_tasks`] has written to a folder."""
    names = json.loads((folder / "names.json").read_text())
    return [Benchmark(task, name, "score") for name, task in names.items()]


def find_benchmarks(names: Sequence[str]) -> tuple[list[Benchmark], list[str]]:
    """
    Returns the benchmarks of these names, and of a suite those that cannot be judged here.

    Args:
        names (`Sequence[str]`): A suite of `tasks.py`, or a task of lmms-eval, of which its first metric counts.
    """
    known = {one.task: one for suite in SUITES.values() for one in suite}
    found: dict[str, Benchmark] = {}
    left_out = []
    for name in names:
        for one in SUITES.get(name, [known.get(name, Benchmark(name, name, ""))]):
            if one.judged and KEY not in os.environ and name in SUITES:
                left_out.append(one.title)
            else:
                found[one.task] = one
    return list(found.values()), left_out


def run_model(
    path: str, benchmarks: Sequence[Benchmark], folder: Path, settings: Mapping[str, Any], include_path: str | None
) -> dict[str, dict[str, Any]]:
    """
    Returns what every benchmark gives with a model; what is in `folder` already is taken from there.

    Args:
        path (`str`): Folder or Hub id of the model.
        benchmarks (`Sequence[Benchmark]`): From [`find_benchmarks`].
        folder (`Path`): For a file of each benchmark. Under `torchrun` the first process writes.
        settings (`Mapping[str, Any]`): `batch_size`, `limit`, `device` and `dtype`.
        include_path (`str`, *optional*): A folder with further tasks.

    Returns:
        `dict`: By task, its `score` and `metric`, the `samples` (`id`, `score` and `chance` of every question, where
        lmms-eval tells them), `ttft` in seconds for each batch, `tokens_per_second` and what it was made with.

    Raises:
        `ValueError`: A file was made with other settings.
    """
    settings = {"model": path, **{name: value for name, value in settings.items() if value is not None}}
    results, model = {}, None
    for one in benchmarks:
        file = folder / f"{one.task}.json"
        if file.exists():
            results[one.task] = json.loads(file.read_text())
            if (made := results[one.task]["settings"]) != settings:
                raise ValueError(f"{file} was made with {made}, not {settings}: give another --output, or remove it")
            continue
        if model is None:
            model = _load(settings)
        found = _run(model, one, settings, include_path)
        model.accelerator.wait_for_everyone()
        if model.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            results[one.task] = {**found, "settings": settings, "versions": library_versions()}
            write_text(file, json.dumps(results[one.task], indent=1) + "\n")
    return results


def _load(settings: Mapping[str, Any]):
    from .model import LinMU

    names = ("batch_size", "device", "dtype")
    return LinMU(settings["model"], **{name: settings[name] for name in names if name in settings})


def _run(model, benchmark: Benchmark, settings, include_path: str | None) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.models.model_utils.gen_metrics import reset_logged_metrics, summarize_logged_metrics
    from lmms_eval.tasks import TaskManager

    reset_logged_metrics()
    manager = TaskManager("ERROR", include_path=include_path, model_name="linmu")
    if benchmark.task not in manager.all_tasks:
        raise ValueError(f"lmms-eval has no task {benchmark.task}: `lmms-eval tasks` shows what there is")
    found = simple_evaluate(
        model,
        tasks=[benchmark.task],
        batch_size=settings["batch_size"],
        limit=settings.get("limit"),
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
        verbosity="ERROR",
    )
    return {} if model.rank else summarise(benchmark, found, summarize_logged_metrics())


def summarise(benchmark: Benchmark, found: Mapping[str, Any], speed: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is kept of the results of lmms-eval for one task, scores from 0 to 1."""
    metrics = {
        name.partition(",")[0]: value
        for name, value in found["results"][benchmark.task].items()
        if isinstance(value, (int, float)) and "_stderr" not in name
    }
    metric = benchmark.metric or next(iter(metrics))
    if metric not in metrics:
        raise ValueError(f"{benchmark.task} gives {sorted(metrics)}, not {metric}")
    samples = [
        {"id": one["doc_id"], "score": sample_score(one, metric), "chance": chance(one["doc"])}
        for one in found["samples"][benchmark.task]
    ]
    samples.sort(key=lambda one: one["id"])
    known = [one["score"] for one in samples]
    score = metrics[metric] / unit_of(metric, metrics[metric], [] if None in known else known)
    # what lmms-eval aggregates in a way of its own has no score for each question, and no interval
    if not known or None in known or abs(sum(known) / len(known) - score) > 5e-3:
        samples = [{**one, "score": None} for one in samples]
    return {
        "task": benchmark.task,
        "metric": metric,
        "score": score,
        "ttft": speed.get("avg_ttft"),
        "tokens_per_second": speed.get("avg_speed"),
        "samples": samples,
    }
