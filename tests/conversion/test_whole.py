"""A model whose weights are not all there, or cannot be read, is refused by whatever loads it."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

from linmu_hf import LinMUForConditionalGeneration
from linmu_hf.commands import chat, distill, evaluate, fidelity, pseudo_targets
from linmu_hf.commands.chat import SHIPPED_STUDENT
from linmu_hf.conversion.source import load_whole
from linmu_hf.testbed.check_teacher import TEACHERS


NORM = "model.language_model.layers.1.input_layernorm.weight"


def lose_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    del weights[NORM]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


def one_layer_less(folder):
    change_config(folder, num_hidden_layers=3, layer_types=["m_mate"] * 3)


def one_layer_more(folder):
    change_config(folder, num_hidden_layers=5, layer_types=["m_mate"] * 5)


def wider_layers(folder):
    change_config(folder, intermediate_size=1000)


def cut_off(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


SPOILED = {
    lose_a_tensor: f"is not whole: 1 tensors are missing, '{NORM}' first; save it again",
    one_layer_more: "tensors are missing, 'model.language_model.layers.4.",
    one_layer_less: "tensors are unknown to the model, 'model.language_model.layers.3.",
    wider_layers: "the weights do not fit its config.json",
    cut_off: "its weights cannot be read",
    empty: "its weights cannot be read",
}


@pytest.fixture
def student(tmp_path):
    return shutil.copytree(SHIPPED_STUDENT, tmp_path / "student")


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_student_that_is_not_whole_is_refused(student, spoil):
    spoil(student)
    for model_class in (AutoModelForImageTextToText, LinMUForConditionalGeneration):
        with pytest.raises(ValueError, match="student") as error:
            load_whole(model_class, student)
        assert SPOILED[spoil] in str(error.value)


def test_a_teacher_that_is_not_whole_is_refused(tmp_path):
    folder = shutil.copytree(TEACHERS["qwen"], tmp_path / "teacher")
    assert isinstance(load_whole(AutoModelForImageTextToText, folder), Qwen2_5_VLForConditionalGeneration)
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if name.endswith("layers.1.input_layernorm.weight")))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors are missing"):
        load_whole(AutoModelForImageTextToText, folder)


@pytest.mark.parametrize("spoil", [lose_a_tensor, cut_off])
def test_every_command_says_so_in_one_line(student, tmp_path, capsys, spoil):
    turns = [{"role": "user", "content": "7 or 3 first?"}, {"role": "assistant", "content": "7"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    spoil(student)
    model, teacher, rows = f"--model {student}", f"--teacher {TEACHERS['qwen']}", f"--dataset {tmp_path}/rows.jsonl"
    commands = {
        chat: f"{model} what?",
        evaluate: f"{model} {rows}",
        fidelity: f"{model} {teacher} {rows} --output {tmp_path}/fidelity",
        distill: f"{model} {teacher} {rows} --output_dir {tmp_path}/out --use_cpu",
        pseudo_targets: f"--teacher {student} {rows} --output_dir {tmp_path}/answers",
    }
    for command, words in commands.items():
        assert command.main(words.split()) == 2, command
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert ": error: " in error and str(student) in error, error
    assert not (tmp_path / "out").exists() and not (tmp_path / "answers").exists()
