"""The processor and chat template, and the fast encoding that must equal them."""

import pytest
import torch
from transformers import Qwen2_5_VLProcessor

from linmu_hf.conversion.teacher import load_processor
from linmu_hf.data import encode_rows
from linmu_hf.testbed import nvila
from linmu_hf.testbed.check_teacher import TEACHERS
from linmu_hf.testbed.data import evaluation_rows, evaluation_scenes, to_row, training_scenes
from linmu_hf.testbed.encoding import encode
from linmu_hf.testbed.processor import build_processor


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def nvila_processor():
    return nvila.build_processor()


@pytest.fixture(scope="module")
def scenes():
    """Two training scenes of each kind with their conversations."""
    drawn = {"mosaic": [], "large": [], "clip": []}
    for scene, turns in training_scenes(0, 60):
        if len(drawn[scene.kind]) < 2:
            drawn[scene.kind].append((scene, turns))
    return drawn


@pytest.mark.parametrize("kind", ["mosaic", "large", "clip"])
def test_fast_encoding_equals_the_processor(processor, scenes, kind):
    fast = encode(processor, scenes[kind])
    slow = encode_rows(processor, [to_row(scene, turns, kind) for scene, turns in scenes[kind]])
    assert set(fast) == set(slow) - {"second_per_grid_ts"} | ({"second_per_grid_ts"} if kind == "clip" else set())
    for name, value in fast.items():
        assert torch.equal(value, torch.as_tensor(slow[name])), name


@pytest.mark.parametrize("kind", ["mosaic", "large", "clip"])
def test_fast_encoding_equals_nvilas_processor(nvila_processor, scenes, kind):
    fast = encode(nvila_processor, scenes[kind])
    slow = encode_rows(nvila_processor, [to_row(scene, turns, kind) for scene, turns in scenes[kind]])
    assert set(fast) == set(slow)
    for name, value in fast.items():
        assert torch.equal(value, torch.as_tensor(slow[name])), name


def test_nvila_gives_every_cell_and_moment_its_tokens(nvila_processor, scenes):
    for kind in ("mosaic", "large"):
        encoded = encode(nvila_processor, scenes[kind])
        assert encoded["pixel_values"].shape == (2 * (1 + 4), 3, nvila.TILE, nvila.TILE)
        assert encoded["image_grid_thw"].tolist() == [[1, 8, 8]] * 2
    scene, turns = scenes["clip"][0]
    moments = scene.grid[0]
    encoded = encode(nvila_processor, [(scene, turns)])
    assert encoded["video_grid_thw"].tolist() == [[moments, 4, 4]]
    assert int((encoded["input_ids"] == nvila_processor.video_token_id).sum()) == moments * 16


def test_the_mask_covers_the_answers_and_their_end(processor, scenes):
    scene, turns = scenes["mosaic"][0]
    row = to_row(scene, turns, "mosaic")
    row["messages"][0]["content"][0]["image"] = row["images"][0]
    encoded = processor.apply_chat_template(
        [row["messages"]], tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    trained = encoded["input_ids"][0][torch.as_tensor(encoded["assistant_masks"])[0].bool()]
    assert processor.decode(trained) == "".join(f"{answer}<|im_end|>" for _, answer in turns)


def test_vision_tokens_and_positions(processor, scenes):
    scene, turns = scenes["clip"][0]
    encoded = encode(processor, [(scene, turns)])
    moments, rows, columns = scene.grid
    assert encoded["video_grid_thw"].tolist() == [[moments, 2 * rows, 2 * columns]]
    assert int((encoded["input_ids"] == processor.video_token_id).sum()) == moments * rows * columns
    assert encoded["second_per_grid_ts"].tolist() == [1.0]
    assert sorted(encoded["mm_token_type_ids"].unique().tolist()) == [0, 2]


@pytest.mark.parametrize("task", ["large", "when"])
def test_the_biggest_scenes_have_at_least_64_vision_tokens(task):
    scene, _ = next(evaluation_scenes(task, 1))
    assert scene.digits.size >= 64


def test_every_digit_is_one_token_wherever_it_stands(processor):
    tokenizer = processor.tokenizer
    for digit in "0123456789":
        (token,) = tokenizer(digit)["input_ids"]
        assert token in tokenizer(f"row {digit} column 1?")["input_ids"]
    text = "Déjà vu, naïve façade: 12 € \n\t日本"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_shipped_processor_is_the_one_the_code_builds(processor, nvila_processor, teacher):
    processor, shipped = nvila_processor if teacher == "nvila" else processor, load_processor(TEACHERS[teacher])
    assert shipped.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    for task in ("large", "when"):
        row = next(evaluation_rows(task, 1))
        ours, theirs = encode_rows(processor, [row]), encode_rows(shipped, [row])
        for name in ours:
            assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])), name


def test_the_processor_survives_saving(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = Qwen2_5_VLProcessor.from_pretrained(tmp_path)
    scene, turn = next(evaluation_scenes("first", 1))
    before, after = (encode_rows(p, [to_row(scene, [turn], "first")]) for p in (processor, loaded))
    for name in before:
        assert torch.equal(torch.as_tensor(before[name]), torch.as_tensor(after[name])), name
