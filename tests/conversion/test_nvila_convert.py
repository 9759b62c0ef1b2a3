"""NVILA through the conversion: every layout is the same teacher, and the student starts from its weights."""

import pytest
import torch
from huggingface_hub import ModelCard
from killing import Killed
from safetensors.torch import load_file
from synthetic import ask, image, rewrite, say
from synthetic_nvila import KINDS, LAYOUTS, change_json, make_nvila, make_parts, make_tokenizer
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from linmu_hf import LinMUConfig, LinMUForConditionalGeneration
from linmu_hf.commands.convert import main
from linmu_hf.conversion import convert as convert_module
from linmu_hf.conversion.convert import convert
from linmu_hf.conversion.source import open_source
from linmu_hf.conversion.teacher import load_processor, load_teacher
from linmu_hf.conversion.weight_map import is_new, map_teacher_key
from linmu_hf.data import encode_prompts, encode_rows
from linmu_hf.families.nvila.configuration import NVILAConfig, NVILAVisionConfig
from linmu_hf.hub import check_folder


IMAGE = {"messages": [ask("which digit?", images=1), say("7")], "images": [image(40, 70)]}
IMAGES = {"messages": [ask("row?", images=2), say("three")], "images": [image(24, 40), image(50, 20, 1)]}
VIDEO = {
    "messages": [ask("what came first?", videos=1), say("8")],
    "videos": [[image(32, 32, seed) for seed in range(4)]],
}
TEXT = {"messages": [ask("which digit?"), say("7")]}
ROWS = {"image": [IMAGE], "images": [IMAGES], "video": [VIDEO], "all": [TEXT, IMAGES, VIDEO, IMAGE]}


def load_all(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module", params=KINDS)
def layouts(request, tmp_path_factory):
    """The same teacher in every layout, loaded."""
    root = tmp_path_factory.mktemp(request.param)
    for layout in LAYOUTS:
        make_nvila(root / layout, layout, request.param)
    return root, {layout: load_teacher(root / layout) for layout in LAYOUTS}


def test_every_layout_is_the_same_model(layouts):
    root, models = layouts
    first = models[LAYOUTS[0]]
    batch = encode_rows(load_processor(root / LAYOUTS[0]), [IMAGE, VIDEO])
    with torch.no_grad():
        expected = first(**batch).logits
        for layout, model in models.items():
            state = model.state_dict()
            assert state.keys() == first.state_dict().keys()
            assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items()), layout
            again = encode_rows(load_processor(root / layout), [IMAGE, VIDEO])
            assert all(torch.equal(value, again[name]) for name, value in batch.items())
            assert torch.equal(model(**again).logits, expected)
            assert model.config.vision_config.to_dict() == first.config.vision_config.to_dict()
            assert model.generation_config.to_dict() == first.generation_config.to_dict()


def test_every_tensor_has_its_place(layouts, tmp_path):
    root, models = layouts
    kind = next(kind for kind in KINDS if kind in root.name)
    tensors = make_nvila(tmp_path / "again", "nvila", kind)
    model = models["vila"]
    state, seen = model.state_dict(), set()
    for key, value in tensors.items():
        (name,) = map_teacher_key(key, model.config)
        assert torch.equal(state[name], value), key
        seen.add(name)
    assert seen == set(state)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_kept_attention_is_the_teacher(layouts, rows, tmp_path):
    """A Transformers model that loads and generates by itself, with the teacher's logits and tokens."""
    root, models = layouts
    report = convert(str(root / LAYOUTS[0]), str(tmp_path / "native"), keep_attention="all")
    assert (report.layers_replaced, report.layers_kept) == ([], [0, 1, 2, 3])
    assert report.parameters_before == report.parameters_after
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = AutoProcessor.from_pretrained(tmp_path / "native")
    batch, teacher = encode_rows(processor, rows), models[LAYOUTS[0]]
    with torch.no_grad():
        expected = teacher(**batch).logits
        assert expected.std() > 0.1  # the comparison would see a difference
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=0)
    prompts = encode_prompts(processor, rows)
    assert torch.equal(model.generate(**prompts, max_new_tokens=8), teacher.generate(**prompts, max_new_tokens=8))


def test_text_is_read_as_qwen2_reads_it(tmp_path):
    tensors = make_nvila(tmp_path / "teacher")
    configs, _ = make_parts()
    theirs = Qwen2ForCausalLM(Qwen2Config.from_dict(configs["llm"])).eval()
    llm = {name.removeprefix("llm."): t for name, t in tensors.items() if name.startswith("llm.")}
    theirs.load_state_dict(llm)
    batch = encode_rows(load_processor(tmp_path / "teacher"), [TEXT])
    with torch.no_grad():
        expected = theirs(batch["input_ids"]).logits
        torch.testing.assert_close(load_teacher(tmp_path / "teacher")(**batch).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["llava_llama", "nvila"])
def test_hybrid(layout, tmp_path):
    tensors = make_nvila(tmp_path / "teacher", layout)
    report = convert(str(tmp_path / "teacher"), str(tmp_path / "student"), keep_attention=[1], max_shard_size="100KB")
    assert (report.layers_replaced, report.layers_kept, report.dropped) == ([0, 2, 3], [1], [])
    assert report.parameters_before == sum(tensor.numel() for tensor in tensors.values())
    config, student = LinMUConfig.from_pretrained(tmp_path / "student"), load_all(tmp_path / "student")
    copied = {name: key for key in tensors for name in map_teacher_key(key, config)}
    assert {name for name in student if not is_new(name, config)} == set(copied)
    assert all(torch.equal(student[name], tensors[key]) for name, key in copied.items())
    assert len(copied) > len(tensors)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "student")
    processor = AutoProcessor.from_pretrained(tmp_path / "student")
    assert model(**encode_rows(processor, ROWS["all"])).loss.isfinite()
    assert not (tmp_path / "student" / "llm").exists()


def test_tied_head_and_vision_head(tmp_path):
    tensors = make_nvila(tmp_path / "teacher", tie=True, shard=None)
    extra = ["head.probe", "head.attention.in_proj_weight", "embeddings.position_ids"]
    rewrite(
        tmp_path / "teacher" / "vision_tower" / "model.safetensors",
        lambda tower: tower | {f"vision_model.{name}": torch.zeros(3) for name in extra},
    )
    report = convert(str(tmp_path / "teacher"), str(tmp_path / "student"))
    assert sorted(report.dropped) == sorted(f"vision_tower.vision_model.{name}" for name in extra)
    assert "llm.lm_head.weight" not in tensors and "lm_head.weight" not in load_all(tmp_path / "student")
    model = load_teacher(tmp_path / "teacher")
    assert torch.equal(model.lm_head.weight, tensors["llm.model.embed_tokens.weight"])


@pytest.mark.parametrize(
    "part, key",
    [
        ("llm", "model.layers.2.self_attn.k_proj.bias"),
        ("vision_tower", "vision_model.encoder.layers.1.mlp.fc2.weight"),
        ("mm_projector", "layers.2.bias"),
    ],
)
def test_missing_and_unknown_tensors_are_named(part, key, tmp_path, refused):
    make_nvila(tmp_path / "teacher", shard=None)
    file = tmp_path / "teacher" / part / "model.safetensors"
    whole = load_file(file)
    rewrite(file, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != key})
    refused(tmp_path / "teacher", f"lacks 1 tensor.s. that its config.json asks for, '{part}.{key}' first")
    rewrite(file, lambda tensors: whole | {f"{key}.scale": torch.zeros(2)})
    refused(tmp_path / "teacher", f"teacher tensor '{part}.{key}.scale' is unknown .* plain NVILA")
    rewrite(file, lambda tensors: whole | {key: whole[key][..., :-1].clone()})
    refused(tmp_path / "teacher", f"teacher tensor '{part}.{key}' has shape .* do not belong together")


def test_layers_that_the_config_does_not_have(tmp_path, refused):
    make_nvila(tmp_path / "teacher")
    change_json(tmp_path / "teacher" / "vision_tower" / "config.json", num_hidden_layers=2)
    refused(tmp_path / "teacher", r"teacher tensor 'vision_tower.vision_model.encoder.layers.2.* has no place")


def test_unsupported_teacher_is_refused_by_the_command(tmp_path, refused):
    make_nvila(tmp_path / "teacher")
    change_json(tmp_path / "teacher" / "config.json", image_aspect_ratio="ps3")
    refused(tmp_path / "teacher", "image_aspect_ratio='ps3' is not supported: give a checkpoint with one of")


@pytest.mark.parametrize("k", [3, 60, 120])
def test_killed_and_resumed(k, tmp_path, monkeypatch):
    make_nvila(tmp_path / "teacher")
    options = {"max_shard_size": "200KB", "keep_attention": [2]}
    convert(str(tmp_path / "teacher"), str(tmp_path / "whole"), **options)
    real, left = convert_module.write_shard, iter(range(k))

    def write_shard(file, tensors, progress):
        def step(n):
            if next(left, None) is None:
                raise Killed

        return real(file, tensors, step)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(convert_module, "write_shard", write_shard)
        convert(str(tmp_path / "teacher"), str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()
    convert(str(tmp_path / "teacher"), str(tmp_path / "out"), **options)
    whole, out = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("whole", "out"))
    assert whole == out


def test_a_part_that_changed_is_another_teacher(tmp_path):
    """Files of one name are in several sub-folders: all of them count."""
    make_nvila(tmp_path / "teacher", shard=None)
    plans = []
    for value in (0.0, 1.0):
        rewrite(
            tmp_path / "teacher" / "vision_tower" / "model.safetensors",
            lambda tensors, value=value: tensors | {"vision_model.post_layernorm.bias": torch.full((16,), value)},
        )
        source = open_source(tmp_path / "teacher")
        config = LinMUConfig.from_teacher(source.teacher.config, keep_attention="all")
        plans.append(convert_module.ConversionPlan(source, config, None).fingerprint({}))
    assert plans[0] != plans[1]


def test_dtype(tmp_path):
    make_nvila(tmp_path / "teacher")
    convert(str(tmp_path / "teacher"), str(tmp_path / "student"), dtype="bfloat16", keep_attention="all")
    assert {tensor.dtype for tensor in load_all(tmp_path / "student").values()} == {torch.bfloat16}
    assert {p.dtype for p in load_teacher(tmp_path / "teacher", dtype="bfloat16").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("license", ["cc-by-nc-4.0", None])
def test_command_writes_a_whole_folder_with_a_card(license, tmp_path):
    make_nvila(tmp_path / "NVILA-tiny", kind="lite")
    if license:
        (tmp_path / "NVILA-tiny" / "README.md").write_text(f"---\nlicense: {license}\n---\n# NVILA")
    assert main(["--teacher", str(tmp_path / "NVILA-tiny"), "--output_dir", str(tmp_path / "out")]) == 0
    check_folder(tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "# NVILA-tiny as LinMU" in card.text and "| family | NVILA |" in card.text
    text = card.text.partition("## License")[2]
    assert card.data.to_dict().get("license") == license
    assert (
        license or "was not found when this card was written. NVILA's published weights are under CC BY-NC"
    ) in text


def test_dry_run(tmp_path, capsys):
    make_nvila(tmp_path / "teacher")
    assert main(["--teacher", str(tmp_path / "teacher"), "--output_dir", str(tmp_path / "out"), "--dry_run"]) == 0
    assert "4 of 4 replaced by M-MATE" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.parametrize("new_rows", [0, 3])
def test_generation_never_says_a_media_token(new_rows, tmp_path):
    make_nvila(tmp_path / "teacher", new_rows=new_rows)
    rows = tmp_path / "teacher" / "llm"
    if new_rows:  # their rows shout loudest
        for file in rows.glob("*.safetensors"):
            rewrite(file, lambda tensors: {k: louder(t) if k == "lm_head.weight" else t for k, t in tensors.items()})
    convert(str(tmp_path / "teacher"), str(tmp_path / "native"), keep_attention="all")
    model = LinMUForConditionalGeneration.from_pretrained(tmp_path / "native")
    batch = encode_prompts(AutoProcessor.from_pretrained(tmp_path / "native"), [IMAGE])
    n = len(make_tokenizer())
    assert model.lm_head.weight.shape[0] == n + new_rows
    options = {"max_new_tokens": 6, "eos_token_id": -1}
    for sampled in ({}, {"do_sample": True, "top_k": 0}):
        new = model.generate(**batch, **options, **sampled)[:, batch["input_ids"].shape[1] :]
        assert new.max() < n
    if new_rows:
        model.generation_config.suppress_tokens = None
        assert model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].max() >= n


def louder(head: torch.Tensor) -> torch.Tensor:
    head = head.clone()
    head[-3] *= 300
    head[-2] = -head[-3]
    return head


def test_released_shapes_map_completely():
    """NVILA-8B by names and shapes: every tensor of the checkpoint has a place in the student, and none is left."""
    llm = Qwen2Config(
        vocab_size=151648, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4,
    )  # fmt: skip
    tower = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=448,
        patch_size=14, vision_use_head=False,
    )  # fmt: skip
    scales = {"image_aspect_ratio": "dynamic_s2", "s2_scales": [448, 896, 1344]}
    vision = NVILAVisionConfig(tower_config=tower, **scales, out_hidden_size=3584)
    config = LinMUConfig.from_teacher(NVILAConfig(text_config=llm, vision_config=vision), keep_attention=[3])
    with torch.device("meta"):
        theirs = {f"llm.{name}": t for name, t in Qwen2ForCausalLM(llm).state_dict().items()}
        for name, tensor in SiglipVisionModel(tower).state_dict().items():
            theirs[f"vision_tower.vision_model.{name.removeprefix('vision_model.')}"] = tensor
        student = LinMUForConditionalGeneration(config).state_dict()
    sizes = {1: (13824,), 2: (3584, 13824), 4: (3584, 3584)}
    for i, size in sizes.items():
        theirs[f"mm_projector.layers.{i}.weight"] = torch.empty(size, device="meta")
        theirs[f"mm_projector.layers.{i}.bias"] = torch.empty(size[:1], device="meta")
    mapped = {name: theirs[key] for key in theirs for name in map_teacher_key(key, config)}
    assert set(mapped) == {name for name in student if not is_new(name, config)}
    assert all(tensor.shape == student[name].shape for name, tensor in mapped.items())
    sizes = {part: sum(2 * t.numel() for n, t in theirs.items() if n.startswith(part)) for part in ("vision", "mm")}
    assert (round(sizes["vision"] / 1e6, 2), round(sizes["mm"] / 1e6, 2)) == (826.65, 124.85)  # as published, in bf16


def test_parts_are_really_different_between_kinds():
    shapes = {kind: make_parts(kind)[1]["mm_projector"]["layers.1.weight"].shape for kind in KINDS}
    assert shapes == {"8b": (192,), "lite": (144,), "video": (64,)}
