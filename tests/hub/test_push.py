"""Uploads to a Hub on this machine: what arrives, what is refused, and what failing costs."""

import json
import shutil

import nvila_processors
import pytest
from fake_hub import USER
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from linmu_hf import LinMUForConditionalGeneration
from linmu_hf.commands.push import main
from linmu_hf.hub import check_folder, prepare_repo, push_folder


NAME = "org/linmu-student"
MODEL = {"config.json", "generation_config.json", "model.safetensors", "linmu_remote_code.py"}
PROCESSOR = {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "student")


def arrived(hub, folder, name=NAME, revision="main"):
    """Whether the branch holds the model's files, byte for byte, and a card."""
    files = hub.repos[name].files(revision)
    expected = {file: (folder / file).read_bytes() for file in MODEL | PROCESSOR}
    return "README.md" in files and {**files, **expected} == files


def test_one_commit_with_all_that_belongs_to_the_model(hub, folder):
    for stray in ("pseudo_targets.jsonl", "conversion_command.json", "training_args.bin", "notes.txt", ".secret"):
        (folder / stray).write_text("private")
    (folder / "stage-1").mkdir()
    shutil.copy(folder / "model.safetensors", folder / "stage-1")
    (folder / "loss_curves.png").write_bytes(b"picture")
    (folder / "training_log.jsonl").write_text("{}\n")
    commit = push_folder(folder, NAME)
    repo = hub.repos[NAME]
    assert commit.commit_url == f"{hub.url}/{NAME}/commit/{repo.sha('main')}" and not repo.private
    assert len(repo.branches["main"]) == 2  # the Hub's own first, and ours
    extra = {".gitattributes", "README.md", "loss_curves.png", "training_log.jsonl"}
    assert set(repo.files()) == MODEL | PROCESSOR | extra
    assert arrived(hub, folder)


def test_repeated_upload_sends_nothing(hub, folder):
    push_folder(folder, NAME)
    uploads, commits = len(hub.uploads()), len(hub.repos[NAME].branches["main"])
    push_folder(folder, NAME)
    assert len(hub.uploads()) == uploads == 1 and len(hub.repos[NAME].branches["main"]) == commits


def test_private_and_branch(hub, folder):
    push_folder(folder, NAME, private=True, revision="trial")
    repo = hub.repos[NAME]
    assert repo.private and arrived(hub, folder, revision="trial") and set(repo.files("main")) == {".gitattributes"}
    assert f'model="{NAME}", revision="trial"' in repo.files("trial")["README.md"].decode()
    push_folder(folder, NAME, private=True)  # it is private already
    assert arrived(hub, folder)
    assert prepare_repo("mine") == f"{USER}/mine"  # without an organization: the user's own
    with pytest.raises(ValueError, match=f"{USER}/mine exists and is public: make it private"):
        push_folder(folder, "mine", private=True)
    assert set(hub.repos[f"{USER}/mine"].files()) == {".gitattributes"}


def test_weights_of_an_earlier_model_go(hub, folder, tmp_path):
    """A repository with one large file gets shards, and the other way round; what is not a weight stays."""
    push_folder(folder, NAME)
    files = hub.repos[NAME].branches["main"][-1]
    files |= {
        "pytorch_model.bin": b"old",
        "adapter_config.json": b"{}",
        "notes.md": b"mine",
        "onnx/model.bin": b"kept",
    }
    sharded = tmp_path / "sharded"
    shutil.copytree(folder, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    LinMUForConditionalGeneration.from_pretrained(folder).save_pretrained(sharded, max_shard_size="3MB")
    push_folder(sharded, NAME)
    shards = {path.name for path in sharded.glob("*.safetensors")}
    now = set(hub.repos[NAME].files())
    assert len(shards) == 3 and {file for file in now if file.endswith(".safetensors")} == shards
    assert {"notes.md", "onnx/model.bin"} <= now and not {"pytorch_model.bin", "adapter_config.json"} & now
    push_folder(folder, NAME)
    now = set(hub.repos[NAME].files())
    assert "model.safetensors" in now and not shards & now and "model.safetensors.index.json" not in now


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        ("PUT /lfs", 500), ("PUT /lfs", "cut"), ("PUT /lfs", 403), ("POST .*/commit/", 500),
        ("POST .*/commit/", "cut"), ("POST .*/preupload/", "cut"), ("POST .*/objects/batch", 500),
        ("GET .*/api/models", "cut"), ("POST /api/validate-yaml", "cut"),
    ],
)  # fmt: skip
def test_a_failed_upload_changes_nothing_and_a_repeat_completes(hub, folder, where, fault):
    prepare_repo(NAME)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.breaks[where] = [fault] * 20
    with pytest.raises(OSError, match=f"the upload to {NAME} failed .*push it again"):
        push_folder(folder, NAME)
    assert len(hub.repos[NAME].branches["main"]) == 1
    hub.breaks.clear()
    push_folder(folder, NAME)
    assert arrived(hub, folder)
    assert len(hub.repos[NAME].branches["main"]) == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_large_files_that_arrived_are_not_sent_again(hub, folder):
    hub.breaks["POST .*/commit/"] = [500]
    with pytest.raises(OSError, match="failed"):
        push_folder(folder, NAME)
    assert len(hub.uploads()) == 1
    push_folder(folder, NAME)
    assert len(hub.uploads()) == 1 and arrived(hub, folder)


def test_a_commit_whose_answer_is_lost(hub, folder):
    """The Hub has done the work and cannot say so: the repeat finds everything there."""
    hub.breaks["POST .*/commit/"] = ["lost"]
    with pytest.raises(OSError, match="push it again"):
        push_folder(folder, NAME)
    assert arrived(hub, folder)
    push_folder(folder, NAME)
    assert len(hub.repos[NAME].branches["main"]) == 2


def test_a_fault_that_passes_is_waited_out(hub, folder):
    hub.breaks["PUT /lfs"] = ["cut", 503]
    push_folder(folder, NAME)
    assert arrived(hub, folder) and len(hub.uploads()) == 3


@pytest.mark.parametrize(
    ("name", "token", "offline", "message"),
    [
        ("forbidden/model", None, False, "cannot push to forbidden/model: .*403"),
        (NAME, "hf_wrong", False, f"cannot push to {NAME}: .*401"),
        (NAME, None, True, f"cannot push to {NAME}: .*offline mode"),
        ("a/b/c", None, False, "a/b/c"),
    ],
)
def test_who_may_not_push_hears_it_before_anything_is_sent(hub, folder, monkeypatch, name, token, offline, message):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises((OSError, ValueError), match=message):
        push_folder(folder, name, token=token)
    assert not hub.repos and not hub.uploads()


# ---- The check before


def without(name):
    return lambda folder: (folder / name).unlink()


def edited(name, **changes):
    def edit(folder):
        content = json.loads((folder / name).read_text())
        for key, value in changes.items():
            if value is None:
                del content[key]
            else:
                content[key] = value
        (folder / name).write_text(json.dumps(content))

    return edit


def weights(change):
    def rewrite(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def base_model_only(folder):
    LinMUForConditionalGeneration.from_pretrained(folder).model.save_pretrained(folder)


NORM = "model.language_model.norm.weight"
BROKEN = {
    "no config.json": without("config.json"),
    "its configuration does not load": lambda folder: (folder / "config.json").write_text("{"),
    "is a 'llama' model, not a LinMU model": edited("config.json", model_type="llama"),
    "is quantized": edited("config.json", quantization_config={"quant_method": "gptq"}),
    r"architectures=\['LinMUModel'\]: save a LinMUForConditionalGeneration": base_model_only,
    "names no auto_map": edited("config.json", auto_map=None),
    "lacks linmu_remote_code.py": without("linmu_remote_code.py"),
    "holds an adapter": lambda folder: (folder / "adapter_config.json").write_text("{}"),
    "holds no weights": without("model.safetensors"),
    "only pickled weights": pickled,
    "truncated or corrupt": truncated,
    rf"1 tensor\(s\) are missing, '{NORM}'": weights(lambda tensors: tensors.pop(NORM)),
    r"1 tensor\(s\) are unknown to the model, 'stray'": weights(
        lambda tensors: tensors.update(stray=tensors[NORM].clone())
    ),
    rf"1 tensor\(s\) have another shape than config.json says, '{NORM}'": weights(
        lambda tensors: tensors.update({NORM: tensors[NORM][:-1].clone()})
    ),
    "left.safetensors is no part": lambda folder: shutil.copy(
        folder / "model.safetensors", folder / "left.safetensors"
    ),
    "its processor does not load": without("processor_config.json"),
    "has no chat template": without("chat_template.jinja"),
    "image_token_id is 510 in the processor, but 7": edited("config.json", image_token_id=7),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_folder_that_is_not_whole_is_not_sent(hub, folder, message):
    check_folder(folder)
    BROKEN[message](folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        push_folder(folder, NAME)
    assert not hub.log


# ---- The command


def test_command(hub, folder, capsys):
    assert main([str(folder), NAME, "--private", "--revision", "trial", "--commit_message", "first"]) == 0
    assert capsys.readouterr().out.strip().startswith(f"{hub.url}/{NAME}/commit/")
    assert hub.repos[NAME].private and arrived(hub, folder, revision="trial")


def test_dry_run(hub, folder, capsys):
    assert main([str(folder), NAME, "--dry_run"]) == 0
    assert set(capsys.readouterr().out.split()) == MODEL | PROCESSOR
    assert not hub.log


def test_command_errors_in_one_line(hub, folder, capsys):
    for arguments, message in (
        (["/nowhere", NAME], "/nowhere has no config.json"),
        ([str(folder), NAME, "--retention", "/nowhere.json"], "--retention /nowhere.json: there is no such file"),
        ([str(folder), NAME, "--retention", str(folder / "config.json")], "not the results of `linmu-eval"),
        ([str(folder), "bad id!", "--dry_run"], "'bad id!'"),
        ([str(folder), "forbidden/model"], "cannot push to forbidden/model"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("linmu-push: error: ") and message in error and error.count("\n") == 1
    assert not hub.repos


def test_the_model_s_own_push_to_hub(hub, folder):
    """Transformers' method works: with the remote code and a tag of ours, by itself without the processor."""
    model = LinMUForConditionalGeneration.from_pretrained(folder)
    model.push_to_hub(NAME, tags=["mine"])
    files = hub.repos[NAME].files()
    assert set(files) == MODEL | {".gitattributes", "README.md"}
    assert "- linmu" in files["README.md"].decode() and "- mine" in files["README.md"].decode()
    assert LinMUForConditionalGeneration.from_pretrained(folder).model_tags == ["linmu"]
    model.config.push_to_hub("org/config")
    assert {"config.json", "linmu_remote_code.py"} <= set(hub.repos["org/config"].files())


def test_nvila_s_processor_pushes_its_remote_code(hub, tmp_path):
    processor = nvila_processors.tiny()
    files = {"processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    processor.push_to_hub("org/processor")
    assert set(hub.repos["org/processor"].files()) >= files | {"linmu_remote_code.py"}
    processor.save_pretrained(tmp_path / "processor", push_to_hub=True, repo_id="org/again")
    assert hub.repos["org/again"].files() == hub.repos["org/processor"].files()
    processor.image_processor.push_to_hub("org/images")
    assert set(hub.repos["org/images"].files()) >= {"preprocessor_config.json", "linmu_remote_code.py"}
