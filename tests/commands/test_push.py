"""`linmu-convert --push_to_hub` and `linmu-distill --push_to_hub`: from a teacher to a model on the Hub."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Picture
from transformers import Qwen2_5_VLForConditionalGeneration

from linmu_hf.commands import chat, push
from linmu_hf.commands import convert as conversion
from linmu_hf.commands import distill as distillation
from linmu_hf.commands import evaluate as evaluation
from linmu_hf.conversion import source
from linmu_hf.distillation import DistillConfig, DistillTrainer, distill
from linmu_hf.hub import check_folder
from linmu_hf.testbed.processor import build_processor
from linmu_hf.testbed.qwen2_5_vl import teacher_config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands") / "teacher"
    torch.manual_seed(0)
    processor = build_processor()
    Qwen2_5_VLForConditionalGeneration(teacher_config(processor.tokenizer)).save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Teacher\n")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    random = np.random.default_rng(0)
    part = {"type": Value("string"), "text": Value("string")}
    features = Features({"messages": List({"role": Value("string"), "content": List(part)}), "images": List(Image())})
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"row {i}?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": str(i)}]},
            ],
            "images": [Picture.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))],
        }
        for i in range(4)
    ]
    folder = tmp_path_factory.mktemp("commands") / "data"
    DatasetDict({"train": Dataset.from_list(rows, features=features)}).save_to_disk(folder)
    return folder


def test_each_command_names_the_extra_of_the_processor(teacher, data, saved, tmp_path, monkeypatch, capsys):
    def unavailable(*args, **kwargs):
        raise ImportError("\nQwen2VLVideoProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr(source.AutoProcessor, "from_pretrained", unavailable)
    monkeypatch.setattr(source, "is_torchvision_available", lambda: False)
    out, student = str(tmp_path / "out"), str(saved)
    for main, arguments in {
        conversion.main: ["--teacher", str(teacher), "--output_dir", out, "--calibrate", str(data)],
        distillation.main: [
            "--model",
            student,
            "--teacher",
            str(teacher),
            "--dataset",
            str(data),
            "--output_dir",
            out,
        ],
        evaluation.main: ["--model", student, "--dataset", str(data), "--split", "train"],
        chat.main: ["--model", student, "?"],
        push.main: [student, "org/model"],
    }.items():
        try:
            code = main(arguments)
        except SystemExit as exit:
            code = exit.code
        error = code if isinstance(code, str) else capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("linmu-") and error.endswith('needs torchvision: pip install "linmu-hf[video]"'), error
    assert not (tmp_path / "out").exists()


# ---- linmu-convert


def convert(teacher, output, *more):
    return conversion.main(["--teacher", str(teacher), "--output_dir", str(output), *more])


def test_conversion_leaves_a_folder_that_may_be_pushed(teacher, tmp_path):
    assert convert(teacher, tmp_path / "out") == 0
    check_folder(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card and "# teacher as LinMU" in card and "needs distillation" in card
    assert str(tmp_path) not in card and str(teacher.parent) not in card


def test_convert_and_push(hub, teacher, tmp_path, capsys):
    flags = [
        "--push_to_hub",
        "org/model",
        "--hub_private_repo",
        "--hub_revision",
        "init",
        "--json",
        str(tmp_path / "r.json"),
    ]
    assert convert(teacher, tmp_path / "out", *flags) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith(f"{hub.url}/org/model/commit/")
    repo = hub.repos["org/model"]
    files = repo.files("init")
    assert repo.private and files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert "conversion_command.json" not in files and "linmu_remote_code.py" in files
    report = (tmp_path / "r.json").read_text()
    assert convert(teacher, tmp_path / "out", *flags) == 0  # again: nothing to do
    assert len(repo.branches["init"]) == 2 and (tmp_path / "r.json").read_text() == report


@pytest.mark.parametrize("fault", [500, "cut"])
def test_the_same_command_takes_up_a_failed_upload(hub, teacher, tmp_path, capsys, monkeypatch, fault):
    flags = ["--push_to_hub", "org/model"]
    hub.breaks["POST .*/commit/"] = [fault]
    assert convert(teacher, tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("linmu-convert: error: the upload to org/model failed") and "push it again" in error
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    uploads = len(hub.uploads())
    assert convert(teacher, tmp_path / "out", *flags) == 0
    assert "was converted before, by the same command" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before and len(hub.uploads()) == uploads
    assert "model.safetensors" in hub.repos["org/model"].files()
    # another conversion is not the one that is there
    assert convert(teacher, tmp_path / "out", *flags, "--gate", "channel") == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_convert_flags_that_make_no_sense(hub, teacher, tmp_path, capsys):
    for flags, message in (
        (["--hub_private_repo"], "--hub_private_repo and --hub_revision are for --push_to_hub"),
        (["--hub_revision", "v2"], "--hub_private_repo and --hub_revision are for --push_to_hub"),
        (["--push_to_hub", "org/model", "--dry_run"], "--dry_run writes nothing"),
        (["--push_to_hub", "forbidden/model"], "cannot push to forbidden/model"),
    ):
        assert convert(teacher, tmp_path / "out", *flags) == 2
        assert message in capsys.readouterr().err
    assert convert(tmp_path / "nowhere", tmp_path / "out", "--push_to_hub", "org/model") == 2
    assert not hub.repos and not list(tmp_path.iterdir())  # a typing error leaves no repository behind


# ---- linmu-distill


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands") / "init"
    assert convert(teacher, folder) == 0
    return folder


def distil(student, teacher, data, out, *more):
    values = {
        "model": student, "teacher": teacher, "dataset": data, "output_dir": out,
        "stage_overrides": "all.max_steps=1 stage-3.max_steps=0",
        "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True, "report_to": "none",
    }  # fmt: skip
    flags = [part for name, value in values.items() for part in (f"--{name}", *str(value).split())]
    return distillation.main([*flags, *more])


def test_distil_and_push(hub, student, teacher, data, tmp_path, capsys):
    out = tmp_path / "linmu-model"
    flags = ["--push_to_hub", "True", "--hub_private_repo", "True", "--hub_revision", "v1"]
    hub.breaks["POST .*/commit/"] = ["cut"]
    assert distil(student, teacher, data, out, *flags) == 2
    assert "linmu-distill: error: the upload to tester/linmu-model failed" in capsys.readouterr().err
    assert set(hub.repos["tester/linmu-model"].files("v1")) == {".gitattributes"}

    assert distil(student, teacher, data, out, *flags) == 0  # again: the stages are finished
    repo = hub.repos["tester/linmu-model"]
    files = repo.files("v1")
    assert repo.private and len(repo.branches["v1"]) == 2
    for name in ("model.safetensors", "config.json", "loss_curves.png", "training_log.jsonl", "tokenizer.json"):
        assert files[name] == (out / name).read_bytes(), name
    assert not {"distillation.json", "pseudo_targets.jsonl"} & set(files) and not any("/" in name for name in files)
    for folder, stages in ((out, 2), (out / "stage-1", 1), (out / "stage-2", 2)):
        check_folder(folder)
        card = (folder / "README.md").read_text()
        assert card.count("\n| stage-") == stages and "license: mit" in card and "(loss_curves.png)" in card
        assert (folder / "loss_curves.png").stat().st_size > 1000
        assert str(tmp_path) not in card
    logged = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    last = [row for row in logged if row["stage"] == "stage-2" and "loss_tok" in row][-1]
    assert f"{last['loss_tok']:.4g}" in (out / "README.md").read_text()

    # an edited card stays and goes up
    (out / "README.md").write_text((out / "README.md").read_text() + "\nMine.\n")
    assert distil(student, teacher, data, out, *flags) == 0
    assert files != repo.files("v1") and repo.files("v1")["README.md"].decode().endswith("\nMine.\n")


def test_distil_refuses_before_work(hub, student, teacher, data, tmp_path, capsys):
    for flags, message in (
        (["--hub_strategy", "every_save"], "hub_strategy='every_save' would upload checkpoints"),
        (["--hub_model_id", "forbidden/model"], "cannot push to forbidden/model"),
    ):
        assert distil(student, teacher, data, tmp_path / "out", "--push_to_hub", "True", *flags) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    config = DistillConfig(output_dir=str(tmp_path / "out"), push_to_hub=True, use_cpu=True, report_to="none")
    for upload_nothing in (distill, lambda config, *rest: DistillTrainer(None, None, config, *rest[:2])):
        with pytest.raises(ValueError, match="this only trains"):
            upload_nothing(config, None, None, None, None)
    assert not hub.uploads()


def test_starting_anew_writes_a_new_card(student, teacher, data, tmp_path):
    out = tmp_path / "out"
    assert distil(student, teacher, data, out) == 0
    (out / "README.md").write_text("old")
    shutil.rmtree(out / "stage-2")
    assert distil(student, teacher, data, out, "--overwrite_output_dir", "True", "--seed", "7") == 0
    assert (out / "README.md").read_text() == (out / "stage-2" / "README.md").read_text() != "old"
