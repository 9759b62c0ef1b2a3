"""Everything that can be wrong with a teacher or an option: one clear error, on one line, before any work."""

import json
from pathlib import Path

import pytest
import torch
from synthetic import make_teacher, rewrite
from transformers import LlavaConfig, Qwen2Config, Qwen2ForCausalLM

from linmu_hf.conversion import convert as convert_module
from linmu_hf.conversion.convert import convert
from linmu_hf.conversion.teacher import load_teacher


@pytest.fixture
def teacher(processor, tmp_path):
    make_teacher(tmp_path / "teacher", processor=processor)
    return tmp_path / "teacher"


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_missing_folder(refused, tmp_path):
    refused(tmp_path / "nowhere", "there is no folder .*nowhere")


def test_missing_hub_model(refused, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("nobody/nothing", "there is no folder nobody/nothing, and no model of that name could be downloaded")


def test_file_instead_of_folder(refused, teacher):
    refused(teacher / "config.json", "is a file: give the folder")


def test_no_config(refused, teacher):
    (teacher / "config.json").unlink()
    refused(teacher, "has no config.json")


def test_broken_config(refused, teacher):
    (teacher / "config.json").write_text("{")
    refused(teacher, "no valid JSON")


def test_text_only_model(refused, tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=16, num_key_value_heads=2, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "text")
    refused(tmp_path / "text", "is not a vision-language model .model_type='qwen2'.: supported teachers are")


def test_unsupported_vlm(refused, tmp_path):
    LlavaConfig().save_pretrained(tmp_path / "llava")
    refused(tmp_path / "llava", "is an unsupported vision-language model .model_type='llava'.")


def test_already_linmu(refused, teacher, tmp_path):
    convert(str(teacher), str(tmp_path / "student"))
    refused(tmp_path / "student", "already is a LinMU model: give the teacher")


def test_quantized(refused, teacher):
    change_config(teacher, quantization_config={"quant_method": "awq"})
    refused(teacher, "is quantized .awq.")


def test_truncated_shard(refused, teacher):
    shard = sorted(teacher.glob("*.safetensors"))[5]
    shard.write_bytes(shard.read_bytes()[:-10])
    refused(teacher, f"{shard.name} is truncated")


@pytest.mark.parametrize(
    "damage", [b"", b"\x00", b"<html>not found</html>", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]"]
)
def test_corrupt_shard(refused, teacher, damage):
    shard = sorted(teacher.glob("*.safetensors"))[-1]
    shard.write_bytes(damage)
    refused(teacher, f"{shard.name} is corrupt or no safetensors file")


def test_corrupt_header(refused, teacher):
    shard = sorted(teacher.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[20] = 0xFF
    shard.write_bytes(data)
    refused(teacher, f"{shard.name} is corrupt")


def test_missing_shard(refused, teacher):
    shard = sorted(teacher.glob("*.safetensors"))[3]
    shard.unlink()
    refused(teacher, f"shards that are missing, {shard.name} first")


def test_index_and_shard_disagree(refused, teacher):
    shard = sorted(teacher.glob("*.safetensors"))[3]
    rewrite(shard, lambda tensors: {name + ".old": tensor for name, tensor in tensors.items()})
    refused(teacher, f"in {shard.name}, which does not hold it")


def test_broken_index(refused, teacher):
    (teacher / "model.safetensors.index.json").write_text('{"weight_map": []}')
    refused(teacher, "index.json is corrupt")


def test_pickle_only(refused, teacher):
    for file in teacher.glob("*.safetensors*"):
        file.unlink()
    refused(teacher, "holds no weights")
    torch.save({}, teacher / "pytorch_model.bin")
    refused(teacher, "holds only pickled weights")


def test_missing_tensor(refused, processor, tmp_path):
    make_teacher(tmp_path / "teacher", processor=processor, shard=None)
    key = "model.layers.2.self_attn.k_proj.bias"
    rewrite(
        tmp_path / "teacher" / "model.safetensors",
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key},
    )
    message = r"lacks 1 tensor.s. that its config.json asks for, 'model.language_model.layers.2.self_attn.k_proj.bias'"
    refused(tmp_path / "teacher", message)


def test_shapes_do_not_fit_the_config(refused, teacher):
    config = json.loads((teacher / "config.json").read_text())
    change_config(teacher, text_config={**config["text_config"], "intermediate_size": 96})
    refused(teacher, "config.json and weights do not belong together")


def test_fewer_layers_in_the_config(refused, teacher):
    config = json.loads((teacher / "config.json").read_text())
    text = {**config["text_config"], "num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    change_config(teacher, text_config=text)
    refused(teacher, "teacher tensor 'model.layers.3")


def test_layer_out_of_range(refused, teacher):
    printed = refused(
        teacher, r"\[4\]; the teacher has layers 0 to 3", ["--keep_attention", "1,4"], keep_attention=[1, 4]
    )
    assert "keep_attention names layers [4]" in printed


def test_unknown_mixer_option(refused, teacher):
    refused(teacher, "unknown M-MATE options .'windows'.", ["--windows", "4"], mixer_options={"windows": 4})


def test_wrong_window(refused, teacher):
    message = r"window_size=\(16, 4\) must have 3 entries \(frames, height, width\)"
    printed = refused(teacher, message, ["--window_size", "16,4"], mixer_options={"window_size": (16, 4)})
    assert "window_size=(16, 4) must have 3 entries" in printed
    refused(teacher, "window_size", ["--window_size", "big"], mixer_options={"window_size": "big"})


def test_wrong_type_of_option(refused, teacher):
    refused(teacher, "scan_rope", ["--scan_rope", "maybe"], mixer_options={"scan_rope": "maybe"})


def test_unknown_preset(refused, teacher):
    refused(teacher, "preset='best' is unknown", ["--preset", "best"], preset="best")


def test_unknown_dtype(refused, teacher):
    refused(teacher, "dtype='int4' must be one of", ["--dtype", "int4"], dtype="int4")


def test_output_in_the_way(refused, teacher, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    refused(teacher, "exists and is not empty")
    refused(teacher, "holds no model that overwrite could replace", ["--overwrite_output_dir"], overwrite=True)
    (tmp_path / "out" / "thesis.tex").unlink()
    convert(str(teacher), str(tmp_path / "out"))  # an empty folder does not matter


def test_output_that_cannot_be_put_in_place(teacher, tmp_path, monkeypatch):
    here, mount, disk = (tmp_path / name for name in ("here", "mount", "disk"))
    for folder in (here, mount, disk):
        folder.mkdir()
    monkeypatch.chdir(here)
    ismount = convert_module.os.path.ismount
    monkeypatch.setattr(convert_module.os.path, "ismount", lambda path: Path(path) == mount or ismount(path))
    for output in (".", str(mount)):
        with pytest.raises(FileExistsError, match="is the current folder, or a disk's own: name a folder in it"):
            convert(str(teacher), output)
    link = tmp_path / "link"
    link.symlink_to(disk)
    convert(str(teacher), str(link))  # onto the disk that it leads to
    assert link.is_symlink() and (disk / "config.json").is_file()


def test_overwrite_spares_the_teacher(teacher, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for output in (teacher, tmp_path):
        with pytest.raises(FileExistsError, match="holds the teacher, which overwrite would delete"):
            convert(str(teacher), str(output), overwrite=True)
    load_teacher(teacher)


def test_load_teacher_refuses_the_same(teacher, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_teacher(tmp_path / "nowhere")
    sorted(teacher.glob("*.safetensors"))[0].write_bytes(b"")
    with pytest.raises(ValueError, match="is corrupt"):
        load_teacher(teacher)


@pytest.mark.parametrize(
    ("value", "stored", "dtype", "message"),
    [
        (70_000.0, torch.bfloat16, "float16", "has the value 70144: torch.float16 ends at 65504"),
        (-3.4e38, torch.float32, "bfloat16", "torch.bfloat16 ends at 3.38953e.38"),
        (float("nan"), torch.float32, None, "has the value nan: the teacher is damaged"),
        (float("-inf"), torch.bfloat16, "float32", "has the value -inf: the teacher is damaged"),
    ],
)
def test_values_that_are_not_finite(processor, tmp_path, value, stored, dtype, message):
    """Nothing is published, and the tensor is named; `load_teacher` refuses the same."""
    key = "model.layers.2.self_attn.k_proj.bias"
    make_teacher(tmp_path / "teacher", processor=processor, shard=None)

    def damage(tensors):
        tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
        tensors[key][5] = value
        return tensors

    rewrite(tmp_path / "teacher" / "model.safetensors", damage)
    message = f"teacher tensor {key!r} .*{message}"
    with pytest.raises(ValueError, match=message):
        convert(str(tmp_path / "teacher"), str(tmp_path / "out"), dtype=dtype)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=message):
        load_teacher(tmp_path / "teacher", dtype=dtype)
    if dtype and abs(value) < float("inf"):
        convert(str(tmp_path / "teacher"), str(tmp_path / "out"))
