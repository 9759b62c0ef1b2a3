"""The shipped teachers: small, right on held-out digits; how they are trained, and the data set made for them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from linmu_hf.testbed import nvila
from linmu_hf.testbed.check_teacher import TEACHER, TEACHERS, count_right, load
from linmu_hf.testbed.curriculum import CanvasCurriculum, Curriculum
from linmu_hf.testbed.data import FULL_SIZES, QUESTIONS_PER_ROW, TASKS, compose, evaluation_rows
from linmu_hf.testbed.make_data import make_data, write_examples
from linmu_hf.testbed.train_teacher import answer_loss, batches
from linmu_hf.testbed.train_vision import main as train_vision
from linmu_hf.testbed.train_vision import token_targets


@pytest.fixture(scope="module")
def teacher():
    return AutoModelForImageTextToText.from_pretrained(TEACHER).eval(), AutoProcessor.from_pretrained(TEACHER)


@pytest.fixture(scope="module")
def nvila_teacher():
    return load(TEACHERS["nvila"])


def test_the_teacher_is_plain_and_small():
    program = (
        "import sys, transformers;"
        f"model = transformers.AutoModelForImageTextToText.from_pretrained({str(TEACHER)!r});"
        "assert type(model) is transformers.Qwen2_5_VLForConditionalGeneration;"
        "assert not any(name.startswith('linmu_hf') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert sum(file.stat().st_size for file in TEACHER.iterdir()) <= 8e6
    log = [json.loads(line) for line in (TEACHER / "training_log.jsonl").read_text().splitlines()]
    assert "accuracy" in log[-1]


def test_the_nvila_teacher_has_nvilas_folders_and_is_small():
    folder = TEACHERS["nvila"]
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlavaLlamaModel"]
    for part in ("llm", "vision_tower", "mm_projector"):
        assert (folder / part / "config.json").is_file() and (folder / part / "model.safetensors").is_file()
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 6e6
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    assert "accuracy" in log[-1]


@pytest.mark.parametrize("name", ["teacher", "nvila_teacher"])
def test_the_teacher_answers_questions_about_held_out_digits(name, request):
    rows = [row for task in TASKS for row in evaluation_rows(task, 10, seed=7)]
    assert count_right(*request.getfixturevalue(name), rows, batch_size=20) >= 0.9 * len(rows)


@pytest.mark.parametrize(
    "name, curriculum",
    [("teacher", Curriculum()), ("nvila_teacher", Curriculum()), ("nvila_teacher", CanvasCurriculum())],
)
def test_training_loss_equals_the_models_own(name, curriculum, request):
    model, processor = request.getfixturevalue(name)
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration) == (name == "teacher")
    for batch in next(batches(processor, seed=0, batch_size=6, curriculum=curriculum)):
        with torch.no_grad():
            tokens = (batch["labels"][:, 1:] != -100).sum()
            torch.testing.assert_close(answer_loss(model, batch) / tokens, model(**batch).loss, rtol=1e-4, atol=1e-5)


def test_an_nvila_checkpoint_gives_back_the_model_and_its_processor(tmp_path):
    processor = nvila.build_processor()
    model = nvila.build_model(processor).eval()
    nvila.save_checkpoint(model, processor, tmp_path)
    loaded = nvila.load_model(tmp_path)
    for name in ("projector_type", "feature_layer", "s2_scales", "max_tiles", "video_encoder", "pool_sizes"):
        assert getattr(loaded.config.vision_config, name) == getattr(model.config.vision_config, name)
    state = loaded.state_dict()
    assert set(state) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_the_nvila_decoder_starts_from_qwens(teacher):
    processor = nvila.build_processor()
    model = nvila.build_model(processor)
    nvila.start_decoder_from_qwen(model, processor, TEACHER)
    qwen, qwen_processor = teacher
    ours, theirs = (p.tokenizer.convert_tokens_to_ids("<|im_start|>") for p in (processor, qwen_processor))
    assert ours != theirs
    assert torch.equal(model.get_input_embeddings().weight[ours], qwen.get_input_embeddings().weight[theirs])
    key = model.model.language_model.layers[3].mixer.k_proj.weight
    assert torch.equal(key, qwen.model.language_model.layers[3].self_attn.k_proj.weight)


def test_vision_tokens_learn_the_cell_at_their_centre():
    scene = compose(np.random.default_rng(0), "mosaic", "train", (1, 4, 4), filled=10)
    targets = token_targets(scene, 8, 8)
    assert targets["row"][0, :, 0].tolist() == targets["column"][0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    digits = np.where(scene.digits < 0, 10, scene.digits)
    assert np.array_equal(targets["digit"], digits.repeat(2, 1).repeat(2, 2))
    clip = compose(np.random.default_rng(0), "clip", "train", (2, 3, 3))
    assert token_targets(clip, 4, 4)["row"][1, :, 2].tolist() == [0, 1, 1, 2]


def test_the_vision_side_is_trained_before_the_decoder(tmp_path, monkeypatch):
    options = ["--output", str(tmp_path), "--steps", "2", "--batch_size", "6", "--log_every", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["train_vision", *options])
    train_vision()
    log = [json.loads(line) for line in (tmp_path / "vision_log.jsonl").read_text().splitlines()]
    assert set(log[-1]["large"]) == {"digit", "row", "column"}
    model = nvila.load_model(tmp_path)
    qwen = AutoModelForImageTextToText.from_pretrained(TEACHER)
    norm = model.model.language_model.norm.weight
    assert torch.equal(norm, qwen.model.language_model.norm.weight) and norm.requires_grad


@pytest.mark.parametrize("kind, level, filled", [("large", 1, (1, 2)), ("large", 5, (16, 32)), ("mosaic", 3, (4, 8))])
def test_the_canvas_curriculum_fills_mosaics_of_the_full_size(kind, level, filled):
    for seed in range(5):
        drawn = CanvasCurriculum.draw(np.random.default_rng(seed), kind, level)
        assert drawn["grid"] == FULL_SIZES[kind] and filled[0] <= drawn["filled"] <= filled[1]
    full = {"large": 6, "mosaic": 4}[kind]
    assert CanvasCurriculum.draw(np.random.default_rng(0), kind, full) == {"grid": FULL_SIZES[kind]}


def test_the_data_set_has_its_splits_and_pictures(tmp_path):
    dataset = make_data(tmp_path / "data", train=6, test=2)
    assert {name: len(split) for name, split in dataset.items()} == {"train": 6, "test": 2 * len(TASKS)}
    assert all(len(row["messages"]) == 2 * QUESTIONS_PER_ROW for row in dataset["train"])
    assert dataset["test"]["task"][:] == [task for task in TASKS for _ in range(2)]
    assert dataset["test"][0]["images"][0].tobytes() == next(evaluation_rows("cell", 1))["images"][0].tobytes()
    write_examples(tmp_path / "examples")
    assert len(list((tmp_path / "examples").glob("*.png"))) == len(TASKS)
