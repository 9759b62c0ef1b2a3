"""How the suite's teacher is trained, what its checkpoint keeps, and how it is measured."""

import json
import math
from types import SimpleNamespace

import numpy as np
import parallel_worker
import pytest
import torch
from forked import run_forked
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from linmu_hf.testbed.encoding import IGNORED
from linmu_hf.testbed.qwen2_5_vl import build_processor as build_digits_processor
from linmu_hf.testbed.qwen2_5_vl import load_model
from linmu_hf.testbed.suite import check_teacher, train_teacher
from linmu_hf.testbed.suite.curriculum import GROW_AT, Curriculum
from linmu_hf.testbed.suite.data import converse, draw_questions, training_scene
from linmu_hf.testbed.suite.encoding import encode, encode_vision
from linmu_hf.testbed.suite.model import DIGITS, build_model, save_checkpoint
from linmu_hf.testbed.suite.processor import build_processor
from linmu_hf.testbed.suite.sources import sources
from linmu_hf.testbed.suite.tasks import KINDS, TASKS
from linmu_hf.testbed.suite.vision_heads import HEADS, Seen, VisionHeads, flat_targets, repeat_targets


QUICK = ("words", "icons", "several", "clip", "memory")  # to draw


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    return build_model(processor).eval()


def batch_of(kind, processor, n=3):
    rng, of = np.random.default_rng(2), KINDS[kind]
    layout = of.layout(rng, of.levels)
    scenes = [training_scene(rng, kind, **layout) for _ in range(n)]
    return scenes, encode(processor, [(scene, converse(rng, scene)) for scene in scenes])


def test_the_decoder_starts_from_the_digits(model, processor):
    digits = load_model(DIGITS)
    ours, theirs = (m.model.language_model.layers[3].self_attn.k_proj.weight for m in (model, digits))
    assert torch.equal(ours, theirs)
    known = build_digits_processor().tokenizer
    for token in ("<|im_start|>", "7", "Ġrow"):
        own = model.get_input_embeddings().weight[processor.tokenizer.convert_tokens_to_ids(token)]
        assert torch.equal(own, digits.get_input_embeddings().weight[known.convert_tokens_to_ids(token)]), token


@pytest.mark.parametrize("kind", QUICK)
def test_training_loss_equals_the_models_own(kind, model, processor):
    _, batch = batch_of(kind, processor)
    with torch.no_grad():
        logits, labels, _ = train_teacher.answer_logits(model, batch)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        torch.testing.assert_close(loss, model(**batch).loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["several", "clip"])
def test_features_seen_in_passing_are_the_towers(kind, model, processor):
    scenes, batch = batch_of(kind, processor)
    with torch.no_grad():
        _, _, seen = train_teacher.answer_logits(model, batch)
        alone = train_teacher.look(model, encode_vision(processor, scenes))
    assert torch.equal(seen.tokens, alone.tokens) and torch.equal(seen.early, alone.early)
    targets = flat_targets(scenes)
    assert all(len(targets[name]) == len(seen.tokens) == len(seen.early) for name in HEADS)


def test_the_tower_keeps_the_order_of_tokens(model, processor):
    scenes, _ = batch_of("icons", processor)
    batch, patches = encode_vision(processor, scenes), []
    hook = model.model.visual.blocks[0].register_forward_pre_hook(lambda module, args: patches.append(args[0]))
    try:
        for value in (0.0, 1.0):
            batch["pixel_values"].view(-1, 4, batch["pixel_values"].shape[-1])[5] = value  # one token
            train_teacher.look(model, batch)
    finally:
        hook.remove()
    changed = (patches[0] != patches[1]).any(-1).view(-1, 4).any(-1)
    assert changed.nonzero().tolist() == [[5]]


def test_the_heads_loss_falls_to_zero_where_they_are_right(processor):
    scenes, _ = batch_of("icons", processor)
    targets = flat_targets(scenes)
    n = len(targets["icon"])

    class Oracle:
        def __init__(self, name):
            self.name = name

        def __call__(self, tokens):
            return 50 * torch.nn.functional.one_hot(targets[self.name], HEADS[self.name].classes).float().flatten(1)

    oracles, seen = {name: Oracle(name) for name in HEADS}, Seen(torch.zeros(n, 4), torch.zeros(n, 1))
    loss, right = VisionHeads.loss(oracles, seen, targets)
    assert loss < 1e-6 and right == dict.fromkeys(("icon", "colour", "this icon", "this colour"), 1.0)
    wrong = {**oracles, "this icon": lambda tokens: 50 * torch.eye(HEADS["this icon"].classes)[[0] * n]}
    assert VisionHeads.loss(wrong, seen, targets)[0] > 1


@pytest.mark.parametrize("kind", ["several", "clip"])
def test_icons_are_counted_in_the_order_of_their_pictures(kind, processor):
    scenes, batch = batch_of(kind, processor)
    times = repeat_targets(scenes)
    assert times.shape == ((batch["mm_token_type_ids"] > 0).sum(),)
    for scene, own in zip(scenes, times.chunk(len(scenes))):
        shown = [name for _, name in scene.facts["shown"]] if kind == "clip" else scene.facts["shown"]
        assert own[own > 0].tolist() == [shown[: i + 1].count(name) for i, name in enumerate(shown)]


def test_one_pair_of_a_row_is_compared():
    rng = np.random.default_rng(0)
    scenes = [training_scene(rng, "several", images=4, alike=True) for _ in range(40)]
    drawn = [[(answer, task) for _, answer, task in draw_questions(rng, scene)] for scene in scenes]
    answers = [answer for row in drawn for answer, task in row if task == "same"]
    assert max(sum(task == "same" for _, task in row) for row in drawn) == 1
    assert 0.3 < answers.count("yes") / len(answers) < 0.7


@pytest.mark.parametrize("kind", ["bars", "clip"])
def test_a_question_does_not_come_again_the_other_way_round(kind):
    rng = np.random.default_rng(0)
    for _ in range(8):
        scene = training_scene(rng, kind)
        asked = [set(question.strip("?").split()) for question, _, _ in draw_questions(rng, scene, 8)]
        asked = [words for words in asked if "or" in words]
        assert len({frozenset(words) for words in asked}) == len(asked)


def test_an_answer_is_right_as_a_whole():
    end = 9
    labels = torch.tensor([1, 2, end, 3, end, 4, 5, end])
    logits = torch.nn.functional.one_hot(labels, 10).float()
    assert train_teacher.answers_right(logits, labels, end).tolist() == [1.0, 1.0, 1.0]
    logits[1] = 0.0  # the second letter of the first answer
    assert train_teacher.answers_right(logits, labels, end).tolist() == [0.0, 1.0, 1.0]


def test_what_is_answered_is_asked_less():
    curriculum = Curriculum()
    for _ in range(50):
        curriculum.update_task("which", 1.0)
    rng, tasks = np.random.default_rng(0), []
    for _ in range(30):
        scene = training_scene(rng, "several", images=3, alike=True)
        tasks += [task for _, _, task in draw_questions(rng, scene, 1, curriculum.shares)]
    assert tasks.count("same") > 2 * tasks.count("which") > 0
    opening = [("the code is 7.", "yes"), ("the code?", "7")]
    assert train_teacher.pad_tasks(opening, [("the code?", "7", "memory")]) == [None, "memory"]


def test_only_the_last_answer_is_measured():
    labels = torch.tensor([[IGNORED, 1, 9, IGNORED, 2, 9, IGNORED], [IGNORED, IGNORED, IGNORED, IGNORED, 3, 4, 9]])
    predicted = torch.tensor([[0, 7, 7, 0, 2, 9, 0], [0, 0, 0, 0, 3, 5, 9]])
    assert train_teacher._last_answers_right(predicted, labels).tolist() == [True, False]


def test_levels_grow_with_the_answers_and_solved_kinds_are_drawn_less():
    curriculum = Curriculum()
    for _ in range(200):
        curriculum.update("icons", 1.0)
        curriculum.update("page", 0.4)
        for task, right in {"icon": 1.0, "color": 1.0, "field": 0.4, "which": 1.0, "same": 0.4}.items():
            curriculum.update_task(task, right)
    assert curriculum.levels["icons"] == KINDS["icons"].levels and curriculum.levels["page"] == 1
    assert curriculum.accuracy["icons"] > GROW_AT
    drawn = [kind for i in range(300) for kind in curriculum.choose(np.random.default_rng(i), 2)]
    assert drawn.count("icons") < min(drawn.count("page"), drawn.count("several"))
    again = Curriculum()
    again.load_state_dict(curriculum.state_dict())
    assert again.state_dict() == curriculum.state_dict()


def test_early_levels_have_few_training_sources():
    level, chosen = Curriculum().draw(np.random.default_rng(0), "icons")
    assert level == 1 and len(chosen.icons) < len(sources("train").icons)
    assert set(chosen.fonts) < set(sources("train").fonts)


def test_the_rate_rises_stays_and_falls():
    args = SimpleNamespace(lr=1.0, warmup_steps=10)
    rate = train_teacher.learning_rate
    assert rate(args, 4, 0.0) == 0.5 and rate(args, 50, 0.5) == 1.0
    assert rate(args, 50, 1.0) == pytest.approx(0.02) and rate(args, 50, 0.9) < 1.0


@pytest.fixture
def tiny(monkeypatch):
    """Two scenes of a kind, and the kinds that are quick to draw."""
    monkeypatch.setattr(train_teacher, "BATCH", dict.fromkeys(KINDS, 2))
    monkeypatch.setattr(train_teacher, "measure", lambda *args: dict.fromkeys(TASKS, 0.5))
    choose = Curriculum.choose
    monkeypatch.setattr(Curriculum, "choose", lambda self, rng, n: [k for k in choose(self, rng, 8) if k in QUICK][:n])


def run(folder, *flags):
    flags = [
        "--vision_steps",
        "2",
        "--decoder_steps",
        "1",
        "--vision_kinds",
        "words",
        "icons",
        "--log_every",
        "1",
        *flags,
    ]
    train_teacher.main(["--output", str(folder), "--max_seconds", "1e9", *flags])


def lines_of(folder):
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def test_training_goes_on_where_it_was(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train_teacher, "learning_rate", lambda args, step, done: 1e-3)
    run(tmp_path / "whole", "--steps", "4")
    run(tmp_path / "parts", "--steps", "2")
    run(tmp_path / "parts", "--steps", "4")
    whole, parts = (torch.load(tmp_path / name / "state" / "state.pt") for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4
    assert whole["curriculum"] == parts["curriculum"]
    for part in ("model", "heads", "repeats"):
        for name, value in whole[part].items():
            assert torch.equal(value, parts[part][name]), name
    kinds = ["looking" if "looking" in line else "right" for line in lines_of(tmp_path / "whole") if "levels" in line]
    assert kinds == ["looking", "looking", "right", "right"]
    stored = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "parts" / "model")
    for name, value in stored.state_dict().items():
        assert torch.equal(value, whole["model"][name].to(torch.bfloat16).float()), name
    run(tmp_path / "parts", "--steps", "5")  # no better than before, but the rate has fallen
    last = torch.load(tmp_path / "parts" / "state" / "state.pt")["model"]["model.language_model.norm.weight"]
    stored = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "parts" / "model")
    assert torch.equal(stored.model.language_model.norm.weight, last.to(torch.bfloat16).float())
    assert AutoProcessor.from_pretrained(tmp_path / "parts" / "model").tokenizer.eos_token == "<|im_end|>"
    assert sum(file.stat().st_size for file in (tmp_path / "parts" / "model").iterdir()) < 8e6


def test_a_trained_teacher_is_trained_on(tiny, model, processor, tmp_path):
    save_checkpoint(model, processor, tmp_path / "model")
    run(tmp_path / "run", "--start", str(tmp_path / "model"), "--steps", "3")  # those of the first two phases
    state = torch.load(tmp_path / "run" / "state" / "state.pt")
    assert state["step"] == 3 and state["curriculum"]["levels"] == {kind: of.levels for kind, of in KINDS.items()}
    assert all(
        torch.equal(value.bfloat16().float(), state["model"][name]) for name, value in model.state_dict().items()
    )
    run(tmp_path / "run", "--start", str(tmp_path / "model"), "--steps", "4")
    again = torch.load(tmp_path / "run" / "state" / "state.pt")
    moved = {name for name, value in state["model"].items() if not torch.equal(value, again["model"][name])}
    assert {True, False} == {".visual." in name for name in moved}
    with pytest.raises(SystemExit):
        run(tmp_path / "other", "--start", str(tmp_path / "none"))


def test_the_tower_rests_while_the_decoder_learns_alone(tiny, tmp_path):
    run(tmp_path / "run", "--steps", "2")
    before = torch.load(tmp_path / "run" / "state" / "state.pt")["model"]
    run(tmp_path / "run", "--steps", "3")
    after = torch.load(tmp_path / "run" / "state" / "state.pt")["model"]
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert {name for name in before if ".visual." in name} <= same
    assert "model.language_model.layers.0.mlp.up_proj.weight" not in same


def test_processes_share_gradients_notes_and_a_clock():
    for processes, gradients in ((1, [[1.0, 2.0], [4.0, 0.0]]), (2, [[1.5, 3.0], [2.0, 0.0]])):
        done = run_forked(parallel_worker.main, [], processes)
        assert done.returncode == 0, done.stderr
        expected = [processes, gradients, [{"process": i} for i in range(processes)], 0.5]
        assert [json.loads(line) for line in done.stdout.splitlines()] == [expected] * processes


def test_two_processes_train_as_one_run(tmp_path):
    flags = ["--steps", "2", "--vision_steps", "1", "--vision_kinds", "memory", "several", "--log_every", "1"]
    words = ["--output", tmp_path / "run", "--eval_samples", "1", *flags]
    done = run_forked(train_teacher.main, words, processes=2)
    assert done.returncode == 0, done.stderr
    looking, right, seen = lines_of(tmp_path / "run")
    assert set(looking["looking"]) > {"memory this icon", "several this icon"} and "right" in right
    assert list(seen["seen"]) == list(TASKS)


def test_another_seed_is_refused(tiny, tmp_path, capsys):
    run(tmp_path / "run", "--steps", "1")
    with pytest.raises(SystemExit):
        run(tmp_path / "run", "--steps", "2", "--seed", "1")
    assert "--seed 1" in capsys.readouterr().err


def test_a_teacher_is_measured_with_intervals_and_chance(model, processor, tmp_path, capsys):
    save_checkpoint(model, processor, tmp_path / "model")
    with pytest.raises(SystemExit, match="below 95%: sign, needle"):
        flags = ["--samples", "2", "--tasks", "sign", "needle", "--split", "test"]
        check_teacher.main(["--model", str(tmp_path / "model"), *flags, "--json", str(tmp_path / "report.json")])
    assert "| needle | 10.0% |" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["split"] == "test" and not math.isnan(report["tasks"]["sign"]["high"])
    with pytest.raises(SystemExit):
        check_teacher.main(["--model", str(tmp_path)])
    assert "holds no config.json" in capsys.readouterr().err
