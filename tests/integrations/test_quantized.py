"""Loading by torchao and bitsandbytes: what is converted, and how close answers stay on the testbed's student."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, TorchAoConfig

import linmu_hf
from linmu_hf import lora_targets
from linmu_hf.data import encode_prompts, encode_rows
from linmu_hf.modeling.mixers.flex_ma import FP32_PARAMETERS, ZeroLinear
from linmu_hf.testbed.data import TASKS, evaluation_rows


STUDENT = Path(linmu_hf.__file__).parent / "testbed" / "student"
KEPT = ["lm_head", "model.visual"]  # rows of 96 and 256 numbers do not fill nf4's blocks of 64 on a CPU
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


def int4_groups(**options):
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)), **options)


# name -> (configuration, device, largest relative error of the logits)
CONFIGURATIONS = {
    "torchao int8": (lambda: TorchAoConfig(Int8WeightOnlyConfig()), "cpu", 0.02),
    "torchao int4": (int4_groups, "cpu", 0.15),
    "torchao int4, decoder": (lambda: int4_groups(modules_to_not_convert=KEPT), "cpu", 0.15),
    "bitsandbytes int8": (lambda: BitsAndBytesConfig(load_in_8bit=True), "cpu", 0.03),
    "bitsandbytes nf4, decoder": (lambda: BitsAndBytesConfig(**NF4, llm_int8_skip_modules=KEPT), "cpu", 0.15),
    "bitsandbytes nf4 on a GPU": (lambda: BitsAndBytesConfig(**NF4), "cuda", 0.15),
    "torchao int4 on a GPU": (
        lambda: TorchAoConfig(Int4WeightOnlyConfig(group_size=32, int4_packing_format="tile_packed_to_4d")),
        "cuda",
        0.15,
    ),
}
each = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.gpu] * (c[1] == "cuda")) for n, c in CONFIGURATIONS.items()]
)


def load(name=None, **options):
    config, device, _ = CONFIGURATIONS.get(name, (lambda: None, "cpu", 0))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    options = {"dtype": dtype, "device_map": device, "quantization_config": config(), **options}
    return AutoModelForImageTextToText.from_pretrained(STUDENT, **options).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(STUDENT)


@pytest.fixture(scope="module")
def rows():
    return [row for task in TASKS for row in evaluation_rows(task, 8, seed=3)]


@pytest.fixture(scope="module")
def batch(processor, rows):
    return encode_rows(processor, rows[::4])


@pytest.fixture(scope="module")
def reference(processor, rows, batch):
    model = load()
    return logits(model, batch), answers(model, processor, rows)


@torch.no_grad()
def logits(model, batch):
    return model(**batch.to(model.device)).logits[batch["attention_mask"].bool()].float().cpu()


def answers(model, processor, rows):
    """The first token of every answer, as log probabilities; chosen greedily by `generate`."""
    inputs = encode_prompts(processor, rows).to(model.device)
    out = model.generate(
        **inputs, max_new_tokens=2, do_sample=False, output_scores=True, return_dict_in_generate=True,
        pad_token_id=processor.tokenizer.pad_token_id,
    )  # fmt: skip
    return out.scores[0].float().log_softmax(-1).cpu()


def converted(model):
    """Names of the linear maps whose weights are not an ordinary floating-point parameter."""
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, (Linear4bit, Linear8bitLt))
        or (isinstance(module, nn.Linear) and type(module.weight.data) is not torch.Tensor)
        or (isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter)
    }


@each
def test_what_is_converted(name):
    plain, model = load(), load(name)
    small = {name for name, module in plain.named_modules() if isinstance(module, ZeroLinear)}
    expected = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)} - small - {"lm_head"}
    if "decoder" in name:
        expected = {name for name in expected if ".visual." not in name}
    assert len(small) == 5 * 4 and len(expected) >= 4 * 13
    assert converted(model) == expected
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.rpartition(".")[2] in FP32_PARAMETERS:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter.cpu(), plain.get_parameter(parameter_name))


@each
def test_answers_stay_close(name, processor, rows, batch, reference):
    """Logits within a bound; one greedy answer in twenty may differ, and those of before stay about as likely."""
    model, bound = load(name), CONFIGURATIONS[name][2]
    expected, scores = reference
    error = (logits(model, batch) - expected).norm() / expected.norm()
    assert 0 < error < bound
    found, (best, chosen) = answers(model, processor, rows), scores.max(-1)
    assert (found.argmax(-1) == chosen).float().mean() >= 0.95
    assert (best - found.gather(1, chosen[:, None])[:, 0]).mean() < bound  # in nats


@pytest.mark.parametrize("name", [name for name, config in CONFIGURATIONS.items() if config[1] == "cpu"])
def test_saved_and_loaded_again(name, batch, tmp_path):
    model = load(name)
    model.save_pretrained(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size < 0.7 * sum(file.stat().st_size for file in STUDENT.glob("*.safetensors"))
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert converted(loaded) == converted(model)
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bitsandbytes nf4, decoder", "bitsandbytes int8", "torchao int8"])
def test_lora_on_a_quantised_model(name, batch):
    """QLoRA: PEFT's preparation, adapters on what is converted and on what is not, a few steps."""
    model = prepare_model_for_kbit_training(load(name), gradient_checkpointing_kwargs={"use_reentrant": True})
    assert model.is_activation_checkpointing
    torch.manual_seed(0)
    parts = ("mlp", "flex_ma", "local_swin", *(() if "torchao" in name else ("gates",)))
    model = get_peft_model(model, LoraConfig(r=8, target_modules=lora_targets(*parts))).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
