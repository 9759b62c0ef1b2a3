"""The model card: written from the folder, the teacher's own card and the logs of the run."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData, hf_hub_download, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..families import FAMILIES
from ..modeling.configuration_linmu import LinMUConfig
from ..modeling.mixers import recurrent_layers, state_bytes
from ..safetensors_io import read_checkpoint


if TYPE_CHECKING:  # distillation needs more than the core of the package
    from ..distillation.stages import Stage

CARD = "README.md"
LOG, CURVES, ERROR_MAP = "training_log.jsonl", "loss_curves.png", "error_map.png"  # as a distillation names them
LICENSE_KEYS = ("license", "license_name", "license_link")
# In the example of a card; an upload puts the repository's name in its place.
THIS_FOLDER = 'model="."'
RETENTION = "## Retention"

USE = f"""\
## Use

```bash
pip install "linmu-hf[video]"
```

```python
from PIL import Image
from transformers import pipeline

ask = pipeline("image-text-to-text", {THIS_FOLDER}, trust_remote_code=True)
image = Image.new("RGB", (256, 256), "white")  # or Image.open("photo.png")
content = [{{"type": "image", "image": image}}, {{"type": "text", "text": "What is in the picture?"}}]
answer = ask(text=[{{"role": "user", "content": content}}], max_new_tokens=64, return_full_text=False)
print(answer[0]["generated_text"])
```

With `import linmu_hf` before it, `trust_remote_code=True` is not needed. `AutoModelForImageTextToText` and
`AutoProcessor` load the model in the same way.
"""
LIMITS = """\
## Limits

- M-MATE layers keep a state of constant size instead of keys and values. What must take tokens back, or store keys and
  values, is refused with the reason: assisted and prompt-lookup decoding, cropping the cache, quantized caches,
  continuous batching.
- The tokens of one image or video are read together: no chunk of a prefill may end inside one.
- Attention masks mark padding only.
- It inherits the teacher's faults. Exact recall of one among many vision tokens is what a state of constant size finds
  harder than attention does.
"""


@dataclass(frozen=True)
class Origin:
    """
    The origin of a model, for a public page: no local paths.

    Args:
        teacher (`str`, *optional*): The teacher's Hub id, or the name of its folder.
        base_model (`str`, *optional*): The teacher's Hub id.
        license (`dict[str, str]`, *optional*): `license`, `license_name` and `license_link` of the teacher's card.
    """

    teacher: str | None = None
    base_model: str | None = None
    license: dict[str, str] = field(default_factory=dict)


def find_origin(teacher: str | Path, revision: str | None = None, student: str | Path | None = None) -> Origin:
    """
    Returns the origin of what is made from `teacher`.

    The license is that of the teacher's card, or of its `config.json`. A teacher that is a local folder has no Hub id;
    then the card of `student`, the model that the run started from, may know it. What cannot be found out, for example
    without network, is left out.

    Args:
        teacher (`str` or `Path`): Folder, or model on the Hub.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        student (`str` or `Path`, *optional*): Folder, or model on the Hub.
    """
    name = hub_id(teacher)
    metadata = _metadata(teacher, revision)
    license = {key: str(metadata[key]) for key in LICENSE_KEYS if metadata.get(key)}
    if name and license.get("license_link", "http").split(":")[0] not in ("http", "https"):
        license["license_link"] = f"https://huggingface.co/{name}/blob/main/{license['license_link']}"
    base_model = name
    if student is not None and (base_model is None or not license):
        inherited = _metadata(student, None)
        earlier = inherited.get("base_model")
        if base_model is None and isinstance(earlier, str):
            base_model = earlier
        if not license and base_model == earlier:
            license = {key: str(inherited[key]) for key in LICENSE_KEYS if inherited.get(key)}
    return Origin(base_model or Path(teacher).expanduser().absolute().name, base_model, license)


def hub_id(path: str | Path) -> str | None:
    """Returns `path` if it is the name of a repository on the Hub, and no local path."""
    text = str(path)
    if Path(text).expanduser().exists() or text.startswith((".", "/", "~")):
        return None
    try:
        validate_repo_id(text)
    except HFValidationError:
        return None
    return text


def write_model_card(folder: str | Path, origin: Origin, **training: Any) -> None:
    """
    Writes `README.md` into the folder of a saved model.

    Args:
        folder (`str` or `Path`), origin (`Origin`), training: See [`render_model_card`].
    """
    text = render_model_card(Path(folder), origin, **training)
    (Path(folder) / CARD).write_text(text, encoding="utf-8")


def render_model_card(
    folder: Path,
    origin: Origin,
    *,
    stages: "Sequence[Stage]" = (),
    rows: Iterable[dict[str, Any]] = (),
    dataset: str | None = None,
    machine: str | None = None,
) -> str:
    """
    Returns the text of a model's card.

    Args:
        folder (`Path`): Holds `config.json` and the weights, and the curves if there are any.
        origin (`Origin`): See [`find_origin`].
        stages (`Sequence[Stage]`, *optional*): The stages that the model has gone through.
        rows (`Iterable[dict]`, *optional*): The rows of `training_log.jsonl` of these stages.
        dataset (`str`, *optional*): What it was trained on; named only if it is on the Hub.
        machine (`str`, *optional*): What it was trained with, such as `8 x NVIDIA A100`.
    """
    dataset = hub_id(dataset) if dataset else None
    config = LinMUConfig.from_pretrained(folder)
    is_linear = bool(recurrent_layers(config.text_config.layer_types))
    data = ModelCardData(
        base_model=origin.base_model,
        datasets=[dataset] if dataset else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["linmu", *(["linear-attention"] if is_linear else []), *(["distillation"] if stages else [])],
        **origin.license,
    )
    parts = [f"---\n{data.to_yaml()}\n---\n", _introduction(folder, config, origin, stages), USE]
    if stages:
        parts.append(_training(folder, origin, stages, rows, dataset, machine))
    if is_linear:
        parts.append(LIMITS)
    parts.append(_license(origin, config.vision_config.model_type))
    return "\n".join(parts)


def add_retention(card: str, results: dict[str, Any], model: str | None = None) -> str:
    """
    Returns the card with a table of what the model keeps of its teacher, in place of an earlier one.

    Args:
        card (`str`): The text of `README.md`.
        results (`dict`): What `linmu-eval --json` writes.
        model (`str`, *optional*): Which of its models, by folder; needed if there are several.

    Raises:
        `ValueError`: The results are of another form, or of other models.
    """
    section = _retention(results, model)
    if RETENTION in card:
        before, _, after = card.partition(RETENTION)
        rest = re.search(r"^## ", after, re.MULTILINE)
        return before + section + ("\n" + after[rest.start() :] if rest else "")
    before, heading, after = card.partition("## Limits")
    return f"{before.rstrip()}\n\n{section}" + (f"\n{heading}{after}" if heading else "")


def _introduction(folder: Path, config: LinMUConfig, origin: Origin, stages: "Sequence[Stage]") -> str:
    text: Any = config.text_config
    vision: Any = config.vision_config
    kept = sorted(set(range(len(text.layer_types))) - set(recurrent_layers(text.layer_types)))
    count = sum(tensor.numel for tensor in read_checkpoint(folder).values())
    teacher = f"[{origin.base_model}](https://huggingface.co/{origin.base_model})" if origin.base_model else ""
    teacher = teacher or origin.teacher or "a vision-language model"
    if len(kept) == len(text.layer_types):
        what = f"{teacher} with full attention in every layer, as it was trained. Made with linmu-hf."
    else:
        if stages:
            state = f"It has gone through {', '.join(f'`{stage.name}`' for stage in stages)} of the distillation."
        else:
            state = "It starts from the teacher's weights and needs distillation (`linmu-distill`) to answer well."
        what = (
            f"{teacher} with M-MATE blocks in place of self-attention in its decoder: a masked bidirectional Mamba2 "
            "branch and a 3D shifted-window attention branch. These layers take time linear in the number of tokens "
            "and keep a state of constant size. Made with linmu-hf, after the LinMU paper (*Multimodal Understanding "
            f"Made Linear*). {state}"
        )
    facts = {
        "family": FAMILIES[vision.model_type].name,
        "layers": f"{len(text.layer_types) - len(kept)} of {len(text.layer_types)} with M-MATE"
        + (f", attention kept in {kept}" if kept else ""),
        "parameters": f"{count:,} ({str(config.dtype).removeprefix('torch.')})",
    }
    if len(kept) < len(text.layer_types):
        facts["windows"] = (
            f"{_shape(text.window_size)} for videos, {_shape(text.image_window_size)} for images, "
            "in tokens (frames x height x width)"
            + (f"; the last {text.text_window} of text and the first {text.sink_tokens}" if text.text_window else "")
        )
        facts["state"] = f"{state_bytes(text, config.dtype.itemsize) / 1e6:,.1f} MB for each sequence, however long"
    lines = [
        f"# {origin.teacher.split('/')[-1]} as LinMU" if origin.teacher else "# LinMU model",
        "",
        what,
        "",
        *_table(["", ""], [[key, value] for key, value in facts.items()]),
    ]
    return "\n".join(lines) + "\n"


def _training(
    folder: Path,
    origin: Origin,
    stages: "Sequence[Stage]",
    rows: Iterable[dict[str, Any]],
    dataset: str | None,
    machine: str | None,
) -> str:
    figures: dict[str, dict] = {}
    for row in rows:
        figures.setdefault(row.get("stage", ""), {}).update(row)
    columns = {
        "loss_hid": "L_hid", "loss_tok": "L_tok", "loss_seq": "L_seq", "loss_sup": "L_sup", "agreement": "agreement",
        "relative_error": "relative error", "seconds": "seconds",
    }  # fmt: skip
    held_out = {
        "eval_loss": "loss", **{f"eval_{key}": name for key, name in columns.items()}, "best_step": "best step",
    }  # fmt: skip
    logged, measured = (
        [key for key in names if any(key in figures.get(stage.name, {}) for stage in stages)]
        for names in (columns, held_out)
    )
    table = []
    for stage in stages:
        last = figures.get(stage.name, {})
        cells = [f"{last[key]:.4g}" if key in last else "" for key in logged]
        table.append([stage.name, f"{stage.max_steps:,}", f"{stage.learning_rate:g}", stage.objective(), *cells])
    data = f" on [{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else ""
    source = f" from {origin.teacher}" if origin.teacher else ""
    by = f", with {machine}" if machine else ""
    lines = [
        "## Training",
        "",
        f"Distilled{source}{data}{by}, stage by stage; the last logged values (`training_log.jsonl` has the others):",
        "",
        *_table(["stage", "steps", "peak rate", "loss", *(columns[key] for key in logged)], table),
    ]
    if measured:
        table = []
        for stage in stages:
            last = figures.get(stage.name, {})
            cells = [f"{last[key]:.4g}" if key in last else "" for key in measured]
            table.append([stage.name, *cells])
        best = " A stage with a best step has ended with the weights of that step." if "best_step" in measured else ""
        lines += ["", f"On held-out rows, at the end of each stage:{best}", ""]
        lines += _table(["stage", *(held_out[key] for key in measured)], table)
    for name, text in (
        (CURVES, "Loss terms and errors of the layers over the steps"),
        (ERROR_MAP, "Error of each layer over the steps"),
    ):
        if (folder / name).is_file():
            lines += ["", f"![{text}]({name})"]
    return "\n".join(lines) + "\n"


def pick_student(results: dict[str, Any], model: str | None) -> dict[str, Any]:
    """Returns the results of `model`, a folder, or of the only student there is."""
    students = [entry for entry in results["models"].values() if "retention" in entry]
    if model is not None and len(students) > 1:
        place = Path(model).expanduser().resolve()
        students = [entry for entry in students if Path(entry["path"]).expanduser().resolve() == place]
    if len(students) != 1:
        raise ValueError(f"the results hold {len(students)} models that could be this one: evaluate it alone")
    return students[0]


def _retention(results: dict[str, Any], model: str | None) -> str:
    try:
        student = pick_student(results, model)
        teacher = results["models"]["teacher"]["accuracy"]
        rows = []
        for task, entry in student["retention"]["tasks"].items():
            accuracies = [part["tasks"][task]["accuracy"] for part in (teacher, student["accuracy"])]
            rows.append([task, *map(_percent, accuracies), _percent(entry["retention"], entry["interval"])])
        mean = student["retention"]["mean"]
        rows.append(
            ["**mean**", _percent(teacher["mean"]), _percent(student["accuracy"]["mean"]),
             _percent(mean["retention"], mean["interval"])]
        )  # fmt: skip
        data = hub_id(results["dataset"])
        count, split = results["rows"], results["split"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"these are not the results of `linmu-eval --teacher ... --json FILE`: {error!r}") from error
    where = f" of [{data}](https://huggingface.co/datasets/{data})" if data else ""
    where += f" (split `{split}`)" if split else ""
    lines = [
        RETENTION,
        "",
        f"Exact-match accuracy in percent on {count:,} rows{where}, and what is kept of the "
        "teacher's, with a 95% interval:",
        "",
        *_table(["task", "teacher", "this model", "kept"], rows),
    ]
    return "\n".join(lines) + "\n"


def _license(origin: Origin, family: str) -> str:
    if not origin.license.get("license"):
        text = f"That of the teacher, which was not found when this card was written. {FAMILIES[family].license_note}"
        return f"## License\n\n{text.strip()}\n"
    name = origin.license.get("license_name") or origin.license["license"]
    link = origin.license.get("license_link")
    return f"## License\n\nThat of the teacher: {f'[{name}]({link})' if link else name}.\n"


def _metadata(model: str | Path, revision: str | None) -> dict[str, Any]:
    """The metadata of a model's card, over a license that its configuration names."""
    metadata: dict[str, Any] = {}
    for name in ("config.json", CARD):
        local = Path(model).expanduser()
        try:
            file = local / name if local.is_dir() else Path(hf_hub_download(str(model), name, revision=revision))
            if name == CARD:
                metadata |= metadata_load(file) or {}
            elif license := json.loads(file.read_text(encoding="utf-8")).get("license"):
                metadata["license"] = license
        except Exception:
            continue  # no card, no network, no YAML: a card can do without
    return metadata


def _shape(window: Sequence[int]) -> str:
    return " x ".join(map(str, window))


def _percent(share: float | None, interval: Sequence[float] | None = None) -> str:
    if share is None:
        return "-"
    return f"{100 * share:.1f}" + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
