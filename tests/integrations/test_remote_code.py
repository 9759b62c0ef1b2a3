"""Saved folders load with `trust_remote_code=True` where nobody imported linmu_hf, and are saved whole again."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
from hub_fixtures import STUDENT, save_student
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

import linmu_hf
from linmu_hf import LinMUConfig, LinMUForConditionalGeneration, LinMUModel, LinMUTextModel
from linmu_hf.modeling.remote_code import REMOTE_CODE, REMOTE_CODE_FILE


SOURCE = Path(linmu_hf.__file__).parents[1]
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "linmu_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
"""
HEAD = """
import os, sys
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
folder, output = sys.argv[1:]
trust = {"trust_remote_code": True}
assert "linmu_hf" not in sys.modules

def error(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with its processor."""
    return save_student(tmp_path_factory.mktemp("remote") / "linmu-model")


def run(script, *arguments):
    """Runs a script in a process of its own, without anybody at the keyboard."""
    home = Path(arguments[-1]).parent / "hf_home"
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def saved_model(folder):
    """What `model.save_pretrained` writes, without the processor's files."""
    names = ("config.json", "generation_config.json", "model.safetensors", REMOTE_CODE_FILE)
    return {name: (folder / name).read_bytes() for name in names}


def test_saved_folders_name_the_remote_code(folder):
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}
    for auto, reference in auto_map.items():
        module, name = reference.split(".")
        assert module + ".py" == REMOTE_CODE_FILE and hasattr(linmu_hf, name)
        assert auto in ("AutoConfig", "AutoModel") or name == "LinMUForConditionalGeneration"
    assert (folder / REMOTE_CODE_FILE).read_text() == REMOTE_CODE
    assert [path.name for path in folder.glob("*.py")] == [REMOTE_CODE_FILE]


def test_the_shipped_student_names_the_remote_code(folder):
    assert (STUDENT / REMOTE_CODE_FILE).read_text() == REMOTE_CODE
    shipped, saved = (json.loads((place / "config.json").read_text()) for place in (STUDENT, folder))
    assert shipped["auto_map"] == saved["auto_map"]


def test_without_an_import(folder, tmp_path):
    """First refused without trust; then every Auto class, saving, loading again, and the import afterwards."""
    script = HEAD + textwrap.dedent("""
        for auto in (AutoConfig, AutoModel, AutoModelForImageTextToText):
            message = error(auto.from_pretrained, folder)
            assert message.startswith("ValueError: The repository") and "trust_remote_code=True" in message, message
            assert "contains custom code" in message
        assert "linmu_hf" not in sys.modules

        base = AutoModel.from_pretrained(folder, **trust)
        assert "linmu_hf" in sys.modules
        import torch
        from linmu_hf import LinMUConfig, LinMUForConditionalGeneration, LinMUModel
        assert type(AutoConfig.from_pretrained(folder, **trust)) is LinMUConfig
        assert type(base) is LinMUModel
        model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
        assert type(model) is LinMUForConditionalGeneration
        assert AutoProcessor.from_pretrained(folder, **trust).image_token_id == model.config.image_token_id
        assert base.state_dict().keys() == model.model.state_dict().keys()
        for name, tensor in model.model.state_dict().items():
            assert torch.equal(base.state_dict()[name], tensor), name

        model.save_pretrained(os.path.join(output, "remote"))
        again = AutoModelForImageTextToText.from_pretrained(os.path.join(output, "remote"), **trust)
        again.save_pretrained(os.path.join(output, "remote-remote"))
        LinMUForConditionalGeneration.from_pretrained(os.path.join(output, "remote")).save_pretrained(
            os.path.join(output, "remote-local")
        )
        base.save_pretrained(os.path.join(output, "base"))
        again = AutoModel.from_pretrained(os.path.join(output, "base"), **trust)
        for name, tensor in base.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
    """)
    output = tmp_path / "out"
    run(script, folder, output)
    for route in ("remote", "remote-remote", "remote-local"):
        assert contents(output / route) == saved_model(folder), route
    # here the package was imported first
    for trust in (None, True):
        model = AutoModelForImageTextToText.from_pretrained(output / "remote-remote", trust_remote_code=trust)
        assert type(model) is LinMUForConditionalGeneration
        model.save_pretrained(output / f"local-{trust}")
        assert contents(output / f"local-{trust}") == saved_model(folder)


def test_pipeline_without_an_import(folder, tmp_path):
    """Chat messages, alone and in batches, through `pipeline`; a batch answers as its rows do alone."""
    script = HEAD + textwrap.dedent("""
        from PIL import Image
        assert "trust_remote_code=True" in error(pipeline, "image-text-to-text", model=folder)
        ask = pipeline("image-text-to-text", model=folder, **trust)
        ask.processor.tokenizer.padding_side = "left"
        def chat(side, question):
            content = [{"type": "image", "image": Image.linear_gradient("L").convert("RGB").resize((side, side))}]
            return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        chats = [chat(64, "row 2 column 3?"), chat(96, "below row 1 column 2?"), chat(64, "row 1 column 1?")]
        options = {"return_full_text": False, "max_new_tokens": 4}
        alone = [ask(text=one, **options)[0]["generated_text"] for one in chats]
        assert all(alone), alone
        for size in (1, 2, 3):
            batch = [answer[0]["generated_text"] for answer in ask(text=chats, batch_size=size, **options)]
            assert batch == alone, (size, batch, alone)
        assert ask(text=chats[0], max_new_tokens=4)[0]["generated_text"][-1]["role"] == "assistant"
    """)
    run(script, folder, tmp_path / "out")


def test_without_the_package(folder, tmp_path):
    """The error says what to install; without trust it is Transformers' own; the processor needs no package."""
    script = HEAD.replace("import os, sys", BLOCK + "import os, sys", 1) + textwrap.dedent("""
        for auto in (AutoConfig, AutoModel, AutoModelForImageTextToText):
            message = error(auto.from_pretrained, folder, **trust)
            assert message.startswith("ImportError: This is a LinMU model"), message
            assert "pip install linmu-hf" in message
            assert "trust_remote_code=True" in error(auto.from_pretrained, folder)
        assert "pip install linmu-hf" in error(pipeline, "image-text-to-text", model=folder, **trust)
        assert type(AutoProcessor.from_pretrained(folder)).__name__ == "Qwen2_5_VLProcessor"
    """)
    run(script, folder, tmp_path / "out")


def test_a_broken_installation_is_not_called_missing(tmp_path):
    """A package that linmu_hf itself lacks is named, not hidden behind advice to install linmu-hf."""
    (tmp_path / "linmu_hf").mkdir()
    (tmp_path / "linmu_hf" / "__init__.py").write_text("import a_package_that_is_not_there\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", REMOTE_CODE], env=environment, capture_output=True, text=True)
    assert "No module named 'a_package_that_is_not_there'" in done.stderr and "pip install" not in done.stderr


def test_decoder_alone(tmp_path):
    LinMUTextModel(tiny.text_config()).save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "linmu_remote_code.LinMUTextConfig",
        "AutoModel": "linmu_remote_code.LinMUTextModel",
    }
    assert type(AutoModel.from_pretrained(tmp_path)) is LinMUTextModel


def test_configuration_alone(tmp_path):
    config = tiny.config()
    config.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", REMOTE_CODE_FILE]
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LinMUConfig and loaded.to_json_string() == config.to_json_string()


def test_a_subclass_keeps_its_own_entry(tmp_path):
    """Only linmu_hf's own classes leave saving code to the package; names from an older place are renewed."""

    class Tuned(LinMUForConditionalGeneration):
        pass

    for ours in (LinMUConfig, LinMUModel, LinMUForConditionalGeneration):
        ours.register_for_auto_class()
        assert ours._auto_class is None
    Tuned.register_for_auto_class("AutoModelForImageTextToText")
    assert Tuned._auto_class == "AutoModelForImageTextToText"
    config = tiny.config()
    config.auto_map = {"AutoModel": "org/name--linmu_remote_code.LinMUModel", "AutoProcessor": "mine.Processor"}
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert written["AutoModel"] == "linmu_remote_code.LinMUModel" and written["AutoProcessor"] == "mine.Processor"
