import json

import pytest
import torch
from safetensors.torch import load_file
from synthetic import ask, image, make_teacher, say
from transformers import AutoModelForImageTextToText, AutoProcessor

from linmu_hf import LinMUConfig, LinMUForConditionalGeneration
from linmu_hf import safetensors_io as checkpoint
from linmu_hf.conversion.convert import convert, parse_size
from linmu_hf.conversion.weight_map import is_new, map_teacher_key
from linmu_hf.data import encode_rows
from linmu_hf.modeling.mixers import MIXERS


LAYER = "model.language_model.layers.{}."


@pytest.fixture(scope="module", params=["sharded", "one file", "memory names", "tied"])
def case(request, processor, tmp_path_factory):
    """A teacher in memory, its folder, and the folder converted with attention kept in layer 1."""
    root = tmp_path_factory.mktemp("case")
    teacher = make_teacher(
        root / "teacher",
        processor=processor,
        tie=request.param == "tied",
        hub_names=request.param != "memory names",
        shard=None if request.param == "one file" else "60KB",
    )
    report = convert(str(root / "teacher"), str(root / "student"), keep_attention=[1], max_shard_size="100KB")
    return teacher, root, report


def load_all(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_every_copied_tensor_equals_the_teachers(case):
    teacher, root, _ = case
    student, theirs = load_all(root / "student"), teacher.state_dict()
    config = LinMUConfig.from_pretrained(root / "student")
    seen = set()
    for key, value in theirs.items():
        for name in map_teacher_key(key, config) or ():
            assert torch.equal(student[name], value), name
            seen.add(name)
    assert {name for name in student if not is_new(name, config)} == seen
    assert ("lm_head.weight" in student) != config.tie_word_embeddings


def test_weight_reuse_is_equations_4_and_5(case):
    teacher, root, _ = case
    student, theirs = load_all(root / "student"), teacher.state_dict()
    expected = {
        "flex_ma.forward_scan.c_proj": "q_proj",
        "flex_ma.forward_scan.b_proj": "k_proj",
        "flex_ma.reverse_scan.c_proj": "q_proj",
        "flex_ma.reverse_scan.b_proj": "k_proj",
        "flex_ma.x_proj": "v_proj",
        "flex_ma.o_proj": "o_proj",
        "local_swin.q_proj": "q_proj",
        "local_swin.k_proj": "k_proj",
        "local_swin.v_proj": "v_proj",
        "local_swin.o_proj": "o_proj",
    }
    for layer in (0, 2, 3):
        for ours, name in expected.items():
            for kind in ("weight",) if name == "o_proj" else ("weight", "bias"):
                copied = student[f"{LAYER.format(layer)}mixer.{ours}.{kind}"]
                assert torch.equal(copied, theirs[f"{LAYER.format(layer)}self_attn.{name}.{kind}"])


def test_student_loads_through_the_auto_classes_and_runs(case, processor):
    _, root, _ = case
    model, info = AutoModelForImageTextToText.from_pretrained(root / "student", output_loading_info=True)
    assert type(model) is LinMUForConditionalGeneration
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.text_config.layer_types == ["m_mate", "full_attention", "m_mate", "m_mate"]
    ours = AutoProcessor.from_pretrained(root / "student")
    row = {"messages": [ask("which digit?", images=1), say("7")], "images": [image(24, 40)]}
    batch = encode_rows(ours, [row])
    assert torch.equal(batch["input_ids"], encode_rows(processor, [row])["input_ids"])
    assert model(**batch).loss.isfinite()


def test_new_parameters_are_those_of_a_fresh_model(case):
    _, root, _ = case
    config = LinMUConfig.from_pretrained(root / "student")
    fresh = LinMUForConditionalGeneration(config).state_dict()
    student = load_all(root / "student")
    new = [name for name in student if is_new(name, config)]
    assert any(name.endswith("A_log") for name in new)
    for name in new:
        torch.testing.assert_close(student[name], fresh[name], rtol=0, atol=0)


def test_report(case):
    teacher, root, report = case
    assert (report.layers_replaced, report.layers_kept) == ([0, 2, 3], [1])
    assert report.parameters_before == sum(parameter.numel() for parameter in teacher.parameters())
    assert report.parameters_after == sum(tensor.numel() for tensor in load_all(root / "student").values())
    assert report.bytes_written == sum(tensor.nbytes for tensor in load_all(root / "student").values())
    assert report.seconds > 0 and report.peak_memory_bytes > 0
    assert "3 of 4 replaced by M-MATE, attention kept in [1]" in str(report)
    json.dumps(report.to_dict())


def test_nothing_else_is_left(case):
    _, root, _ = case
    assert {path.name for path in root.iterdir()} == {"teacher", "student"}
    names = {path.name for path in (root / "student").iterdir()}
    assert "conversion.json" not in names and not any(name.endswith(".part") for name in names)
    for name in ("tokenizer.json", "processor_config.json", "chat_template.jinja", "generation_config.json"):
        assert (root / "student" / name).read_bytes() == (root / "teacher" / name).read_bytes()


def test_keep_all_is_the_teacher(processor, tmp_path):
    teacher = make_teacher(tmp_path / "teacher", processor=processor)
    convert(str(tmp_path / "teacher"), str(tmp_path / "student"), keep_attention="all")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "student")
    row = {"messages": [ask("which digit?", images=1), say("7")], "images": [image(24, 40)]}
    batch = encode_rows(processor, [row])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, teacher(**batch).logits, atol=1e-4, rtol=0)


def test_dtype_spares_the_decays(processor, tmp_path):
    make_teacher(tmp_path / "teacher", processor=processor)
    report = convert(str(tmp_path / "teacher"), str(tmp_path / "student"), dtype="bfloat16")
    assert report.dtype == "bfloat16"
    for name, tensor in load_all(tmp_path / "student").items():
        in_fp32 = name.rsplit(".", 1)[-1] in ("A_log", "dt_bias", "D")
        assert tensor.dtype == (torch.float32 if in_fp32 else torch.bfloat16), name
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "student", dtype="auto")
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.language_model.layers[0].mixer.flex_ma.forward_scan.A_log.dtype == torch.float32


def test_large_tensors_are_copied_in_chunks(processor, tmp_path, monkeypatch):
    make_teacher(tmp_path / "teacher", processor=processor)
    for dtype in ("float32", "bfloat16"):
        convert(str(tmp_path / "teacher"), str(tmp_path / f"whole-{dtype}"), dtype=dtype)
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 1024)
    for dtype in ("float32", "bfloat16"):
        convert(str(tmp_path / "teacher"), str(tmp_path / f"chunks-{dtype}"), dtype=dtype)
        whole, chunks = (tmp_path / f"{kind}-{dtype}" / "model.safetensors" for kind in ("whole", "chunks"))
        assert whole.read_bytes() == chunks.read_bytes()


def test_options_reach_the_student(processor, tmp_path):
    make_teacher(tmp_path / "teacher", processor=processor)
    options = {"gate": "head", "window_size": [8, 2, 2]}
    convert(str(tmp_path / "teacher"), str(tmp_path / "student"), preset="paper", mixer_options=options)
    text = LinMUConfig.from_pretrained(tmp_path / "student").text_config
    assert (text.gate, text.window_size, text.output_norm) == ("head", [8, 2, 2], "layer_norm")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "student")


def test_dry_run_writes_nothing(processor, tmp_path):
    make_teacher(tmp_path / "teacher", processor=processor)
    dry = convert(str(tmp_path / "teacher"), str(tmp_path / "student"), dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
    wet = convert(str(tmp_path / "teacher"), str(tmp_path / "student"))
    assert (dry.bytes_written, dry.parameters_after) == (wet.bytes_written, wet.parameters_after)
    assert "would write" in str(dry) and "wrote" in str(wet)


def test_rotary_buffers_of_old_checkpoints_are_dropped(processor, tmp_path):
    from synthetic import rewrite

    make_teacher(tmp_path / "teacher", processor=processor, shard=None)
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(tmp_path / "teacher" / "model.safetensors", lambda tensors: {**tensors, key: torch.ones(8)})
    report = convert(str(tmp_path / "teacher"), str(tmp_path / "student"))
    assert report.dropped == [key]


def test_every_projection_of_the_table_exists():
    for mixer in MIXERS.values():
        assert mixer.from_teacher.keys() == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("keep", [(), (0, 3), "all"])
@pytest.mark.parametrize("options", [{}, {"preset": "paper"}])
def test_map_is_complete(processor, tie, keep, options):
    """Teacher keys and new parameters, together, are exactly the student's tensors; each once."""
    from synthetic import HUB_NAMES, make_teacher_config
    from transformers import Qwen2_5_VLForConditionalGeneration

    teacher_config = make_teacher_config(processor, tie)
    config = LinMUConfig.from_teacher(teacher_config, keep_attention=keep, **options)
    with torch.device("meta"):
        keys = list(Qwen2_5_VLForConditionalGeneration(teacher_config).state_dict())
        student = set(LinMUForConditionalGeneration(config).state_dict())
    if tie:
        student.remove("lm_head.weight")
    hub = [
        next((key.replace(ours, hub, 1) for ours, hub in HUB_NAMES.items() if key.startswith(ours)), key)
        for key in keys
    ]
    for names in (keys, hub):
        mapped = [target for key in names for target in map_teacher_key(key, config) or ()]
        assert len(mapped) == len(set(mapped))
        assert set(mapped) == {name for name in student if not is_new(name, config)}


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.9.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.qweight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "score.weight",
        "transformer.h.0.ln_1.weight",
    ],
)
def test_unknown_keys_are_named(processor, key):
    from synthetic import make_teacher_config

    with pytest.raises(ValueError, match=f"teacher tensor '{key}' is unknown"):
        map_teacher_key(key, LinMUConfig.from_teacher(make_teacher_config(processor)))


def test_sizes():
    assert [parse_size(size) for size in ("500MB", "2GB", "17", 17)] == [500_000_000, 2_000_000_000, 17, 17]
    for size in ("2 apples", "", "0", "-1GB", "GB"):
        with pytest.raises(ValueError, match="max_shard_size"):
            parse_size(size)
