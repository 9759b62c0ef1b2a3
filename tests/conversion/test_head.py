"""Whether the head is the embedding is for the checkpoint's tensors to say, as in Transformers, not for its config."""

import json

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from synthetic import ask, image, make_teacher, say
from synthetic_nvila import make_nvila
from transformers import Qwen2_5_VLForConditionalGeneration

from linmu_hf import LinMUForConditionalGeneration
from linmu_hf.conversion.convert import convert
from linmu_hf.conversion.teacher import load_processor, load_teacher
from linmu_hf.data.rows import encode_rows


FAMILIES = ("qwen2_5_vl", "nvila in parts", "nvila flat")


def make(root, family, shard, processor, change):
    """A tied teacher whose head and embedding go through `change` before they are written; returns the folder."""
    folder = root / "teacher"
    if family == "qwen2_5_vl":
        make_teacher(folder, tie=True, shard=None, processor=processor)
        weights, prefix = folder, ""
    else:
        make_nvila(folder, "llava_llama" if "parts" in family else "nvila", shard=None, tie=True)
        weights, prefix = (folder / "llm", "") if "parts" in family else (folder, "llm.")
    file = weights / "model.safetensors"
    tensors = load_file(file)
    assert f"{prefix}lm_head.weight" not in tensors
    embedding = tensors.pop(f"{prefix}model.embed_tokens.weight")
    names = {"head": f"{prefix}lm_head.weight", "embedding": f"{prefix}model.embed_tokens.weight"}
    tensors |= {names[which]: value.clone() for which, value in change(embedding).items()}
    file.unlink()
    save_torch_state_dict(tensors, weights, max_shard_size="60KB" if shard else "1GB")
    assert (weights / "model.safetensors.index.json").is_file() == shard
    return folder, embedding


def own(embedding):
    """A head whose first ten rows were trained apart."""
    return {"embedding": embedding, "head": torch.cat([embedding[:10].roll(1, 0), embedding[10:]])}


@pytest.mark.parametrize("shard", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_of_its_own_is_kept(tmp_path, processor, family, shard):
    folder, embedding = make(tmp_path, family, shard, processor, own)
    convert(str(folder), str(tmp_path / "student"), keep_attention=[1])
    student = LinMUForConditionalGeneration.from_pretrained(tmp_path / "student")
    for model in (load_teacher(folder), student):
        assert torch.equal(model.lm_head.weight, own(embedding)["head"])
        assert torch.equal(model.get_input_embeddings().weight, embedding)
        assert not model.config.tie_word_embeddings


@pytest.mark.parametrize(
    "change",
    [lambda e: {"embedding": e, "head": e}, lambda e: {"embedding": e}, lambda e: {"head": e}],
    ids=["equal", "embedding alone", "head alone"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_tensor_is_both(tmp_path, processor, family, change):
    folder, embedding = make(tmp_path, family, False, processor, change)
    convert(str(folder), str(tmp_path / "student"))
    student = LinMUForConditionalGeneration.from_pretrained(tmp_path / "student")
    for model in (load_teacher(folder), student):
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert torch.equal(model.lm_head.weight, embedding)
    assert "lm_head.weight" not in load_file(tmp_path / "student" / "model.safetensors")


@pytest.mark.parametrize("change", [own, lambda e: {"head": e}], ids=["own head", "head alone"])
def test_logits_are_those_of_transformers(tmp_path, processor, change):
    folder, _ = make(tmp_path, "qwen2_5_vl", True, processor, change)
    row = {"messages": [ask("which digit?", images=1), say("7")], "images": [image(24, 40)]}
    batch = encode_rows(load_processor(folder), [row])
    with torch.no_grad():
        theirs, ours = (model(**batch).logits for model in (hf(folder), load_teacher(folder)))
    assert torch.allclose(theirs, ours, atol=1e-5)


def hf(folder):
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder).eval()


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("settings", [(True, False), (False, True), (False, False), (None, None)])
def test_both_places_of_the_setting(tmp_path, processor, tie, settings):
    """`tie_word_embeddings` at the top and of the text: tied if either says so and the file does not object."""
    make_teacher(tmp_path, tie=tie, shard=None, processor=processor)
    config = json.loads((tmp_path / "config.json").read_text())
    for part, value in zip((config, config["text_config"]), settings):
        part["tie_word_embeddings"] = bool(value)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if tie and not any(settings):  # Transformers makes a random head here
        with pytest.raises(ValueError, match=r"'lm_head.weight' first: set tie_word_embeddings"):
            load_teacher(tmp_path)
        return
    assert torch.equal(load_teacher(tmp_path).lm_head.weight, hf(tmp_path).lm_head.weight)
