import os
from functools import partial

import pytest
import torch
from killing import Killed
from synthetic import ask, image, make_teacher, say

from linmu_hf import LinMUForConditionalGeneration
from linmu_hf.conversion.calibrate import calibrate
from linmu_hf.conversion.calibration import fits
from linmu_hf.conversion.calibration.walk import Walk
from linmu_hf.conversion.convert import convert
from linmu_hf.conversion.teacher import load_teacher
from linmu_hf.data import encode_rows
from linmu_hf.distillation.costs.accounting import Account


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
    short = {"text_window": 4, "sink_tokens": 1}  # some text is scanned, some is not
    for name, options in {"plain": {}, "layer_norm": {"output_norm": "layer_norm"}, "short": short}.items():
        convert(str(root / "teacher"), str(root / name), keep_attention=[1], mixer_options=options)
    rows = make_rows(12)
    batches = [encode_rows(processor, rows[first : first + 4]) for first in (0, 4, 8)]
    return root, load_teacher(root / "teacher"), batches


@pytest.mark.parametrize("name", ["plain", "layer_norm"])
def test_every_layer_comes_closer_on_held_out_samples(case, name):
    root, teacher, batches = case
    student = LinMUForConditionalGeneration.from_pretrained(root / name).eval()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    report = calibrate(student, teacher, batches)
    assert [one.layer for one in report.layers] == [0, 2, 3]
    for one in report.layers:
        assert one.error_after < one.error_before
        assert one.weight_growth <= 1.5
        smallest = smallest_normalizer(student, teacher, batches, one.layer)
        assert one.smallest_normalizer == pytest.approx(smallest, rel=1e-4)
    assert report.kept[-1] == "projections"
    assert report.path_after < report.path_before
    changed = {key for key, value in student.state_dict().items() if not torch.equal(value, before[key])}
    assert changed <= set(report.changed) and any("o_proj" in key for key in changed)
    assert "mean" in str(report) and f"kept: {', '.join(report.kept)}" in str(report)


@torch.no_grad()
def smallest_normalizer(student, teacher, batches, layer):
    """The least that the forward scan divides by, by loops over the held-out tokens, in float64."""
    walk = Walk(student, teacher, batches)
    for number in walk.layers():
        if number == layer:
            ((mixer_input, _, rope, layout),) = list(walk.states(layer, [walk.held_out]))
    mixer = student.model.language_model.layers[layer].mixer
    order = layout.orders[student.config.text_config.scan_order(layer)]
    in_order = [tensor.flatten(0, 1).index_select(0, order) for tensor in (mixer_input, *rope)]
    scan = mixer.flex_ma._forward_scan(in_order[0], in_order[1:], layout)[1]
    dt, A, B, C = (tensor.double() for tensor in (scan.dt, scan.A, scan.B, scan.C))
    h, s, g = C.shape[1], dt.shape[1], B.shape[1]
    found, first = [], 0
    for length in scan.segments.lengths:
        for head in range(h):
            state, i = head * s // h, head * g // h
            summed = torch.zeros_like(B[0, 0])
            for t in range(first, first + length):
                summed = (dt[t, state] * A[state]).exp() * summed + dt[t, state] * B[t, i]
                found.append(float(C[t, head] @ summed))
        first += length
    return min(found)


def read_branches(mixer, mixer_input, rope, layout):
    """What the output projections of both branches read, [n, h p] each."""
    read = []
    projections = (mixer.flex_ma.o_proj, mixer.local_swin.o_proj)
    hooks = [one.register_forward_pre_hook(lambda _, args: read.append(args[0])) for one in projections]
    mixer(mixer_input, rope, layout)
    for hook in hooks:
        hook.remove()
    return read


def ridge(features, target, strength, start=0.0):
    """The x nearest to `start` with features x = target, from the rows themselves and not from their sums."""
    n = features.shape[1]
    start = features.new_zeros(n, target.shape[1]) + start
    pull = (strength * features.square().sum() / n).sqrt()
    rows = torch.cat([features, pull * torch.eye(n).to(features)]), torch.cat([target, pull * start])
    return torch.linalg.lstsq(*rows).solution


def run_whole(model, batch):
    """Mixer inputs and outputs and hidden states of every layer, from one forward pass."""
    batch = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        return model(**batch, output_mixer_states=True, output_hidden_states=True)


@torch.no_grad()
def fit_slowly(student, teacher, batches):
    """The slow truth of a calibration that keeps all fits: whole forward passes, all states of a layer at once."""
    text, where = student.model.language_model, []
    for batch in batches:
        grids = {key: batch.get(key) for key in ("image_grid_thw", "video_grid_thw", "mm_token_type_ids")}
        mask, embeds = batch["attention_mask"], text.embed_tokens(batch["input_ids"])
        positions, vision = student.model.get_positions(batch["input_ids"], mask, **grids)
        where.append((*text.prepare(embeds, mask, positions, vision)[:2], mask.bool().flatten()))
    theirs = [run_whole(teacher, batch) for batch in batches]
    for index in (index for index, layer in enumerate(text.layers) if layer.recurrent):
        mixer = text.layers[index].mixer
        inputs = [known.mixer_inputs[index] for known in theirs]
        targets = [known.mixer_outputs[index].flatten(0, 1) for known in theirs]
        projections = mixer.flex_ma.o_proj, mixer.local_swin.o_proj
        maps = [one.weight.unflatten(1, (-1, mixer.config.head_dim)) for one in projections]
        rows = {"text_fusion_proj": [], "fusion_proj": []}
        for mixer_input, target, (rope, layout, real) in zip(inputs, targets, where):
            ends = []
            for bias in (40.0, -40.0):  # lambda 1 and 0
                for name in rows:
                    getattr(mixer, name).bias.fill_(bias)
                ends.append(read_branches(mixer, mixer_input, rope, layout)[bias < 0])
            far, near = (
                torch.einsum("nhp,dhp->ndh", x.unflatten(1, (-1, w.shape[-1])), w) for x, w in zip(ends, maps)
            )
            vision = torch.zeros_like(real).index_fill(0, layout.vision, True)
            chosen = {"text_fusion_proj": real & ~vision & (ends[0] != 0).any(1), "fusion_proj": vision}
            for name, tokens in chosen.items():
                missing = (target - near.sum(-1))[tokens]
                rows[name].append(((far - near)[tokens].flatten(0, 1), missing.flatten()[:, None]))
        for name, parts in rows.items():
            share = ridge(*(torch.cat(each) for each in zip(*parts)), 1e-3)[:, 0].clamp(0.02, 0.98)
            getattr(mixer, name).bias.copy_(torch.logit(share))
        z, target = [], torch.cat([target[real] for target, (*_, real) in zip(targets, where)])
        for mixer_input, (rope, layout, real) in zip(inputs, where):
            z.append(torch.cat(read_branches(mixer, mixer_input, rope, layout), -1)[real])
        found = ridge(torch.cat(z), target, 0.1, torch.cat([one.flatten(1) for one in maps], 1).T)
        for one, weight in zip(projections, found.T.chunk(2, 1)):
            one.weight.copy_(weight)


def test_layer_by_layer_is_what_whole_passes_give(case):
    root, _, batches = case
    teacher = load_teacher(root / "teacher").double()
    batches = [{key: v.double() if v.is_floating_point() else v for key, v in batch.items()} for batch in batches]
    students = [LinMUForConditionalGeneration.from_pretrained(root / "short").double().eval() for _ in range(2)]
    report = calibrate(students[0], teacher, (batch for batch in batches), max_growth=10)
    assert report.kept == ["lambda", "projections"]
    fit_slowly(students[1], teacher, batches[:-1])
    for (name, ours), truth in zip(students[0].named_parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("layer", [0, 3])
def test_the_scan_is_trained_by_adam(case, layer):
    """Five steps, against a loop over the mixer's own parameters in float64: texts, images and a video."""
    root, teacher, batches = case
    teacher = load_teacher(root / "teacher").double()
    batches = [{key: v.double() if v.is_floating_point() else v for key, v in batch.items()} for batch in batches]
    mixers, states = [], []
    for _ in range(3):
        student = LinMUForConditionalGeneration.from_pretrained(root / "short").double().eval().requires_grad_(False)
        walk = Walk(student, teacher, batches)
        assert layer in walk.layers()  # and stops there
        mixers.append(student.model.language_model.layers[layer].mixer)
        states.append(partial(walk.states, layer, walk.fitted))
    ours, truth, start = mixers
    fits.fit_scan(ours, states[0], steps=5, learning_rate=2e-2)
    assert not any(one.requires_grad for one in ours.parameters())

    scans, joins = (
        (truth.flex_ma.forward_scan, truth.flex_ma.reverse_scan),
        (truth.fusion_proj, truth.text_fusion_proj),
    )
    trained = [one for scan in scans for one in (scan.b_features, scan.c_features, scan.dt_proj.weight, scan.dt_bias)]
    trained += [one for join in (*joins, truth.flex_ma.gate_proj) for one in (join.weight, join.bias)]
    optimizer = torch.optim.Adam([one.requires_grad_() for one in trained], betas=(0.9, 0.98))
    for i, rate in enumerate((1, 1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4)):
        mixer_input, target, rope, layout = list(states[1]())[i % 2]
        real = batches[i % 2]["attention_mask"].bool()
        missing = (truth(mixer_input, rope, layout) - target)[real]
        (missing.square().sum() / target[real].square().sum()).backward()
        optimizer.param_groups[0]["lr"] = 2e-2 * rate
        optimizer.step()
        optimizer.zero_grad()
    before, after = dict(start.named_parameters()), dict(truth.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, after[name].detach(), rtol=1e-9, atol=1e-12, msg=name)
    assert sum(not torch.equal(one, before[name]) for name, one in ours.named_parameters()) == len(trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_scan_comes_closer(case, dtype):
    root, teacher, batches = case
    reports = []
    for scan_steps in (0, 30):
        student = LinMUForConditionalGeneration.from_pretrained(root / "short", dtype=dtype).eval()
        kinds = {name: one.dtype for name, one in student.named_parameters()}
        reports.append(calibrate(student, teacher, batches, scan_steps=scan_steps))
        assert kinds == {name: one.dtype for name, one in student.named_parameters()}
        assert set(reports[-1].changed) <= set(kinds)
    without, trained = reports
    assert "scan" in trained.kept and "scan" not in without.kept
    assert trained.path_after < without.path_after
    for one, other in zip(trained.layers, without.layers):
        assert one.error_after < other.error_after and one.error_before == pytest.approx(other.error_before)


def test_steps_that_lead_astray_are_left(case, monkeypatch):
    root, teacher, batches = case
    student, start = (LinMUForConditionalGeneration.from_pretrained(root / "short").eval() for _ in range(2))
    monkeypatch.setattr(fits, "fit_scan", lambda mixer, *_: mixer.flex_ma.forward_scan.c_features.normal_(0, 100))
    report = calibrate(student, teacher, batches, scan_steps=3)
    assert "scan" not in report.kept and report.path_after < report.path_before
    for (name, weight), before in zip(student.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(weight, before) or "o_proj" in name or "fusion_proj.bias" in name, name


@pytest.mark.parametrize("scan_steps", [0, 2])
def test_memory_is_that_of_one_layer(processor, tmp_path, scan_steps):
    """
    The most bytes of all tensors that are alive at once, beside the models' and a copy of what is fitted, for 4 layers
    and for 10.
    """
    batches, peaks = [encode_rows(processor, make_rows(4)[first : first + 2]) for first in (0, 2)], []
    for layers in (4, 10):
        make_teacher(tmp_path / str(layers), processor=processor, layers=layers)
        convert(str(tmp_path / str(layers)), str(tmp_path / f"student-{layers}"))
        student = LinMUForConditionalGeneration.from_pretrained(tmp_path / f"student-{layers}").eval()
        teacher = load_teacher(tmp_path / str(layers))
        weights = [*student.parameters(), *student.buffers(), *teacher.parameters(), *teacher.buffers()]
        with Account() as account:
            for weight in weights:
                account.hold(weight)
            held = account.peak
            changed = calibrate(student, teacher, batches, scan_steps=scan_steps).changed
        copied = sum(student.get_parameter(name).nbytes for name in changed)
        peaks.append(account.peak - held - copied)
    assert 0 < peaks[1] <= 1.02 * peaks[0]


def test_report_is_the_error_of_the_mixers(case):
    """The figures of the report, from whole forward passes over real tokens."""
    root, teacher, batches = case
    student = LinMUForConditionalGeneration.from_pretrained(root / "plain").eval()
    report = calibrate(student, teacher, batches)
    real = batches[-1]["attention_mask"].bool().flatten()
    known, own = (run_whole(model, batches[-1]) for model in (teacher, student))
    grids = {key: batches[-1].get(key) for key in ("image_grid_thw", "video_grid_thw", "mm_token_type_ids")}
    text, mask = student.model.language_model, batches[-1]["attention_mask"]
    where = text.prepare(
        own.hidden_states[0], mask, *student.model.get_positions(batches[-1]["input_ids"], mask, **grids)
    )

    def error(ours, theirs):
        return float((ours - theirs)[real].square().sum() / theirs[real].square().sum())

    for one in report.layers:
        with torch.no_grad():
            ours = text.layers[one.layer].mixer(known.mixer_inputs[one.layer], *where[:2])
        ours, theirs = (states.flatten(0, 1) for states in (ours, known.mixer_outputs[one.layer]))
        assert error(ours, theirs) == pytest.approx(one.error_after, rel=1e-4)
    ours, theirs = (states.hidden_states[-1].flatten(0, 1) for states in (own, known))
    assert error(ours, theirs) == pytest.approx(report.path_after, rel=1e-4)


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

    def astray(mixer, states, strength, max_growth):
        mixer.flex_ma.o_proj.weight.mul_(factor)
        return 3.0

    monkeypatch.setattr(fits, "fit_projections", astray)
    report = calibrate(student, teacher, batches)
    assert report.kept == ["lambda"]
    assert all(one.weight_growth == 1 and one.error_after < one.error_before for one in report.layers)
    assert report.path_after < report.path_before
    for (name, weight), before in zip(student.named_parameters(), start.parameters(), strict=True):
        if "fusion_proj" not in name:
            assert torch.equal(weight, before), name


@torch.no_grad()
def test_lambda_is_where_the_output_is_nearest_to_the_teachers(case):
    """A little more or less of the scan in any head of text or vision is worse."""
    root, teacher, batches = case
    student = LinMUForConditionalGeneration.from_pretrained(root / "plain").eval()
    mixer = student.model.language_model.layers[2].mixer
    walk = Walk(student, teacher, batches)
    assert next(layer for layer in walk.layers() if layer == 2)
    fits.fit_shares(mixer, walk.states(2, walk.fitted))

    def error():
        return fits.measure(mixer, walk.states(2, walk.fitted))[0]

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
    assert max(one.weight_growth for one in report.layers) <= 1.1


def test_calibrated_conversion(case, tmp_path, monkeypatch):
    root, teacher, batches = case
    options = {"keep_attention": [1], "max_shard_size": "200KB", "calibration_batches": batches}
    report = convert(str(root / "teacher"), str(tmp_path / "out"), **options)
    expected = LinMUForConditionalGeneration.from_pretrained(root / "plain").eval()
    calibrate(expected, teacher, batches)
    actual = LinMUForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    for ours, theirs in zip(actual.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert report.calibration.path_after < report.calibration.path_before

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
    with pytest.raises(ValueError, match=r"scan_steps=-1 must"):
        calibrate(student, teacher, batches, scan_steps=-1)
    with pytest.raises(ValueError, match="calibration_steps=5 must be 0, or positive with samples"):
        convert(str(root / "teacher"), str(root / "none"), calibration_steps=5)
    assert not (root / "none").exists()
    with pytest.raises(ValueError, match="nothing to calibrate"):
        calibrate(teacher, teacher, batches)
