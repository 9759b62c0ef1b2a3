"""All-`full_attention` LinMU is the teacher: the proof that everything around the mixer is right."""

import json

import pytest
import torch
from synthetic import ask, image, make_teacher, say
from transformers import Qwen2_5_VLForConditionalGeneration

from linmu_hf.conversion.teacher import load_teacher
from linmu_hf.data import encode_prompts, encode_rows


TEXT = {"messages": [ask("which digit?"), say("7")]}
IMAGE = {"messages": [ask("which digit?", images=1), say("7")], "images": [image(24, 40)]}
IMAGES = {
    "messages": [ask("row?", images=2), say("three"), ask("and this one?", images=1), say("four")],
    "images": [image(24, 40), image(8, 56, 1), image(32, 16, 2)],
}
VIDEO = {
    "messages": [ask("what came first?", videos=1), say("8")],
    "videos": [[image(16, 24, seed) for seed in range(5)]],
}
MIXED = {**IMAGES, "messages": [ask("compare", images=3, videos=1), say("no")], "videos": VIDEO["videos"]}
BATCHES = {
    "text": [TEXT],
    "one image": [IMAGE],
    "several images": [IMAGES],
    "video": [VIDEO],
    "image and video": [MIXED],
    "padded batch": [TEXT, IMAGES, VIDEO, IMAGE, MIXED],
}


@pytest.fixture(scope="module", params=["hub names, tied", "memory names, untied, one file"])
def pair(request, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    hub = request.param.startswith("hub")
    theirs = make_teacher(folder, processor=processor, tie=hub, hub_names=hub, shard="60KB" if hub else None)
    return theirs, load_teacher(folder)


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_logits_equal_the_teachers(pair, processor, rows):
    theirs, ours = pair
    batch = encode_rows(processor, rows)
    with torch.no_grad():
        expected, actual = theirs(**batch), ours(**batch)
    real = batch["attention_mask"].bool()
    assert expected.logits[real].std() > 0.1  # the comparison would see a difference
    torch.testing.assert_close(actual.logits[real], expected.logits[real], atol=1e-4, rtol=0)
    torch.testing.assert_close(actual.loss, expected.loss, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_greedy_tokens_equal_the_teachers(pair, processor, rows):
    theirs, ours = pair
    batch = encode_prompts(processor, rows)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
    assert torch.equal(ours.generate(**batch, **options), theirs.generate(**batch, **options))


def test_flat_configuration_as_on_the_hub(processor, tmp_path):
    """The published checkpoints keep the decoder's fields at the top level of config.json, tying included."""
    make_teacher(tmp_path, processor=processor, tie=True)
    config = json.loads((tmp_path / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for name in ("model_type", "layer_types", "dtype"):
        text.pop(name, None)
    config |= text | {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "sliding_window": 32768,
        "use_sliding_window": False,
        "torch_dtype": config.pop("dtype"),
        "tie_word_embeddings": True,
    }
    config["vision_config"].pop("model_type")
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = encode_rows(processor, [IMAGES, VIDEO])
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected, actual = theirs(**batch).logits[real], load_teacher(tmp_path)(**batch).logits[real]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_teacher_is_frozen(pair):
    _, ours = pair
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert set(ours.config.text_config.layer_types) == {"full_attention"}


def test_dtype(processor, tmp_path):
    make_teacher(tmp_path, processor=processor)
    model = load_teacher(tmp_path, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    rotary = load_teacher(tmp_path).model.language_model.rotary_emb.inv_freq
    torch.testing.assert_close(model.model.language_model.rotary_emb.inv_freq, rotary, rtol=0, atol=0)
