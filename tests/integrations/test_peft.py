"""LoRA by PEFT: no adapter is silent, the vision tower is left alone; checkpointing, saving, merging, generate."""

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForImageTextToText

from linmu_hf import LinMUForConditionalGeneration, lora_targets
from linmu_hf.modeling.adapters import LORA_PARTS


SAMPLES = tiny.Sample(3, ("image", 3, 5), 2, ("video", 3, 3, 2), 2), tiny.Sample(4)
INPUTS = tiny.batch(*SAMPLES, padding="left", dtype=torch.float32)
REAL = INPUTS["attention_mask"].bool()
HYBRID = {"layer_types": ["m_mate", "m_mate", "full_attention", "m_mate"]}
SCAN_LINEARS = ("b_proj", "c_proj", "dt_proj")
LINEARS = [
    *(f"mixer.flex_ma.{way}_scan.{name}" for way in ("forward", "reverse") for name in SCAN_LINEARS),
    *(f"mixer.flex_ma.{name}" for name in ("x_proj", "gate_proj", "o_proj")),
    *(f"mixer.local_swin.{name}_proj" for name in "qkvo"),
    "mixer.fusion_proj", "mixer.text_fusion_proj",
    *(f"mixer.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]  # fmt: skip


def adapted(model, targets, **options):
    """With adapters that are not zero, as after some training."""
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model):
    return model(**INPUTS).logits[REAL]


def loss(model):
    return model(**INPUTS, labels=INPUTS["input_ids"].masked_fill(~REAL, -100)).loss


def decoder_linears(model):
    return {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.count(".layers.") == 1
    }


def adapter_grads(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("linear", LINEARS)
def test_no_adapter_is_silent(linear):
    """Each kind of linear map alone: a kernel that reads a weight past its adapter fails here and nowhere else."""
    model = tiny.plain(**HYBRID)
    before = logits(model)
    places = [name for name in decoder_linears(model) if name.partition(".layers.")[2][2:] == linear]
    model = adapted(model, places)
    assert (logits(model) - before).abs().max() > 1e-3
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before)
    loss(model).backward()
    grads = adapter_grads(model)
    assert places and len(grads) == 2 * len(places)
    for name, grad in grads.items():
        assert grad is not None and grad.abs().max() > 1e-7, name


def test_every_linear_of_the_decoder_is_tested():
    names = {name.partition(".layers.")[2][2:] for name in decoder_linears(tiny.plain(**HYBRID))}
    assert names == set(LINEARS)


def targeted(model, *parts):
    config = LoraConfig(r=2, target_modules=lora_targets(*parts))
    return set(get_peft_model(model, config).targeted_module_names)


def test_targets():
    everything = decoder_linears(tiny.plain(**HYBRID))
    assert targeted(tiny.plain(**HYBRID), *LORA_PARTS) == everything
    gates = {name for name in everything if name.endswith(("dt_proj", "flex_ma.gate_proj", "fusion_proj"))}
    assert targeted(tiny.plain(**HYBRID)) == everything - gates
    assert targeted(tiny.plain(), "mlp") == {name for name in everything if ".mlp." in name}
    assert targeted(tiny.plain(**HYBRID), "attention") == {
        f"model.language_model.layers.2.mixer.{name}_proj" for name in "qkvo"
    }
    found = [targeted(tiny.plain(**HYBRID), part) for part in LORA_PARTS]
    assert sum(map(len, found)) == len(everything)  # parts do not overlap


def test_targets_of_the_models_inside():
    whole = targeted(tiny.plain())
    for inside, prefix in (
        (tiny.plain().model, "model."),
        (tiny.plain().model.language_model, "model.language_model."),
    ):
        assert {prefix + name for name in targeted(inside)} == whole


def test_an_unknown_part():
    with pytest.raises(ValueError, match=r"no parts \['ffn'\]; choose out of \['attention', .*'mlp'\]"):
        lora_targets("mlp", "ffn")


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_gradient_checkpointing(reentrant):
    results = []
    for checkpointing in (False, True):
        model = tiny.plain(**HYBRID).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model = adapted(model, lora_targets(*LORA_PARTS)).train()
        assert model.is_activation_checkpointing == checkpointing
        value = loss(model)
        value.backward()
        results.append((value.detach(), adapter_grads(model)))
    assert all(grad.abs().max() > 0 for grad in results[1][1].values())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_generate_and_merge():
    model, base = adapted(tiny.plain(**HYBRID), lora_targets(*LORA_PARTS)), tiny.plain(**HYBRID)
    expected = logits(model)
    tokens = model.generate(**INPUTS, max_new_tokens=6)
    assert not torch.equal(tokens, base.generate(**INPUTS, max_new_tokens=6))
    step = model(**INPUTS, use_cache=True)
    nxt = torch.full((len(SAMPLES), 1), 7)
    decoded = model(nxt, past_key_values=step.past_key_values).logits
    merged = model.merge_and_unload()
    assert type(merged) is LinMUForConditionalGeneration and not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(merged.generate(**INPUTS, max_new_tokens=6), tokens)
    step = merged(**INPUTS, use_cache=True)
    torch.testing.assert_close(merged(nxt, past_key_values=step.past_key_values).logits, decoded, rtol=1e-3, atol=1e-4)


def test_save_load_merge(tmp_path):
    tiny.plain().save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), lora_targets())
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} >= {"adapter_model.safetensors"}
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    by_auto = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter")  # finds its base by the adapter's note
    torch.testing.assert_close(logits(by_auto), expected, rtol=1e-5, atol=1e-5)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)


def test_whole_blocks_train_beside_lora_and_are_saved(tmp_path):
    """`modules_to_save` is the way: parameters unfrozen by hand after `get_peft_model` train, but are not saved."""
    model = adapted(tiny.plain(), lora_targets("mlp"), modules_to_save=["mixer"])
    loss(model).backward()
    block = model.base_model.model.model.language_model.layers[0].mixer
    trained = dict(block.modules_to_save["default"].named_parameters())
    assert "flex_ma.forward_scan.A_log" in trained and "flex_ma.forward_scan.conv_weight" in trained
    with torch.no_grad():
        for name, parameter in trained.items():
            assert parameter.requires_grad and parameter.grad is not None and parameter.grad.any(), name
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.plain(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded), logits(tiny.plain()))
    merged = loaded.merge_and_unload()
    assert (
        type(merged) is LinMUForConditionalGeneration
        and merged.state_dict().keys() == tiny.plain().state_dict().keys()
    )
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)


def test_lora_on_a_model_in_bfloat16():
    model = adapted(tiny.plain().bfloat16(), lora_targets(*LORA_PARTS)).train()
    dtypes = {name.rpartition(".")[2]: p.dtype for name, p in model.named_parameters() if "language_model" in name}
    assert dtypes["A_log"] == dtypes["dt_bias"] == dtypes["D"] == torch.float32 and dtypes["bias"] == torch.bfloat16
    pixels = {name: value.bfloat16() if "pixel" in name else value for name, value in INPUTS.items()}
    model(**pixels, labels=INPUTS["input_ids"]).loss.backward()
    assert all(grad.isfinite().all() and grad.any() for grad in adapter_grads(model).values())


def test_prepare_for_kbit_training_of_a_model_that_is_not_quantised():
    model = prepare_model_for_kbit_training(tiny.plain().bfloat16())
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    assert loss(model).isfinite()
