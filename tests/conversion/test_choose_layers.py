"""The layers that keep attention are those whose replacement alone changes the teacher's answers most."""

import pytest
import torch
from synthetic import ask, image, make_teacher, say

from linmu_hf import LinMUForConditionalGeneration
from linmu_hf.commands.convert import main
from linmu_hf.conversion.choose_layers import choose_attention_layers, replacement_costs
from linmu_hf.conversion.convert import convert
from linmu_hf.conversion.teacher import load_teacher
from linmu_hf.data import encode_rows


OPTIONS = {"text_window": 4, "sink_tokens": 1}


@pytest.fixture(scope="module")
def case(processor, tmp_path_factory):
    root = tmp_path_factory.mktemp("choose")
    make_teacher(root / "teacher", processor=processor)
    convert(str(root / "teacher"), str(root / "student"), mixer_options=OPTIONS)
    rows = [{"messages": [ask(f"which {i}?", images=1), say("7")], "images": [image(24, 40, i)]} for i in range(2)]
    rows.append({"messages": [ask("hi, how are you today?"), say("hello")]})
    batches = [encode_rows(processor, rows[:2]), encode_rows(processor, rows[1:])]
    return root, load_teacher(root / "teacher"), batches


@torch.no_grad()
def test_the_cost_of_a_layer_is_what_a_model_without_it_loses(case, tmp_path):
    root, teacher, batches = case
    student = LinMUForConditionalGeneration.from_pretrained(root / "student").eval()
    costs = replacement_costs(student, teacher, batches)
    n = len(costs)
    assert n == student.config.text_config.num_hidden_layers
    for layer in range(n):
        kept = [other for other in range(n) if other != layer]
        folder = tmp_path / str(layer)
        convert(str(root / "teacher"), str(folder), keep_attention=kept, mixer_options=OPTIONS)
        hybrid = LinMUForConditionalGeneration.from_pretrained(folder).eval()
        total = count = 0
        for batch in batches:
            inputs, real = {k: v for k, v in batch.items() if k != "labels"}, batch["attention_mask"].bool()
            known, found = (model(**inputs).logits[real].log_softmax(-1) for model in (teacher, hybrid))
            total, count = total + float((known.exp() * (known - found)).sum()), count + int(real.sum())
        assert costs[layer] == pytest.approx(total / count, rel=1e-3, abs=1e-7)
    dearest = max(range(n), key=costs.__getitem__)
    assert choose_attention_layers(student, teacher, batches, 1) == [dearest]


def test_a_conversion_keeps_the_dearest(case, tmp_path):
    root, teacher, batches = case
    student = LinMUForConditionalGeneration.from_pretrained(root / "student").eval()
    options = {"keep_attention": "auto:2", "mixer_options": OPTIONS, "calibration_batches": batches}
    report = convert(str(root / "teacher"), str(tmp_path / "out"), **options)
    assert report.layers_kept == choose_attention_layers(student, teacher, batches, 2)
    kinds = LinMUForConditionalGeneration.from_pretrained(tmp_path / "out").config.text_config.layer_types
    assert [layer for layer, kind in enumerate(kinds) if kind == "full_attention"] == report.layers_kept


@pytest.mark.parametrize("text", ["auto:0", "auto:99", "auto:", "auto:x"])
def test_impossible_numbers(case, tmp_path, text):
    root, _, batches = case
    with pytest.raises(ValueError, match=f"{text}.*from 1 to"):
        convert(str(root / "teacher"), str(tmp_path / "out"), keep_attention=text, calibration_batches=batches)


def test_it_needs_data(case, tmp_path, capsys):
    root, _, _ = case
    with pytest.raises(ValueError, match=r"auto:1.*calibration samples"):
        convert(str(root / "teacher"), str(tmp_path / "out"), keep_attention="auto:1")
    where = ["--teacher", str(root / "teacher"), "--output_dir", str(tmp_path / "out")]
    assert main([*where, "--keep_attention", "auto:1"]) != 0
    assert "--calibrate" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
