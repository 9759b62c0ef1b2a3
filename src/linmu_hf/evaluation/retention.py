"""How much of its teacher a student keeps: exact-match accuracy per task, on the same rows, with 95% intervals.

symbol      meaning
accuracy    share of rows whose greedy answer equals the reference (Wilson interval)
retention   accuracy of the student / accuracy of the teacher (paired bootstrap over rows, tasks kept apart)
mean        the mean over tasks of the accuracies, and the ratio of these means
worst       the task with the lowest retention
"""

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..data import Row, answer_text, encode_prompts
from ..data.rows import row_size


Z_95 = 1.959964
BOOTSTRAP_SAMPLES = 2000


SHORTEST_LIMIT = 32  # of max_new_tokens, where references are short
QUOTES = " \"'`“”‘’"
# Full-width ASCII is ASCII; what has no width is dropped. Other compatibility forms keep their meaning: x² is not x2.
SAME = {0xFF01 + i: 0x21 + i for i in range(94)} | dict.fromkeys((0x200B, 0x2060, 0xFEFF, 0x00AD)) | {0x3002: "."}


def normalise(text: str) -> str:
    """Returns `text` in NFC and lower case, with single spaces, no quotes around it and no full stop after it."""
    text = unicodedata.normalize("NFC", text).translate(SAME)
    return re.sub(r"\s+", " ", text).strip(QUOTES).rstrip(".").strip(QUOTES).lower()


def special_ids(tokenizer) -> set[int]:
    """Returns the ids of all special tokens, among them those that mark boxes and references."""
    return {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}


def decode_answer(tokenizer, ids: Sequence[int], reference: str = "") -> str:
    """Returns the text of an answer; of the special tokens, those that the reference has stay."""
    meant = set(tokenizer(reference, add_special_tokens=False)["input_ids"])
    left_out = special_ids(tokenizer) - meant
    return tokenizer.decode([i for i in ids if i not in left_out], clean_up_tokenization_spaces=False).strip()


def tasks_of(rows: Sequence[Row]) -> list[str]:
    """Returns the name of each row's `task`, which may be any value; rows without one share the task `"all"`."""
    return ["all" if row.get("task") in (None, "") else str(row["task"]) for row in rows]


def reference_lengths(processor, rows: Sequence[Row]) -> list[int]:
    """Returns how many tokens the reference of each row takes, with the one that ends it."""
    return [len(processor.tokenizer(answer_text(row), add_special_tokens=False)["input_ids"]) + 1 for row in rows]


def answer_limit(processor, rows: Sequence[Row]) -> int:
    """Returns a `max_new_tokens` that every reference fits, also with a few tokens more than it needs."""
    return max(SHORTEST_LIMIT, 8 + max(reference_lengths(processor, rows), default=0))


@torch.inference_mode()
def generate_answers(
    model,
    processor,
    rows: Sequence[Row],
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    description: str | None = None,
    numbers: Sequence[int] | None = None,
    unusable: dict[int, str] | None = None,
    cut: list[int] | None = None,
    keep: Callable[[list[int], list[str], list[bool]], None] | None = None,
) -> list[str]:
    """
    Answers each row's last question by greedy decoding.

    Args:
        model (`PreTrainedModel`):
            Any image-text-to-text model, teacher or student.
        processor (`ProcessorMixin`):
            Its processor.
        rows (`Sequence[Mapping]`):
            Rows as in `linmu_hf.data`; everything before the last assistant turn is the prompt.
        batch_size (`int`, *optional*, defaults to 32):
            Rows decoded together. Rows of similar size share a batch, longest first, so that a batch too large for
            the memory fails at once.
        max_new_tokens (`int`, *optional*):
            Longest answer; by default that of [`answer_limit`].
        description (`str`, *optional*):
            Shows a progress bar with this title.
        numbers (`Sequence[int]`, *optional*):
            The rows' numbers in their dataset, for errors; by default 0, 1, ...
        unusable (`dict[int, str]`, *optional*):
            Gets the number and error of each row that cannot be encoded, such as one with a damaged image, and whose
            answer is then empty; without it such a row is an error.
        cut (`list[int]`, *optional*):
            Gets the number of each row whose answer had not ended after `max_new_tokens`.
        keep (`Callable`, *optional*):
            Is called after each batch with the places of its rows in `rows`, their answers and whether each was cut.

    Returns:
        `list[str]`: the answers, in the order of `rows`. Of the special tokens, those that the reference has stay.
    """
    model.eval()
    tokenizer = processor.tokenizer
    max_new_tokens = max_new_tokens or answer_limit(processor, rows)
    ends = {tokenizer.pad_token_id, *np.atleast_1d(model.generation_config.eos_token_id or [])}
    numbers = range(len(rows)) if numbers is None else numbers
    answers = [""] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: row_size(rows[i]), reverse=True)
    progress = tqdm(total=len(rows), desc=description, unit="row", disable=description is None)
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        progress.update(len(chosen))
        try:
            inputs = encode_prompts(processor, [rows[i] for i in chosen], [numbers[i] for i in chosen])
        except ValueError:
            if unusable is None:
                raise
            chosen = [i for i in chosen if _can_encode(processor, rows[i], numbers[i], unusable)]
            if not chosen:
                continue
            inputs = encode_prompts(processor, [rows[i] for i in chosen])
        inputs = inputs.to(model.device)
        ids = model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        was_cut = []
        for i, said in zip(chosen, ids[:, inputs["input_ids"].shape[1] :].tolist()):
            answers[i] = decode_answer(tokenizer, said, answer_text(rows[i]))
            was_cut.append(len(said) >= max_new_tokens and said[-1] not in ends)
        if cut is not None:
            cut += [numbers[i] for i, one in zip(chosen, was_cut) if one]
        if keep is not None:
            keep(chosen, [answers[i] for i in chosen], was_cut)
    progress.close()
    return answers


def correct_answers(rows: Sequence[Row], answers: Sequence[str]) -> np.ndarray:
    """Returns whether each answer equals the row's own after [`normalise`], as a bool array [n]."""
    return np.array(
        [normalise(answer_text(row)) == normalise(answer) for row, answer in zip(rows, answers)], dtype=bool
    )


def wilson_interval(right: int, n: int) -> tuple[float, float]:
    """Returns the 95% Wilson score interval of a proportion `right / n`."""
    if n == 0:
        return 0.0, 1.0
    share = right / n
    centre = share + Z_95**2 / (2 * n)
    half_width = Z_95 * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n * n))
    scale = 1 + Z_95**2 / n
    return max(0.0, (centre - half_width) / scale), min(1.0, (centre + half_width) / scale)


def accuracy_report(correct: np.ndarray, tasks: Sequence[str]) -> dict[str, Any]:
    """
    Returns the accuracy per task and their mean.

    Returns:
        `dict`: `tasks` = `{task: {"accuracy", "interval", "rows"}}` and `mean`, the mean over tasks.
    """
    report = {}
    for task in dict.fromkeys(tasks):
        picked = correct[_rows_of(tasks, task)]
        low, high = wilson_interval(int(picked.sum()), len(picked))
        report[task] = {"accuracy": float(picked.mean()), "interval": [low, high], "rows": len(picked)}
    return {"tasks": report, "mean": float(np.mean([entry["accuracy"] for entry in report.values()]))}


def retention_report(
    student: np.ndarray, teacher: np.ndarray, tasks: Sequence[str], *, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0
) -> dict[str, Any]:
    """
    Returns the retention per task, of the mean, and the worst task, with paired bootstrap intervals.

    Args:
        student (`np.ndarray`):
            Which rows the student answers right, bool [n].
        teacher (`np.ndarray`):
            The same for the teacher, on the same rows.
        tasks (`Sequence[str]`):
            The task of each row.

    Returns:
        `dict`: `tasks` = `{task: {"retention", "interval"}}`, `mean` of the same form, and `worst` =
        `{"task", "retention"}`. A ratio to a teacher that answers nothing right is `None`.
    """
    if len(student) != len(teacher):
        raise ValueError(f"student and teacher must answer the same rows, not {len(student)} and {len(teacher)}")
    rng = np.random.default_rng(seed)
    report, student_means, teacher_means = {}, [], []
    for task in dict.fromkeys(tasks):
        s, t = (right[_rows_of(tasks, task)].astype(float) for right in (student, teacher))
        draws = rng.integers(0, len(s), (samples, len(s)))
        resampled_s, resampled_t = s[draws].mean(1), t[draws].mean(1)  # [samples]
        report[task] = _ratio(s.mean(), t.mean(), resampled_s, resampled_t)
        student_means.append((s.mean(), resampled_s))
        teacher_means.append((t.mean(), resampled_t))
    mean = _ratio(
        *(np.mean([means[i] for means in side], axis=0) for i in (0, 1) for side in (student_means, teacher_means))
    )
    ranked = [(entry["retention"], task) for task, entry in report.items() if entry["retention"] is not None]
    worst = min(ranked, default=(None, None))
    return {"tasks": report, "mean": mean, "worst": {"task": worst[1], "retention": worst[0]}}


def compare(
    correct: dict[str, np.ndarray], tasks: Sequence[str], teacher: str | None = None
) -> dict[str, dict[str, Any]]:
    """
    Returns reports of models on the same rows, `{model: {"accuracy", "retention"}}`; the teacher's has no
    `"retention"`.
    """
    reports = {}
    for name, right in correct.items():
        reports[name] = {"accuracy": accuracy_report(right, tasks)}
        if teacher is not None and name != teacher:
            reports[name]["retention"] = retention_report(right, correct[teacher], tasks)
    return reports


def format_table(reports: dict[str, dict[str, Any]]) -> str:
    """Formats [`compare`]'s result: a row per task, a column per model, in percent, with intervals in brackets."""
    tasks = list(next(iter(reports.values()))["accuracy"]["tasks"])
    rows = [["task", *reports]]
    for task in tasks:
        entries = [report["accuracy"]["tasks"][task] for report in reports.values()]
        rows.append([task, *(_percent(entry["accuracy"], entry["interval"]) for entry in entries)])
    rows.append(["mean", *(_percent(report["accuracy"]["mean"]) for report in reports.values())])
    kept = [report.get("retention") for report in reports.values()]
    if any(kept):
        rows.append(["retention", *(_mean_retention(report) for report in kept)])
        rows.append(["worst task", *(_worst_task(report) for report in kept)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1 : 1 + len(tasks)], rule, *lines[1 + len(tasks) :]])


def _ratio(student: float, teacher: float, resampled_s: np.ndarray, resampled_t: np.ndarray) -> dict[str, Any]:
    defined = resampled_t > 0
    if teacher == 0 or not defined.any():
        return {"retention": None, "interval": None}
    low, high = np.quantile(resampled_s[defined] / resampled_t[defined], [0.025, 0.975])
    return {"retention": float(student / teacher), "interval": [float(low), float(high)]}


def _mean_retention(report: dict[str, Any] | None) -> str:
    return "" if report is None else _percent(report["mean"]["retention"], report["mean"]["interval"])


def _worst_task(report: dict[str, Any] | None) -> str:
    return "" if report is None else f"{_percent(report['worst']['retention'])} {report['worst']['task'] or ''}"


def _percent(share: float | None, interval: Sequence[float] | None = None) -> str:
    if share is None:
        return "-"
    text = f"{100 * share:5.1f}"
    return text if interval is None else f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _rows_of(tasks: Sequence[str], task: str) -> np.ndarray:
    return np.array([name == task for name in tasks])


def _can_encode(processor, row: Row, number: int, unusable: dict[int, str]) -> bool:
    try:
        encode_prompts(processor, [row], [number])
    except ValueError as error:
        unusable[number] = str(error)
    return number not in unusable
