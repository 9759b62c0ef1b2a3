"""Fidelity is what loops over tokens, heads and pairs give, and a student that is its teacher has no error."""

import math

import pytest
import tiny
import torch

from linmu_hf import LinMUForConditionalGeneration
from linmu_hf.evaluation.fidelity.groups import band, band_name, group_tokens
from linmu_hf.evaluation.fidelity.measure import Fidelity, measure
from linmu_hf.evaluation.fidelity.plots import format_report, plot_report
from linmu_hf.evaluation.fidelity.reach import exact_reach


PARTS = (4, ("image", 3, 5), 9, ("video", 3, 3, 4), 7)
TYPES = {"full": ["full_attention"] * 4, "hybrid": ["m_mate", "full_attention", "m_mate", "m_mate"]}


def teacher_of(student) -> LinMUForConditionalGeneration:
    """All attention, with the student's own embeddings, MLPs and norms; attention that is another's."""
    teacher = tiny.model(seed=5, layer_types=TYPES["full"])
    teacher.set_attn_implementation("eager")
    own = {name: value for name, value in student.state_dict().items() if name in teacher.state_dict()}
    teacher.load_state_dict({name: value for name, value in own.items() if ".mixer." not in name}, strict=False)
    return teacher


def layout_of(model, inputs):
    _, vision_layout = model.model.get_positions(inputs["input_ids"], None, **grids(inputs))
    t = inputs["input_ids"].shape[1]
    positions = torch.arange(t).expand(3, 1, t)
    embeds = torch.zeros(1, t, 32, dtype=torch.float64)
    _, layout, _ = model.model.language_model.prepare(embeds, None, positions, vision_layout)
    return layout, vision_layout


def grids(inputs):
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids")
    return {name: inputs[name] for name in names if name in inputs}


@pytest.mark.parametrize("parts", [PARTS, (("image", 2, 2), 8), (12,), (2, ("video", 2, 4, 4), ("image", 4, 4), 1)])
@pytest.mark.parametrize("options", [{}, {"text_window": 2, "sink_tokens": 1}, {"text_window": 0, "sink_tokens": 0}])
@pytest.mark.parametrize("layer", [0, 1])
def test_reach_is_what_the_near_branch_reads(parts, options, layer):
    """A key is in reach if and only if the exact branch of the query changes with it."""
    model = tiny.model(**options)
    text, inputs = model.model.language_model, tiny.batch(tiny.Sample(*parts))
    layout, vision_layout = layout_of(model, inputs)
    t = inputs["input_ids"].shape[1]
    reach = exact_reach(text.config, layer, layout, vision_layout, t)
    if layout.near is None and layout.vision is None:
        assert not reach.any()
        return
    tokens = torch.randn(t, 32, dtype=torch.float64, requires_grad=True)
    rope = [table[0] for table in text.rope(tokens[None], torch.arange(t).expand(3, 1, t))]
    near = text.layers[layer].mixer.local_swin(tokens, rope, layout)
    queries = range(t) if layout.near is not None else layout.vision.tolist()
    for row, query in enumerate(queries):
        (gradient,) = torch.autograd.grad(near[row].sum(), tokens, retain_graph=True)
        assert torch.equal(gradient.abs().sum(1) > 0, reach[query]), query
    others = [place for place in range(t) if place not in queries]
    assert not reach[others].any()


def test_bands():
    distances = torch.tensor([0, 1, 2, 3, 4, 7, 8, 1023, 1024])
    assert [band_name(number) for number in band(distances).tolist()] == [
        "0", "1", "2-3", "2-3", "4-7", "4-7", "8-15", "512-1023", "1024-2047",
    ]  # fmt: skip


def test_groups():
    groups = group_tokens(torch.tensor([0, 1, 1, 0, 0, 2, 0]))
    assert groups["kind"].tolist() == [0, 1, 1, 0, 0, 2, 0]
    assert groups["from_vision"].tolist() == [-1, -1, -1, 1, 2, -1, 1]
    assert groups["position"].tolist() == [0, 1, 2, 2, 3, 3, 3]


def by_hand(student, teacher, samples):
    """Every figure as lists over tokens, by loops."""
    found = {"layers": [{} for _ in range(4)], "logits": []}
    for sample in samples:
        inputs = tiny.batch(sample)
        inputs.pop("attention_mask")
        position_ids, vision_layout = student.model.get_positions(inputs["input_ids"], None, **grids(inputs))
        known = teacher(**inputs, output_mixer_states=True, output_attentions=True)
        own = student(**inputs, output_mixer_states=True)
        fed = student.model.language_model.run_mixers(known.mixer_inputs, position_ids, None, vision_layout)
        layout, _ = layout_of(student, inputs)
        types, t = student.model.token_types(inputs["input_ids"])[0].tolist(), len(sample)
        for index, layer in enumerate(found["layers"]):
            target = known.mixer_outputs[index][0]
            reach = exact_reach(student.config.text_config, index, layout, vision_layout, t)
            for i in range(t):
                for part, ours in (("own_path", own.mixer_outputs[index][0]), ("fed", fed[index])):
                    if ours is not None:
                        ours = ours.view(t, -1)[i]
                        wrong, size = (float(v @ v) for v in (ours - target[i], target[i]))
                        layer.setdefault(part, []).append((types[i], i, wrong, size))
                for head, weights in enumerate(known.attentions[index][0]):
                    for j in range(i + 1):
                        entry = (types[i], head, i - j, float(weights[i, j]), bool(reach[i, j]))
                        layer.setdefault("attention", []).append(entry)
        ours, theirs = (logits.logits[0].softmax(-1) for logits in (own, known))
        seen = None
        for i in range(t):
            seen = i if types[i] else seen
            since = None if types[i] or seen is None else i - seen
            kl = sum(float(p * (p.log() - q.log())) for p, q in zip(theirs[i], ours[i]))
            found["logits"].append((types[i], i, since, kl, bool(theirs[i].argmax() == ours[i].argmax())))
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", ["m_mate", "hybrid"])
def test_figures_by_hand(name, monkeypatch):
    monkeypatch.setattr("linmu_hf.evaluation.fidelity.attention.QUERIES", 5)
    monkeypatch.setattr("linmu_hf.evaluation.fidelity.measure.ROWS_OF_LOGITS", 7)
    student = tiny.model(**({"layer_types": TYPES[name]} if name in TYPES else {}))
    teacher, samples = teacher_of(student), [tiny.Sample(*PARTS), tiny.Sample(6, ("image", 2, 3), 3, seed=1)]
    report = measure(student, teacher, map(tiny.batch, samples))
    hand = by_hand(student, teacher, samples)
    assert report["sequences"] == 2 and report["tokens"] == sum(map(len, samples))

    def near(value, expected):
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-7)

    for layer, expected in zip(report["layers"], hand["layers"]):
        for part, key in (("own_path", "own_path"), ("teacher_fed", "fed")):
            if key not in expected:
                continue
            for division, entries in (
                (layer[part]["kind"]["text"], [e for e in expected[key] if e[0] == 0]),
                (layer[part]["kind"]["video"], [e for e in expected[key] if e[0] == 2]),
                (layer[part]["position"]["16-31"], [e for e in expected[key] if 16 <= e[1] < 32]),
                (layer[part]["all"], expected[key]),
            ):
                near(division["error"], sum(e[2] for e in entries) / sum(e[3] for e in entries))
                assert division["tokens"] == len(entries)
        pairs, heads = expected["attention"], 4
        near(layer["attention"]["all"]["exact"], sum(p[3] for p in pairs if p[4]) / report["tokens"] / heads)
        for head in range(heads):
            exact = sum(p[3] for p in pairs if p[1] == head and p[4])
            near(layer["attention"]["heads"][head], exact / report["tokens"])
        for distances, low, high in (("0", 0, 0), ("4-7", 4, 7), ("16-31", 16, 31)):
            of_band = [p for p in pairs if low <= p[2] <= high]
            near(
                layer["attention"]["distance"][distances]["mass"],
                sum(p[3] for p in of_band) / sum(p[3] for p in pairs),
            )
            exact = sum(p[3] for p in of_band if p[4])
            near(layer["attention"]["distance"][distances]["exact"], exact / sum(p[3] for p in pairs))
    for division, entries in (
        (report["logits"]["all"], hand["logits"]),
        (report["logits"]["from_vision"]["2-3"], [e for e in hand["logits"] if e[2] in (2, 3)]),
        (report["logits"]["position"]["8-15"], [e for e in hand["logits"] if 8 <= e[1] < 16]),
    ):
        near(division["kl"], sum(e[3] for e in entries) / len(entries))
        near(division["agreement"], sum(e[4] for e in entries) / len(entries))


@torch.no_grad()
def test_branches_add_up():
    """lambda and the share of the far branch, from the parts that the block's output is the sum of."""
    student = tiny.model()
    report = measure(student, teacher_of(student), [tiny.batch(tiny.Sample(12))])
    for layer in report["layers"]:
        assert set(layer["branches"]["lambda"]) == {"text"} and len(layer["branches"]["lambda"]["text"]) == 4
        assert all(0 <= one <= 1 for one in layer["branches"]["lambda"]["text"])
    text = student.model.language_model
    for layer in text.layers:
        torch.nn.init.zeros_(layer.mixer.flex_ma.o_proj.weight)
    assert measure(student, teacher_of(student), [tiny.batch(tiny.Sample(12))])["layers"][0]["branches"]["far"] == {
        "all": 0.0,
        "kind": {"text": 0.0},
    }


def test_the_teacher_itself_has_no_error(tmp_path):
    teacher = tiny.model(seed=5, layer_types=TYPES["full"])
    report = measure(teacher, teacher, [tiny.batch(tiny.Sample(*PARTS))])
    for layer in report["layers"]:
        assert layer["own_path"]["all"]["error"] == layer["teacher_fed"]["all"]["error"] == 0
        assert layer["own_path"]["all"]["cosine"] == pytest.approx(1)
        assert layer["attention"]["all"]["exact"] == pytest.approx(1) and "branches" not in layer
    assert report["logits"]["all"]["agreement"] == 1 and abs(report["logits"]["all"]["kl"]) < 1e-6
    assert math.isclose(sum(one["mass"] for one in report["layers"][0]["attention"]["distance"].values()), 1)
    assert [file.name for file in plot_report(report, tmp_path)] == ["errors.png", "attention.png", "logits.png"]
    assert "full_attention" in format_report(report)


def test_a_student_is_no_teacher():
    student = tiny.model()
    with pytest.raises(ValueError, match=r"layers of \['m_mate'\]"):
        Fidelity(student, student)
