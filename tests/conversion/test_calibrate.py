import os

import pytest
import torch
from synthetic import ask, image, make_teacher, say

from linmu_hf import LinMUForConditionalGeneration
from linmu_hf.conversion import calibrate as calibrate_module
from linmu_hf.conversion.calibrate import calibrate
from linmu_hf.conversion.convert import convert
from linmu_hf.conversion.teacher import load_teacher
from linmu_hf.data import encode_rows


def make_rows(n):
    rows = []
    for i in range(n):
        row = {"messages": [ask(f"which digit {i}?", images=1), say("7"), ask("and?"), say("three")]}
        rows.append({**row, "images": [image(24, 40, i)]})
    rows[0] = {"messages": [ask("hi"), say("hello")]}
    rows[1] = {
        "messages": [ask("first?", videos=1), say("8")],
        "videos": [[image(16, 24, seed) for seed in range(4)]],
    }
    return rows


@pytest.fixture(scope="module")
def case(processor, tmp_path_factory):
    root = tmp_path_factory.mktemp("calibrate")
    make_teacher(root / "teacher", processor=processor)
    for name, options in {"plain": None, "layer_norm": "layer_norm"}.items():
        convert(
            str(root / "teacher"),
            str(root / name),
            keep_attention=[1],
            mixer_options={"output_norm": options},
        )
    rows = make_rows(12)
    batches = [encode_rows(processor, rows[first : first + 4]) for first in (0, 4, 8)]
    return root, load_teacher(root / "teacher"), batches


@pytest.mark.parametrize("name", ["plain", "layer_norm"])
def test_every_layer_comes_closer_on_held_out_samples(case, name):
    root, teacher, batches = case
    student = LinMUForConditionalGeneration.from_pretrained(root / name).eval()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    report = calibrate(student, teacher, batches)
    assert report.layers == [0, 2, 3]
    for old, new in zip(report.error_before, report.error_after, strict=True):
        assert new < old
    assert max(report.weight_growth) <= 1.5
    assert all(1e-12 < smallest < 1 for smallest in report.smallest_normalizer)
    changed = {key for key, value in student.state_dict().items() if not torch.equal(value, before[key])}
    assert changed <= set(report.changed) and any("o_proj" in key for key in changed)
    assert "mean" in str(report) and "kept: projections" in str(report)


def test_report_is_the_error_of_the_mixers(case):
    """The figures of the report, computed another way: student outputs fed with teacher inputs, over real tokens."""
    root, teacher, batches = case
    student = LinMUForConditionalGeneration.from_pretrained(root / "plain").eval()
    report = calibrate(student, teacher, batches)
    batch = {key: value for key, value in batches[-1].items() if key != "labels"}
    grids = {key: batch[key] for key in ("image_grid_thw", "mm_token_type_ids")}
    positions, layout = student.model.get_positions(batch["input_ids"], batch["attention_mask"], **grids)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        states = teacher(**batch, output_mixer_states=True)
        outputs = student.model.language_model.run_mixers(
            states.mixer_inputs, attention_mask=batch["attention_mask"], position_ids=positions, vision_layout=layout
        )
    for layer, error in zip(report.layers, report.error_after, strict=True):
        ours, theirs = outputs[layer][real], states.mixer_outputs[layer][real]
        assert float((ours - theirs).square().sum() / theirs.square().sum()) == pytest.approx(error, rel=1e-4)


def test_strong_pull_leaves_the_teachers_weights(case):
    root, teacher, batches = case
    student = LinMUForConditionalGeneration.from_pretrained(root / "plain").eval()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    calibrate(student, teacher, batches, strength=1e9)
    for key, value in student.state_dict().items():
        if "fusion_proj" not in key:
            torch.testing.assert_close(value, before[key], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("factor", [-3.0, float("nan")])
def test_a_fit_that_leads_astray_is_left(case, monkeypatch, factor):
    """Maps that are wrong on the student's own path are not kept, whatever they do on the teacher's."""
    root, teacher, batches = case
    student, start = (LinMUForConditionalGeneration.from_pretrained(root / "plain").eval() for _ in range(2))

    def astray(mixer, moments, strength, max_growth):
        mixer.flex_ma.o_proj.weight.mul_(factor)
        return 3.0

    monkeypatch.setattr(calibrate_module, "_fit_projections", astray)
    report = calibrate(student, teacher, batches)
    best = min(report.path["start"], report.path["lambda"])
    assert not report.path["projections"] <= best and set(report.weight_growth) == {1.0}
    assert "kept: projections" not in str(report)
    for (name, weight), before in zip(student.named_parameters(), start.parameters(), strict=True):
        if "fusion_proj" not in name:
            assert torch.equal(weight, before), name


@torch.no_grad()
def test_lambda_is_where_the_output_is_nearest_to_the_teachers(case):
    """A little more or less of the scan in any head of text or vision is worse."""
    root, teacher, batches = case
    student = LinMUForConditionalGeneration.from_pretrained(root / "plain").eval()
    mixer = student.model.language_model.layers[2].mixer
    calibrate_module._fit_shares(student, teacher, batches[:2], {2: mixer})

    def error():
        found = calibrate_module._errors(student, teacher, batches[:2], [2])[0]
        return found[2]

    best = error()
    for proj in (mixer.fusion_proj, mixer.text_fusion_proj):
        for head in range(len(proj.bias)):
            share = float(proj.bias[head].sigmoid())
            for other in (share * 0.9, share * 1.1):
                if 0.021 < share < 0.88:
                    proj.bias[head] = torch.logit(torch.tensor(other))
                    assert error() > best * (1 - 1e-4)
            proj.bias[head] = torch.logit(torch.tensor(share))


def test_growth_is_bounded(case):
    root, teacher, batches = case
    student = LinMUForConditionalGeneration.from_pretrained(root / "plain").eval()
    report = calibrate(student, teacher, batches, strength=1e-12, max_growth=1.1)
    assert max(report.weight_growth) <= 1.1


def test_layers_one_at_a_time_give_the_same(case):
    root, teacher, batches = case
    students = [LinMUForConditionalGeneration.from_pretrained(root / "plain").eval() for _ in range(2)]
    calibrate(students[0], teacher, batches)
    calibrate(students[1], teacher, batches, layers_at_once=1)
    for ours, theirs in zip(students[0].parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_calibrated_conversion(case, tmp_path, monkeypatch):
    root, teacher, batches = case
    options = {"keep_attention": [1], "max_shard_size": "200KB", "calibration_batches": batches}
    report = convert(str(root / "teacher"), str(tmp_path / "out"), **options)
    expected = LinMUForConditionalGeneration.from_pretrained(root / "plain").eval()
    calibrate(expected, teacher, batches)
    actual = LinMUForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    for ours, theirs in zip(actual.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert report.calibration.error_after < report.calibration.error_before

    class Killed(BaseException):
        pass

    real, calls = os.replace, iter(range(1000))
    total = sum(1 for _ in (tmp_path / "out").glob("*.safetensors"))

    def replace_or_die(source, target):
        if next(calls) == 2 * total + 6:  # all shards and notes, three other files, some calibrated shards
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", replace_or_die)
        convert(str(root / "teacher"), str(tmp_path / "again"), **options)
    assert not (tmp_path / "again").exists()
    with pytest.raises(OSError, match="valid JSON"):
        LinMUForConditionalGeneration.from_pretrained(tmp_path / "again.incomplete")
    convert(str(root / "teacher"), str(tmp_path / "again"), **options)
    for path in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_bad_arguments(case):
    root, teacher, batches = case
    student = LinMUForConditionalGeneration.from_pretrained(root / "plain")
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(student, teacher, [])
    with pytest.raises(ValueError, match="strength=0"):
        calibrate(student, teacher, batches, strength=0)
