"""The benchmark with a pre-trained decoder, on tiny models and made-up text, without its downloads."""

import io
import itertools
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from synthetic import make_processor, make_teacher


sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are not part of the package

from benchmarks.real import __main__ as command
from benchmarks.real import bench, far_memory, measure, recall, recipes, suite, text
from benchmarks.real.settings import DEFAULT, QUICK, Calibrate, Settings, Train, change_step, select_steps
from benchmarks.real.train import losses, rate_factor, train


pytestmark = pytest.mark.extras
TEXT = " ".join(f"The {word} of the {other} is in that row and column." for word in "abcde" for other in "vwxyz")


class Words:
    """A tokenizer with a token for every word and every mark."""

    def __init__(self):
        self.ids = {}

    def __call__(self, text, **kwargs):
        words = text.replace("\n\n", " \n\n ").replace(":", " : ").replace(".", " . ").split(" ")
        return {"input_ids": [self.ids.setdefault(word, len(self.ids)) for word in words if word]}

    def apply_chat_template(self, messages, **kwargs):
        return f"<user> {messages[0]['content']} <assistant>"


@pytest.fixture
def words(tmp_path):
    tokenizer = Words()
    folder = tmp_path / "text"
    folder.mkdir()
    for split in text.SPLITS:
        documents = [(f"{split}-{i}", f"{split}-{i} " + " ".join(f"w{n}" for n in range(700 * i))) for i in (1, 2, 3)]
        torch.save(text.encode_documents(documents, tokenizer), folder / f"{split}.pt")
    return folder, tokenizer


# ---- Figures


@torch.no_grad()
def test_evaluate_equals_a_computation_by_hand():
    teacher = tiny.plain(layer_types=["full_attention"] * 4)
    student = tiny.plain(seed=1)
    row = torch.randint(1, 60, (40,))
    figures = measure.evaluate(student, teacher, [row, row.flip(0)], ["here", "there"])
    ours = student(input_ids=row[None]).logits[0, :-1].double().log_softmax(-1)
    theirs = teacher(input_ids=row[None]).logits[0, :-1].double().log_softmax(-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    same = ours.argmax(-1) == theirs.argmax(-1)
    here = figures["by_kind"]["here"]
    assert figures["tokens"] == 2 * 39
    assert here["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert here["agreement"] == pytest.approx(same.float().mean().item())
    nll = -ours[torch.arange(39), row[1:]].mean()
    assert here["perplexity"] == pytest.approx(nll.exp().item(), rel=1e-4)
    assert figures["kl"] == pytest.approx((here["kl"] + figures["by_kind"]["there"]["kl"]) / 2)
    assert list(figures["by_position"]) == ["0-31", "32-63"]
    both = [figures["by_position"][label]["kl"] for label in ("0-31", "32-63")]
    assert figures["kl"] == pytest.approx((32 * both[0] + 7 * both[1]) / 39)
    assert set(figures["layers"]) == {0, 1, 2, 3} and "new" in figures["by_distance"]


@torch.no_grad()
def test_layer_errors_leave_out_the_first_token():
    teacher, student = tiny.plain(layer_types=["full_attention"] * 4), tiny.plain(seed=1)
    row = torch.randint(1, 60, (1, 24))
    known = teacher.model(input_ids=row, output_mixer_states=True)
    answer = student.model(input_ids=row, output_mixer_states=True)
    fed, own, energy = measure.layer_errors(student, known, answer, [0, 1, 2, 3])
    difference = answer.mixer_outputs[2][0, 1:] - known.mixer_outputs[2][0, 1:]
    assert own[2] == pytest.approx(difference.square().sum().item(), rel=1e-4)
    assert energy[2] == pytest.approx(known.mixer_outputs[2][0, 1:].square().sum().item(), rel=1e-4)
    assert fed[2] != own[2]


def test_the_teacher_agrees_with_itself():
    teacher = tiny.plain(layer_types=["full_attention"] * 4)
    figures = measure.evaluate(teacher, teacher, [torch.randint(1, 60, (20,))])
    assert figures["kl"] == 0 and figures["agreement"] == 1 and figures["layers"] == {}
    assert figures["perplexity"] == figures["perplexity_teacher"]


def test_layers_that_keep_attention_have_no_error():
    teacher = tiny.plain(layer_types=["full_attention"] * 4)
    row = torch.randint(1, 60, (20,))
    hybrid = tiny.plain(seed=1, layer_types=["m_mate", "full_attention", "m_mate", "full_attention"])
    assert set(measure.evaluate(hybrid, teacher, [row])["layers"]) == {0, 2}
    copy = tiny.plain(layer_types=["full_attention"] * 4)
    assert measure.evaluate(copy, teacher, [row])["layers"] == {}


def test_distance_of_the_last_same_pair():
    assert measure.pair_distances(torch.tensor([5, 6, 7, 5, 6, 5, 6])).tolist() == [-1, -1, -1, 3, -1, 2]
    assert measure.bins(torch.tensor([-1, 0, 31, 32, 9000])) == ["new", "0-31", "0-31", "32-63", "8192-"]


# ---- Recall


def test_recall_prompts_have_the_distance_that_they_say(words):
    rows, questions = recall.recall_set(*words, questions=4)
    assert rows.shape == (2, recall.LENGTH)
    for distance in recall.DISTANCES:
        assert sum(question.distance == distance for question in questions) == 4
    for question in questions:
        row, value = rows[question.row].tolist(), question.at + 1
        assert row[value] == row[value - question.distance] == question.answer
        assert row[value - 1] == row[value - 1 - question.distance]  # the key
        assert row.count(question.answer) == 2
    again = recall.recall_set(*words, questions=4)
    assert torch.equal(rows, again[0]) and questions == again[1]


def test_recall_counts_first_choices():
    rows = torch.tensor([[1, 2, 3, 1, 2, 3]])

    class Copier(torch.nn.Module):
        """Prefers after each token the one that followed it before."""

        def model(self, input_ids, use_cache):
            states = torch.zeros(1, 6, 8)
            states[0, 3, 2], states[0, 4, 5], states[0, 4, 3] = 1, 2, 1
            return type("Answer", (), {"last_hidden_state": states})

        def lm_head(self, states):
            return states

    questions = [recall.Question(0, 3, 3, answer=2), recall.Question(0, 4, 3, answer=3)]
    figures = recall.recall(Copier(), rows, questions)
    assert figures["share"] == {3: 0.5} and figures["choice"] == {3: 1.0} and figures["questions"] == {3: 2}


def test_too_short_rows_are_refused(words):
    with pytest.raises(ValueError, match="1024 tokens in a row of 600"):
        recall.recall_rows([torch.zeros(600, dtype=torch.long)], words[1])


# ---- Text


def test_split_by_file_is_disjoint_and_deterministic(tmp_path, monkeypatch):
    archive = tmp_path / "made-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for number in range(40):
            data = (f"File {number}. " + TEXT * 2).encode()
            for name in (f"made-1.0/docs/{number}.txt", f"made-1.0/tests/{number}.txt"):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    source = text.Source("made", "1.0", "MIT", "docs")
    monkeypatch.setattr(text, "SOURCES", (source,))
    monkeypatch.setattr(text, "download", lambda *args, **kwargs: archive)
    for folder in ("one", "other"):
        text.build_text(tmp_path / folder, tmp_path, make_processor().tokenizer)
    names = {}
    for split in text.SPLITS:
        one, other = (torch.load(tmp_path / folder / f"{split}.pt") for folder in ("one", "other"))
        assert one["names"] == other["names"] and torch.equal(one["tokens"], other["tokens"])
        names[split] = set(one["names"])
    assert len(names["train"]) + len(names["held_out"]) == 40 and not names["train"] & names["held_out"]
    assert 0 < len(names["held_out"]) < 10


def test_tables_and_code_are_no_prose():
    assert text.is_prose(TEXT)
    assert not text.is_prose("a = b\nfor x in y:\n    print(x)\n" * 100)


def test_rows_begin_in_three_ways(words):
    folder, tokenizer = words
    rows = text.TextRows(folder, "train", tokenizer, 64)
    again = text.TextRows(folder, "train", tokenizer, 64)
    for index in range(9):
        assert len(rows[index]) == 64 and torch.equal(rows[index], again[index])
    first = {tokenizer.ids[f"train-{i}"] for i in (1, 2, 3)}
    assert all(int(rows[index][0]) in first for index in (1, 4, 7))
    assert all(int(rows[index][0]) == tokenizer.ids["<user>"] for index in (2, 5, 8))
    assert not torch.equal(rows[0], text.TextRows(folder, "train", tokenizer, 64, seed=1)[0])
    assert rows.batch(3, 2).shape == (2, 64)


# ---- Training


STEP = Train("final", steps=4, length=24, learning_rate=1e-2, hidden=0.5, checkpoint_steps=2)


def pair():
    return tiny.plain(seed=1), tiny.plain(layer_types=["full_attention"] * 4).requires_grad_(False)


class Rows:
    def batch(self, first, count):
        return torch.randint(1, 60, (count, 24), generator=torch.Generator().manual_seed(first))


def test_a_killed_training_ends_where_it_would_have(tmp_path, monkeypatch):
    student, teacher = pair()
    log = train(student, teacher, Rows(), STEP, tmp_path / "whole")
    killed, _ = pair()
    calls = itertools.count()

    def dies(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return losses(*args)

    monkeypatch.setattr("benchmarks.real.train.losses", dies)
    with pytest.raises(KeyboardInterrupt):
        train(killed, teacher, Rows(), STEP, tmp_path / "state")
    resumed, _ = pair()
    again = train(resumed, teacher, Rows(), STEP, tmp_path / "state")
    assert [row["loss"] for row in again] == [row["loss"] for row in log]
    for one, other in zip(student.parameters(), resumed.parameters()):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="other settings"):
        train(pair()[0], teacher, Rows(), replace(STEP, kl=0.5), tmp_path / "state")


@pytest.mark.parametrize(("fed", "muon"), [("student", False), ("teacher", False), ("student", True)])
def test_training_lowers_the_loss(tmp_path, fed, muon):
    student, teacher = pair()

    class OneRow:
        def batch(self, first, count):
            return Rows().batch(0, count)

    log = train(
        student, teacher, OneRow(), replace(STEP, steps=12, fed=fed, hidden=1.0, muon=muon), tmp_path / "state"
    )
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert ("kl" in log[0]) == (fed == "student")


def test_every_token_counts():
    student, teacher = pair()
    ids = Rows().batch(0, 2)
    terms = losses(student, teacher, ids, STEP)
    ours, theirs = (model(input_ids=ids).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
    expected = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    assert terms["kl"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_rate_rises_and_falls():
    rates = [rate_factor(i, replace(STEP, steps=20, warmup=0.2)) for i in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[3:] == sorted(rates[3:], reverse=True) and rates[-1] < 0.02


# ---- Settings


def test_settings_from_a_command_line():
    words = (
        "--quick --rows 2 --keep-attention 1,2 --option window_size=4,4,4 --option gate=channel "
        "--steps calibration,final --set final.steps=7 --set final.learning_rate=1"
    )
    settings = command.read_settings(command.build_parser().parse_args(words.split()))
    assert settings.rows == 2 and settings.keep_attention == (1, 2)
    assert dict(settings.mixer_options) == {"window_size": [4, 4, 4], "gate": "channel"}
    assert settings.steps[-1].steps == 7 and settings.steps[-1].learning_rate == 1.0
    assert settings.length == QUICK.length


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: change_step(DEFAULT, "end.steps=3"), "STEP.FIELD=VALUE"),
        (lambda: change_step(DEFAULT, "final.step=3"), "the fields of final"),
        (lambda: change_step(DEFAULT, "final.steps=many"), "of type int"),
        (lambda: change_step(DEFAULT, "final.fed=both"), "must be 'student' or 'teacher'"),
        (lambda: select_steps(DEFAULT, ["calibration", "end"]), "no steps"),
        (lambda: select_steps(DEFAULT, ["calibration"]), "must be called 'final'"),
    ],
)
def test_impossible_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        change()


# ---- A run


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Returns a function that runs the whole command on a tiny teacher."""
    base = tmp_path / "base"
    processor = make_processor()
    make_teacher(base / "teacher", processor=processor)
    (base / "text").mkdir()
    for split in text.SPLITS:
        torch.save(text.encode_documents([("one", TEXT)], processor.tokenizer), base / "text" / f"{split}.pt")
    (base / "text" / "text.json").write_text("{}")
    rows = torch.randint(1, 200, (1, 48))
    asked = [recall.Question(0, 40, 32, int(rows[0, 41]))]
    monkeypatch.setattr(bench, "recall_set", lambda *args: (rows, asked))
    monkeypatch.setattr(bench, "version", lambda name: "0")  # gguf is not part of the test environment
    steps = (Calibrate("calibration", batches=2, batch_size=1, length=32), replace(STEP, length=32))
    settings = Settings(steps=steps, rows=3, length=48, questions=1)
    return lambda only=None, **changes: command.run(
        bench.Bench(tmp_path / "run", base, replace(settings, **changes)), only
    )


def test_a_whole_run(run, tmp_path, monkeypatch, capsys):
    run()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for part in ("teacher", "conversion", "calibration", "final"):
        assert {"perplexity", "kl", "agreement", "recall", "by_position", "layers"} <= set(results[part])
    assert results["teacher"]["agreement"] == 1 and results["settings"]["steps"][0]["kind"] == "calibrate"
    assert (tmp_path / "run" / "results.png").exists() and not (tmp_path / "run" / "final.checkpoint").exists()

    for name in ("convert", "take", "measure"):  # all of it is finished
        monkeypatch.setattr(bench.Bench, name, lambda *args: pytest.fail("done twice"))
    run()
    assert "finished before" in capsys.readouterr().out


def test_a_killed_run_has_no_results_and_goes_on(run, tmp_path, monkeypatch):
    taken, take = [], bench.Bench.take

    def dies(self, step):
        taken.append(step.name)
        if step.name == "final" and taken.count("final") == 1:
            raise KeyboardInterrupt
        return take(self, step)

    monkeypatch.setattr(bench.Bench, "take", dies)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not (tmp_path / "run" / "results.json").exists()
    run()
    assert taken == ["calibration", "final", "final"] and (tmp_path / "run" / "results.json").exists()


def test_only_one_part(run, tmp_path, capsys):
    run("conversion")
    assert (tmp_path / "run" / "figures" / "conversion.json").exists()
    assert not (tmp_path / "run" / "results.json").exists() and not (tmp_path / "run" / "calibration").exists()
    assert "conversion" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the parts of this run"):
        run("end")


def test_layers_that_keep_attention_are_chosen_on_text(run, tmp_path):
    run("conversion", keep_attention="auto:1")
    kinds = json.loads((tmp_path / "run" / "conversion" / "config.json").read_text())["text_config"]["layer_types"]
    assert kinds.count("full_attention") == 1
    with pytest.raises(ValueError, match="other settings"):
        run("conversion", keep_attention="auto:2")


def test_recipes_are_measured_once_each(run, tmp_path, monkeypatch, capsys):
    run(mixer_options=(("text_window", 4),))
    base = tmp_path / "base"
    (tmp_path / "run" / "calibration").rename(base / "calibration")
    monkeypatch.setattr(recipes, "LENGTH", 48)
    names, seen = ["2 rows of 512 tokens", "half of it fed by the teacher"], []
    monkeypatch.setattr(recipes, "RECIPES", {name: recipes.RECIPES[name] for name in names})
    monkeypatch.setitem(recipes.RECIPES, names[0], [{"batch_size": 2, "length": 24}])
    monkeypatch.setattr(recipes, "FINAL", replace(recipes.FINAL, length=48))

    def watched(student, teacher, rows, step, checkpoint):
        seen.append((step.fed, step.batch_size, step.length, step.steps))
        return train(student, teacher, rows, step, checkpoint)

    monkeypatch.setattr(recipes, "train", watched)
    words = ["--base", str(base), "--output", str(tmp_path / "recipes.json"), "--tokens", "192", "--rows", "2"]
    recipes.main([*words, "--seeds", "0", "--recipes", names[0]])
    recipes.main([*words, "--seeds", "0"])
    assert seen == [("student", 2, 24, 4), ("teacher", 1, 48, 2), ("student", 1, 48, 2)]
    results = json.loads((tmp_path / "recipes.json").read_text())["results"]
    assert [one["recipe"] for one in results] == ["start", *names] and len({one["kl"] for one in results}) == 3
    table = capsys.readouterr().out.splitlines()[-3:]
    assert [float(row.split("|")[2]) for row in table] == sorted(round(one["kl"], 4) for one in results)
    with pytest.raises(SystemExit):
        recipes.main([*words, "--rows", "3"])
    assert "is of other --tokens or --rows" in capsys.readouterr().err


def test_the_suite_in_words_is_measured_once_for_each_model(run, tmp_path, monkeypatch, capsys):
    run("conversion", mixer_options=(("text_window", 4),))
    flags = ["--output", str(tmp_path / "run"), "--base", str(tmp_path / "base"), "--samples", "1"]
    monkeypatch.setattr(suite, "TOLD_TASKS", ("field", "memory"))
    suite.main([*flags, "--models", "teacher", "conversion"])
    printed = capsys.readouterr().out
    assert "| task | tokens | teacher | conversion |" in printed and printed.count("| memory |") == 2
    monkeypatch.setattr(suite, "measure", lambda *args: pytest.fail("measured twice"))
    suite.main([*flags, "--models", "teacher"])
    with pytest.raises(SystemExit):
        suite.main(flags)
    assert "no model in" in capsys.readouterr().err


def test_an_answer_counts_if_all_of_its_tokens_are_first_choices():
    model = tiny.plain(layer_types=["full_attention"] * 4)
    prompt = [5, 6, 7]
    ids = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    answer = ids[0, 3:].tolist()
    assert suite.answers(model, prompt, answer)
    assert not suite.answers(model, prompt, [*answer[:2], (answer[2] + 1) % 50])
    assert not suite.answers(model, prompt, [(answer[0] + 1) % 50, *answer[1:]])


def test_the_delta_rule_in_pieces_is_the_recurrence():
    """Two pieces and a rest, values and gradients in float64."""
    torch.manual_seed(0)
    t, n, p = 2 * far_memory.CHUNK + 5, 6, 4
    q, v = torch.randn(2, t, n, dtype=torch.float64), torch.randn(2, t, p, dtype=torch.float64)
    k = torch.nn.functional.normalize(torch.randn(2, t, n, dtype=torch.float64), dim=-1)
    decay, beta = -0.2 * torch.rand(2, t, dtype=torch.float64), torch.rand(2, t, dtype=torch.float64)
    inputs = [one.requires_grad_() for one in (q, k, v, decay, beta)]
    state, outputs = torch.zeros(2, n, p, dtype=torch.float64), []
    for i in range(t):
        key, write = k[:, i, :, None], beta[:, i, None, None]
        state = decay[:, i, None, None].exp() * (state - write * key @ (key.mT @ state)) + write * key @ v[:, i, None]
        outputs.append((state.mT @ q[:, i, :, None])[..., 0])
    expected, found = torch.stack(outputs, dim=1), far_memory.delta_rule(*inputs)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad((one * weight).sum(), inputs) for one in (found, expected)))


def test_far_attention_is_what_the_window_and_the_sinks_leave():
    torch.manual_seed(0)
    t = far_memory.WINDOW + 20
    q, k, v = torch.randn(t, 4, 8), torch.randn(t, 2, 8), torch.randn(t, 2, 3)
    found = far_memory.far_attention(q, k, v)
    at, head = t - 1, 3
    weights = (k[:, 1] @ q[at, head] / 8**0.5).softmax(0)
    far = slice(far_memory.SINKS, t - far_memory.WINDOW)
    torch.testing.assert_close(found[at, head], weights[far] @ v[far, 1])
    assert not found[: far_memory.WINDOW + far_memory.SINKS].any()
