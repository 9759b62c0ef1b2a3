"""Loading onto several devices: cpu, disk, and a second device (`meta` stands in for one where there is no GPU)."""

import contextlib

import pytest
import tiny
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import infer_auto_device_map, send_to_device
from transformers import AutoModelForImageTextToText

from linmu_hf import LinMUForConditionalGeneration
from linmu_hf.modeling.layout.token_layout import TokenLayout


SAMPLES = tiny.Sample(3, ("image", 3, 5), 2, ("video", 3, 3, 2), 2), tiny.Sample(4)
INPUTS = tiny.batch(*SAMPLES, padding="left", dtype=torch.float32)
HYBRID = {"layer_types": ["m_mate", "m_mate", "full_attention", "m_mate"]}
DECODER = "model.language_model"
REST = {f"{DECODER}.norm": "cpu", f"{DECODER}.rotary_emb": "cpu", "lm_head": "cpu"}
MAPS = {
    "auto": "auto",
    "one device": "cpu",
    "layers on disk": {
        "model.visual": "cpu", f"{DECODER}.embed_tokens": "cpu", f"{DECODER}.layers.0": "cpu",
        **{f"{DECODER}.layers.{i}": "disk" for i in (1, 2, 3)}, **REST,
    },
    "vision and embeddings on disk": {
        "model.visual": "disk", f"{DECODER}.embed_tokens": "disk",
        **{f"{DECODER}.layers.{i}": "cpu" for i in range(4)}, **REST,
    },
    "all on disk": {"": "disk"},
}  # fmt: skip


@pytest.fixture(scope="module", params=[{}, HYBRID], ids=["m_mate", "hybrid"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = tiny.plain(**request.param)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder, model


@torch.no_grad()
def check(loaded, model, **generate_options):
    # not to the last bit: products round differently where weights are laid out differently in memory
    torch.testing.assert_close(loaded(**INPUTS).logits, model(**INPUTS).logits, rtol=1e-5, atol=1e-5)
    tokens = [one.generate(**INPUTS, max_new_tokens=5, **generate_options) for one in (loaded, model)]
    assert tokens[0].shape[1] > INPUTS["input_ids"].shape[1] and torch.equal(*tokens)


@pytest.mark.parametrize("device_map", MAPS.values(), ids=MAPS)
def test_device_map(saved, device_map, tmp_path):
    folder, model = saved
    loaded = AutoModelForImageTextToText.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    on_disk = {name.removesuffix(".weight") for name, parameter in loaded.named_parameters() if parameter.is_meta}
    asked = {name for name, place in device_map.items() if place == "disk"} if isinstance(device_map, dict) else set()
    assert {name for name in asked if any(part.startswith(name) for part in on_disk)} == asked
    assert all(any(part.startswith(name) for name in asked) for part in on_disk)
    check(loaded, model)
    check(loaded, model, num_beams=2)


def test_memory_limits_put_whole_layers_on_disk(saved, tmp_path):
    folder, model = saved
    size = model.get_memory_footprint()
    loaded = AutoModelForImageTextToText.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": int(0.7 * size)}, offload_folder=tmp_path
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    for name in loaded.hf_device_map:
        assert ".layers." not in name or name.rpartition(".")[2].isdigit(), f"{name}: a layer was split"
        assert ".blocks." not in name or name.rpartition(".")[2].isdigit(), f"{name}: a block was split"
    check(loaded, model)


def test_empty_weights(saved, tmp_path):
    folder, model = saved
    with init_empty_weights():
        empty = LinMUForConditionalGeneration(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    device_map = infer_auto_device_map(empty, max_memory={"cpu": 10**9}, no_split_module_classes=["LinMUDecoderLayer"])
    assert set(device_map.values()) == {"cpu"}
    check(load_checkpoint_and_dispatch(empty, folder, device_map=device_map).eval(), model)


def test_made_on_meta(saved):
    folder, model = saved
    with torch.device("meta"):
        empty = LinMUForConditionalGeneration(model.config)
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    loaded = LinMUForConditionalGeneration.from_pretrained(folder, low_cpu_mem_usage=True)
    check(loaded, model)


def test_pickled_weights_are_neither_written_nor_read(saved, tmp_path):
    model = saved[1]
    model.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".py", ".safetensors"}  # the remote code
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for cls in (AutoModelForImageTextToText, LinMUForConditionalGeneration):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            cls.from_pretrained(tmp_path)
    check(LinMUForConditionalGeneration.from_pretrained(tmp_path, use_safetensors=False), model)


def layout():
    model = tiny.plain()
    _, places = model.model.get_positions(**{name: value for name, value in INPUTS.items() if "pixel" not in name})
    # the mask of a third row of padding alone, so that `rows` is there
    mask = torch.cat([INPUTS["attention_mask"], torch.zeros_like(INPUTS["attention_mask"][:1])])
    places = torch.cat([places, torch.full_like(places[:1], -1)])
    return TokenLayout.build(model.config.text_config, *mask.shape, "cpu", mask, places)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    values = values or getattr(value, "__dict__", {}).values()
    return [tensor for item in values for tensor in tensors(item)]


def test_a_layout_moves_whole():
    here = layout()
    assert len(tensors(here)) >= 15 and not any(tensor.is_meta for tensor in tensors(here))
    for there in (send_to_device(here, "meta"), here.to("meta", non_blocking=True)):
        moved = tensors(there)
        assert [t.shape for t in moved] == [t.shape for t in tensors(here)] and all(t.is_meta for t in moved)
        assert there.batch == here.batch and there.segments.lengths == here.segments.lengths
    assert here.to("cpu") is here


SECOND = ["meta", pytest.param("cuda", marks=pytest.mark.gpu)]


def on_two_devices(monkeypatch, second, *parts):
    """A model with the given parts, and hooks as `device_map` puts them, on a second device."""
    if second == "meta":  # autocast does not know it
        monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    model = tiny.plain()
    for part in parts:
        module = model.get_submodule(part).to(second)
        add_hook_to_module(module, AlignDevicesHook(second))
    return model


@torch.no_grad()
@pytest.mark.parametrize("second", SECOND)
def test_the_last_layers_on_a_second_device(second, monkeypatch):
    parts = [f"{DECODER}.layers.2", f"{DECODER}.layers.3", f"{DECODER}.norm", "lm_head"]
    model = on_two_devices(monkeypatch, second, *parts)
    outputs = model(**INPUTS, use_cache=True)
    assert outputs.logits.device.type == second and outputs.logits.shape == (*INPUTS["input_ids"].shape, 64)
    states = [layer.recurrent_states[0].device.type for layer in outputs.past_key_values.layers]
    assert states == ["cpu", "cpu", second, second]
    token = torch.full((len(SAMPLES), 1), 7)
    after = model(token, past_key_values=outputs.past_key_values)
    if second == "cuda":
        expected = tiny.plain()(**INPUTS, use_cache=True)
        torch.testing.assert_close(outputs.logits.cpu(), expected.logits, rtol=1e-3, atol=1e-4)
        expected = tiny.plain()(token, past_key_values=expected.past_key_values)
        torch.testing.assert_close(after.logits.cpu(), expected.logits, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.gpu
def test_embeddings_and_layers_on_a_second_device(monkeypatch):
    parts = [
        f"{DECODER}.{part}" for part in ("embed_tokens", "rotary_emb", "norm", *(f"layers.{i}" for i in range(4)))
    ]
    model = on_two_devices(monkeypatch, "cuda", *parts, "lm_head")
    expected = tiny.plain()(**INPUTS).logits
    torch.testing.assert_close(model(**INPUTS).logits.cpu(), expected, rtol=1e-3, atol=1e-4)
    with pytest.MonkeyPatch.context() as patch:  # that the layout moves matters
        patch.setattr(TokenLayout, "to", lambda self, device, **kwargs: self)
        model.model.language_model.layers[3].cpu()
        add_hook_to_module(model.model.language_model.layers[3], AlignDevicesHook("cpu"))
        with pytest.raises(RuntimeError, match="device"):
            model(**INPUTS)
