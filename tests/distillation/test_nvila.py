"""The whole way with an NVILA teacher: its released layout to a calibrated student to a distilled model."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from synthetic import rewrite
from synthetic_nvila import KINDS, make_nvila, make_tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor

from linmu_hf.commands.convert import main as convert
from linmu_hf.commands.distill import main as distill
from linmu_hf.commands.evaluate import main as evaluate
from linmu_hf.conversion.teacher import load_processor, load_teacher
from linmu_hf.data import encode_prompts
from linmu_hf.distillation.model import DistillationModel
from linmu_hf.distillation.rows.collator import DistillCollator, EncodedDataset
from linmu_hf.distillation.stages import Stage
from linmu_hf.distillation.targets.decode import decode_rows
from linmu_hf.distillation.teacher import SeparateTeacher
from linmu_hf.hub import check_folder


PART = {"type": Value("string"), "text": Value("string")}
FEATURES = Features(
    {
        "messages": List({"role": Value("string"), "content": List(PART)}),
        "images": List(Image()),
        "videos": List(List(Image())),
    }
)


@pytest.fixture(scope="module")
def data(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("nvila") / "data"
    dataset = Dataset.from_list(rows, features=FEATURES)
    DatasetDict({"train": dataset, "test": dataset}).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_convert_distil_evaluate(kind, data, rows, tmp_path, capsys):
    teacher, student, out = tmp_path / "teacher", tmp_path / "student", tmp_path / "out"
    make_nvila(teacher, "nvila" if kind == "lite" else "llava_llama", kind)
    report = tmp_path / "report.json"
    flags = ["--teacher", str(teacher), "--output_dir", str(student), "--json", str(report)]
    assert convert([*flags, "--calibrate", str(data), "--calibrate_samples", "6", "--keep_attention", "1"]) == 0
    calibration = json.loads(report.read_text())["calibration"]
    assert calibration["path_after"] < calibration["path_before"]

    flags = ["--teacher", str(teacher), "--dataset", str(data), "--output_dir", str(out)]
    assert distill(["--model", str(teacher), *flags]) == 2
    assert "is no LinMU model: make one of it with `linmu-convert` first" in capsys.readouterr().err
    flags += ["--model", str(student)]
    flags += ["--recipe", "default", "--stage_overrides", "all.max_steps=2", "--per_device_train_batch_size", "2"]
    flags += ["--max_completion_length", "3", "--use_cpu", "True", "--disable_tqdm", "True", "--json", str(report)]
    assert distill(flags) == 0, capsys.readouterr().err
    stages = json.loads(report.read_text())["stages"]
    assert list(stages) == ["stage-1-align", "stage-1", "stage-2", "stage-3"]
    assert all(np.isfinite(figures["train_loss"]) for figures in stages.values())
    assert "loss_hid" in stages["stage-1"] and "loss_tok" in stages["stage-2"] and "loss_seq" in stages["stage-3"]

    check_folder(out)
    model, processor = AutoModelForImageTextToText.from_pretrained(out), AutoProcessor.from_pretrained(out)
    first = AutoModelForImageTextToText.from_pretrained(student).state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, first[name])}
    assert changed and all(".layers." in name and "visual" not in name for name in changed)
    prompts = encode_prompts(processor, rows[:4])
    assert model.generate(**prompts, max_new_tokens=3).shape[1] > prompts["input_ids"].shape[1]

    flags = ["--model", str(out), "--teacher", str(teacher), "--dataset", str(data), "--device", "cpu"]
    evaluate([*flags, "--max_new_tokens", "3", "--json", str(report)])
    assert set(json.loads(report.read_text())["models"]) == {"teacher", "out"}


def test_a_teacher_reads_the_students_vision_features(tmp_path, rows):
    """NVILA's images and clips are encoded once; what the teacher makes of them is what it makes of pixels."""
    make_nvila(tmp_path / "teacher", kind="lite")
    teacher, processor = load_teacher(tmp_path / "teacher"), load_processor(tmp_path / "teacher")
    dataset = EncodedDataset(processor, rows)
    batch = DistillCollator(processor.tokenizer.pad_token_id)([dataset[i] for i in range(4)])
    model = DistillationModel(
        teacher,
        SeparateTeacher(teacher, shares_vision=True),
        Stage("s", trains=(".",), max_steps=1, learning_rate=1.0, tok=1.0),
    )
    with torch.no_grad():
        given, _ = model._read({key: value for key, value in batch.items() if key != "labels"})
        teacher.model.visual = None
        shared = model.teacher(given)
    teacher = load_teacher(tmp_path / "teacher")
    batch.pop("labels")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(shared[real], teacher.model(**batch, use_cache=False).last_hidden_state[real])


def test_teacher_never_answers_with_an_untrained_token(tmp_path, rows):
    make_nvila(tmp_path / "teacher", new_rows=3, shard=None)
    n = len(make_tokenizer())

    def shout(tensors):
        head = tensors["lm_head.weight"].clone()
        head[n] *= 1000
        head[n + 1] = -head[n]
        return tensors | {"lm_head.weight": head}

    rewrite(tmp_path / "teacher" / "llm" / "model.safetensors", shout)
    teacher, processor = load_teacher(tmp_path / "teacher"), load_processor(tmp_path / "teacher")
    assert teacher.generation_config.suppress_tokens == [n, n + 1, n + 2]

    def said():
        decoded = decode_rows(teacher, processor, dict(enumerate(rows[:2])), max_new_tokens=4)
        return {token for answers, _ in decoded for answer in answers for token in answer.ids}

    assert not said() & {n, n + 1, n + 2}
    teacher.generation_config.suppress_tokens = None
    assert said() & {n, n + 1}
