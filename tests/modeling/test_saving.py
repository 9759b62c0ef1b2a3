"""Ordinary Transformers behaviour: saving, loading, Auto classes, missing weights."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor

from linmu_hf import LinMUConfig, LinMUForConditionalGeneration, LinMUModel, LinMUTextModel


INPUTS = tiny.batch(tiny.Sample(3, ("image", 3, 5), 2), dtype=torch.float32)
FP32 = ("A_log", "dt_bias", ".D")


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"output_norm": "layer_norm"}], ids=str)
def test_round_trip(options, tmp_path):
    model = tiny.plain(**options)
    model.save_pretrained(tmp_path)
    loaded, info = LinMUForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("lm_head.weight" in names) == ("tie_word_embeddings" not in options)
    assert {name.split(".")[0] for name in names} <= {"model", "lm_head"}
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(loaded(**INPUTS).logits, model(**INPUTS).logits, atol=1e-5, rtol=0)
    tied = loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    assert tied == ("tie_word_embeddings" in options)


@pytest.mark.parametrize("saved_as", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_keeps_decays_in_float32(saved_as, tmp_path):
    model = tiny.plain().to(saved_as)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith(FP32) else torch.bfloat16), name
    loaded.generate(**{k: v.bfloat16() if "pixel" in k else v for k, v in INPUTS.items()}, max_new_tokens=2)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(again[name], parameter) and again[name].dtype == parameter.dtype
    unchanged = {name: tensor for name, tensor in model.state_dict().items() if name.endswith(FP32)}
    for name, tensor in unchanged.items():
        assert torch.equal(again[name], tensor.float())


@torch.no_grad()
def test_auto_classes(tmp_path):
    model = tiny.plain()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "linmu"
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(whole) is LinMUForConditionalGeneration
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is LinMUModel
    logits = whole.lm_head(base(**INPUTS).last_hidden_state)
    torch.testing.assert_close(logits, model(**INPUTS).logits, atol=1e-5, rtol=0)
    assert type(AutoModel.from_config(tiny.text_config())) is LinMUTextModel
    assert PROCESSOR_MAPPING[LinMUConfig] is Qwen2_5_VLProcessor
    with pytest.raises(OSError):
        AutoProcessor.from_pretrained(tmp_path)  # no processor was saved: not "unrecognised model"


@torch.no_grad()
def test_missing_new_parameters_get_their_start(tmp_path):
    """A checkpoint with the teacher's weights alone loads with M-MATE's own parameters at their start."""
    model = tiny.plain(output_norm="layer_norm")
    model.save_pretrained(tmp_path)
    new = (
        "_features",
        "conv_weight",
        "A_log",
        "dt_bias",
        ".D",
        "dt_proj.weight",
        "gate_proj",
        "fusion_proj",
        "output_norm",
    )
    decoder = "language_model.layers"
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not (decoder in n and ".mixer." in n and any(p in n for p in new))}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = LinMUForConditionalGeneration.from_pretrained(tmp_path)
    for layer in model.model.language_model.layers:
        layer.mixer.reset_new_parameters()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@torch.no_grad()
def test_resized_embeddings():
    model = tiny.plain(tie_word_embeddings=True)
    model.resize_token_embeddings(80)
    assert model.lm_head.weight is model.get_input_embeddings().weight and len(model.lm_head.weight) == 80
    assert model(**INPUTS).logits.shape[-1] == 80


@torch.no_grad()
def test_logits_to_keep():
    model = tiny.plain()
    logits = model(**INPUTS).logits
    torch.testing.assert_close(model(**INPUTS, logits_to_keep=2).logits, logits[:, -2:])
    index = torch.tensor([3, 0, 7])
    torch.testing.assert_close(model(**INPUTS, logits_to_keep=index).logits, logits[:, index])


def test_bad_calls():
    model = tiny.plain().model.language_model
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 1, 3, 3\) is not \[batch, tokens\]"):
        model(input_ids=torch.tensor([[1, 2, 3]]), attention_mask=torch.ones(1, 1, 3, 3))
