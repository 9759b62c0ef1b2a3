"""The benchmarks of the paper (Tables 1 and 5) and those where linear models lose, by their names in lmms-eval."""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """
    A benchmark of lmms-eval, and how it is reported.

    Args:
        title (`str`): Its name in tables.
        task (`str`): Its name in lmms-eval.
        metric (`str`): The metric that is reported.
        judged (`bool`): Whether a model of OpenAI judges the answers, which needs `OPENAI_API_KEY`.
    """

    title: str
    task: str
    metric: str
    judged: bool = False


SUITES = {
    "paper": (
        Benchmark("MMMU", "mmmu_val", "mmmu_acc"),
        Benchmark("MMMU-Pro vision", "mmmu_pro_vision", "mmmu_acc"),
        Benchmark("MMMU-Pro standard", "mmmu_pro_standard", "mmmu_acc"),
        Benchmark("TextVQA", "textvqa_val", "exact_match"),
        Benchmark("LongVideoBench", "longvideobench_val_v", "lvb_acc"),
        Benchmark("Video-MME", "videomme", "videomme_perception_score"),
        Benchmark("Video-MME, subtitles", "videomme_w_subtitle", "videomme_perception_score"),
        Benchmark("MLVU", "mlvu_dev", "mlvu_percetion_score"),  # spelt so there
        Benchmark("ActivityNet-QA", "activitynetqa", "gpt_eval_accuracy", judged=True),
        Benchmark("MathVista", "mathvista_testmini_format", "llm_as_judge_eval", judged=True),
    ),
    "dense": (
        Benchmark("DocVQA", "docvqa_val", "anls"),
        Benchmark("InfoVQA", "infovqa_val", "anls"),
        Benchmark("ChartQA", "chartqa", "relaxed_overall"),
        Benchmark("OCRBench", "ocrbench", "ocrbench_accuracy"),
        Benchmark("AI2D", "ai2d", "exact_match"),
    ),
}
# Metrics that lmms-eval gives from 0 to 100; the others of the suites go from 0 to 1.
PERCENT = ("videomme_perception_score", "mlvu_percetion_score", "gpt_eval_accuracy", "llm_as_judge_eval")
CHOICES = ("options", "candidates", "choices")  # of a question, in the rows of these benchmarks
PREDICTED = ("pred_answer", "parsed_pred")


def chance(doc: Mapping[str, Any]) -> float:
    """Returns how often a guess among the choices of a question is right, 0 without choices."""
    for name in CHOICES:
        found = doc.get(name)
        if isinstance(found, str):
            try:
                found = ast.literal_eval(found)
            except (ValueError, SyntaxError):
                continue
        if isinstance(found, (Mapping, Sequence)) and not isinstance(found, str) and len(found) > 1:
            return 1 / len(found)
    return 0.0


def sample_score(sample: Mapping[str, Any], metric: str) -> float | None:
    """Returns how right one answer is, from 0 to 1, or `None` if lmms-eval keeps that for its aggregation."""
    value = sample.get(metric)
    if isinstance(value, (bool, int, float)):
        return float(value)
    if not isinstance(value, Mapping):
        return None
    if isinstance(value.get("score"), (bool, int, float)):
        return float(value["score"])
    said = next((value[name] for name in PREDICTED if name in value), None)
    right = value.get("answer")
    if said is None or right is None:
        return None
    return float(said == right or (isinstance(right, list) and said in right))


def unit_of(metric: str, value: float, scores: Sequence[float]) -> int:
    """
    Returns what a metric's value is divided by to go from 0 to 1: 100 for percent.

    Args:
        metric (`str`): Its name, which decides for the metrics of the suites: 1.0 is 1% of one and 100% of another.
        value (`float`): What lmms-eval reports.
        scores (`Sequence[float]`): Those of the questions, from 0 to 1, which decide for other metrics: their mean is
            the value in one of the two units. Without any, only a value above 1 is percent.
    """
    if metric in PERCENT:
        return 100
    if any(metric == one.metric for suite in SUITES.values() for one in suite):
        return 1
    if not scores:
        return 100 if value > 1 else 1
    mean = sum(scores) / len(scores)
    return 100 if abs(100 * mean - value) < abs(mean - value) else 1
