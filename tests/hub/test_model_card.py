"""Model cards: what they say, where they are written, and that their example runs as written."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import linmu_hf
from linmu_hf.commands.push import main
from linmu_hf.distillation import folders, read_stages, recipe_file
from linmu_hf.hub import Origin, add_retention, find_origin, model_card, push_folder, write_model_card


STUDENT = Path(linmu_hf.__file__).parent / "testbed" / "student"
SOURCE = Path(linmu_hf.__file__).parents[1]
TEACHER = "Qwen/Qwen2.5-VL-3B-Instruct"
RESEARCH = {
    "license": "other",
    "license_name": "qwen-research",
    "license_link": f"https://huggingface.co/{TEACHER}/blob/main/LICENSE",
}


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "student")


@pytest.fixture
def rows():
    return [json.loads(line) for line in (STUDENT / "training_log.jsonl").read_text().splitlines()]


def results(folder, **more):
    """What linmu-eval --json writes, for two tasks."""

    def accuracies(one, other):
        tasks = {"cell": {"accuracy": one}, "large": {"accuracy": other}}
        return {"tasks": tasks, "mean": (one + other) / 2}

    kept = {
        "tasks": {
            "cell": {"retention": 0.98, "interval": [0.961, 0.99]},
            "large": {"retention": None, "interval": None},
        },
        "mean": {"retention": 0.914, "interval": [0.903, 0.926]},
    }
    models = {
        "teacher": {"accuracy": accuracies(0.99, 0.0), "path": "/somewhere/teacher"},
        "student": {"accuracy": accuracies(0.97, 0.0), "retention": kept, "path": str(folder)},
        **more,
    }
    return {"dataset": "/somewhere/data", "split": "test", "rows": 1200, "models": models}


def python_blocks(card):
    return re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)


def test_metadata_and_text(folder, rows):
    (folder / "loss_curves.png").write_bytes(b"picture")
    stages = read_stages(recipe_file("paper"))[:2]
    write_model_card(folder, Origin(TEACHER, TEACHER, RESEARCH), stages=stages, rows=rows, dataset="org/data")
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "base_model": TEACHER,
        "datasets": ["org/data"],
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["linmu", "linear-attention", "distillation"],
        **RESEARCH,
    }
    last = [row for row in rows if row["stage"] == "stage-2" and "loss_tok" in row][-1]
    line = next(line for line in card.text.splitlines() if line.startswith("| stage-2"))
    assert line.startswith("| stage-2 | 15,000 | 0.0005 | 0.5 hid + 0.5 tok |")
    assert f"{last['loss_tok']:.4g}" in line and f"{last['relative_error']:.4g}" in line
    assert "stage-3" not in card.text
    assert "held-out" not in card.text and "(error_map.png)" not in card.text
    assert "![Loss terms and errors of the layers over the steps](loss_curves.png)" in card.text
    count = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert "4 of 4 with M-MATE" in card.text and f"{count:,} (float32)" in card.text
    assert f"[qwen-research]({RESEARCH['license_link']})" in card.text
    for limit in ("assisted", "quantized", "inside one"):
        assert limit in card.text.partition("## Limits")[2]


def test_a_converted_model_says_that_it_is_not_distilled(folder):
    write_model_card(folder, Origin("teacher"))
    text = (folder / "README.md").read_text()
    assert 'pip install "linmu-hf[video]"' in text  # the processor of the example needs torchvision
    assert "needs distillation" in text and "## Training" not in text and "loss_curves" not in text
    assert "base_model" not in text and "\nlicense" not in text and "was not found" in text


def test_a_model_that_keeps_all_attention_is_the_teacher(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["layer_types"] = ["full_attention"] * 4
    (folder / "config.json").write_text(json.dumps(config))
    write_model_card(folder, Origin("teacher"))
    text = (folder / "README.md").read_text()
    assert "full attention in every layer" in text and "0 of 4 with M-MATE" in text
    assert not [word for word in ("distillation", "windows", "constant size", "linear-attention") if word in text]


def test_names_of_files_are_those_of_a_distillation():
    names = ("CARD", "LOG", "CURVES", "ERROR_MAP")
    assert [getattr(model_card, name) for name in names] == [getattr(folders, name) for name in names]


def test_the_example_runs_as_written(folder, tmp_path):
    """In the folder, by somebody who has linmu-hf installed and has not imported it."""
    write_model_card(folder, Origin(TEACHER, TEACHER))
    blocks = python_blocks((folder / "README.md").read_text())
    assert len(blocks) == 1 and "linmu_hf" not in blocks[0]
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", blocks[0]], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    question = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    inputs = processor(text=[prompt], images=[Image.new("RGB", (256, 256), "white")], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
    assert done.stdout == processor.decode(ids, skip_special_tokens=True) + "\n"


def test_the_example_of_an_uploaded_model_runs_as_written(hub, folder, tmp_path):
    """Downloaded from the Hub, through the user's own lines, on a machine that knows nothing of the model."""
    write_model_card(folder, Origin(TEACHER, TEACHER))
    push_folder(folder, "org/linmu-qwen")
    card = hub.repos["org/linmu-qwen"].files()["README.md"].decode()
    assert 'model="."' in (folder / "README.md").read_text() and 'model="."' not in card
    (block,) = python_blocks(card)
    script = block + "\n".join(
        (
            "from transformers import AutoModel",
            'model = AutoModel.from_pretrained("org/linmu-qwen", trust_remote_code=True)',
            "print(type(model).__module__, type(model).__name__)",
        )
    )
    environment = os.environ | {
        "PYTHONPATH": str(SOURCE),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == "linmu_hf.modeling.modeling_linmu LinMUModel"


# ---- Retention


def test_retention_table(folder):
    write_model_card(folder, Origin(TEACHER, TEACHER))
    text = (folder / "README.md").read_text()
    once = add_retention(text, results(folder))
    assert "| cell | 99.0 | 97.0 | 98.0 [96.1, 99.0] |" in once and "| large | 0.0 | 0.0 | - |" in once
    assert "| **mean** | 49.5 | 48.5 | 91.4 [90.3, 92.6] |" in once and "on 1,200 rows (split `test`)" in once
    assert "/somewhere" not in once
    assert once.index("## Retention") < once.index("## Limits")
    assert add_retention(once, results(folder)) == once
    assert once.replace(once[once.index("## Retention") : once.index("## Limits")], "") == text
    assert add_retention("# Mine\n", results(folder)).startswith("# Mine\n\n## Retention\n")


def test_retention_of_one_model_among_several(folder, tmp_path):
    other = json.loads(json.dumps(results(folder)["models"]["student"])) | {"path": str(tmp_path / "other")}
    several = results(folder, other=other)
    assert "97.0" in add_retention("", several, str(folder))
    with pytest.raises(ValueError, match="2 models that could be this one"):
        add_retention("", several)
    with pytest.raises(ValueError, match="0 models that could be this one"):
        add_retention("", several, str(tmp_path / "third"))
    alone = results(folder)
    del alone["models"]["student"]["retention"]  # linmu-eval without --teacher
    with pytest.raises(ValueError, match="0 models"):
        add_retention("", alone)


def test_command_writes_retention_into_the_card(hub, folder, tmp_path):
    write_model_card(folder, Origin(TEACHER, TEACHER))
    file = tmp_path / "retention.json"
    file.write_text(json.dumps(results(folder)))
    assert main([str(folder), "org/model", "--retention", str(file)]) == 0
    assert "91.4 [90.3, 92.6]" in hub.repos["org/model"].files()["README.md"].decode()
    assert "91.4 [90.3, 92.6]" in (folder / "README.md").read_text()
    assert not (folder / ".eval_results").exists()  # the Hub knows no folder of this machine


def test_results_are_uploaded_as_the_hub_reads_them(hub, folder, tmp_path):
    file = tmp_path / "retention.json"
    file.write_text(json.dumps(results(folder) | {"dataset": "org/data"}))
    assert main([str(folder), "org/model", "--retention", str(file)]) == 0
    uploaded = hub.repos["org/model"].files()[".eval_results/org--data.yaml"]
    entries = parse_eval_result_entries(yaml.safe_load(uploaded))
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in entries] == [
        ("org/data", "cell", 97.0), ("org/data", "large", 0.0)
    ]  # fmt: skip


def test_no_relation_to_the_base_is_invented(folder):
    write_model_card(folder, Origin(TEACHER, TEACHER), dataset="org/data")
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert (data["base_model"], data["datasets"]) == (TEACHER, ["org/data"]) and "base_model_relation" not in data


# ---- Origin


def card(folder, **metadata):
    folder.mkdir(exist_ok=True)
    lines = "".join(f"{key}: {value}\n" for key, value in metadata.items())
    (folder / "README.md").write_text(f"---\n{lines}---\n# Card\n")


def test_origin_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(model_card, "hf_hub_download", lambda repo, name, revision: str(tmp_path / revision / name))
    card(tmp_path / "v2", license="other", license_name="qwen-research", license_link="LICENSE")
    assert find_origin(TEACHER, "v2") == Origin(TEACHER, TEACHER, RESEARCH)
    assert find_origin(TEACHER, "v3") == Origin(TEACHER, TEACHER, {})


def test_origin_in_a_folder(tmp_path):
    """A folder is named without its path; its license is its own card's or configuration's."""
    teacher = tmp_path / "teacher"
    card(teacher, license="apache-2.0", base_model="somebody/else")
    assert find_origin(teacher) == Origin("teacher", None, {"license": "apache-2.0"})
    (teacher / "README.md").unlink()
    assert find_origin(teacher) == Origin("teacher", None, {})
    (teacher / "config.json").write_text('{"license": "mit"}')
    assert find_origin(teacher) == Origin("teacher", None, {"license": "mit"})


def test_origin_from_the_student(tmp_path):
    """A teacher in a folder has no name on the Hub; the student that was converted from it may know it."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    card(student, license="mit", base_model=TEACHER)
    teacher.mkdir()
    assert find_origin(teacher, student=student) == Origin(TEACHER, TEACHER, {"license": "mit"})


def test_a_card_that_is_no_card_stops_nothing(tmp_path):
    card(tmp_path / "teacher", license="[unclosed")
    assert find_origin(tmp_path / "teacher") == Origin("teacher", None, {})


def test_a_card_without_metadata_is_no_cause_for_warnings(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    (tmp_path / "README.md").write_text("# A teacher\n")
    assert find_origin(tmp_path).license == {}
    assert not caplog.records
