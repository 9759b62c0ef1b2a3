"""Results on a model's page: `.eval_results/*.yaml`, as the Hub reads them."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

from ..files import write_text
from .model_card import hub_id, pick_student


FOLDER = ".eval_results"


def write_eval_results(folder: str | Path, results: dict[str, Any]) -> Path | None:
    """
    Writes the accuracy of each task, in percent, into the folder of a saved model, to be uploaded with it.

    Args:
        folder (`str` or `Path`): The model, which is one of those that were evaluated.
        results (`dict`): What `linmu-eval --json` writes.

    Returns:
        `Path` or `None`: The file; none for a dataset that is not on the Hub, which knows results by their dataset.
    """
    dataset = hub_id(results["dataset"])
    if dataset is None:
        return None
    notes = f"exact match in percent, greedy decoding, split {results['split']}"
    entries = [
        EvalResultEntry(
            dataset_id=dataset,
            task_id=task,
            value=round(100 * entry["accuracy"], 2),
            notes=f"{notes}, {entry['rows']} rows" if "rows" in entry else notes,
        )
        for task, entry in pick_student(results, str(folder))["accuracy"]["tasks"].items()
    ]
    file = Path(folder).expanduser() / FOLDER / f"{dataset.replace('/', '--')}.yaml"
    file.parent.mkdir(exist_ok=True)
    write_text(file, yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False))
    return file
