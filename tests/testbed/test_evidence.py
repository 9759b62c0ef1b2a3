"""Evidence: questions beyond training, costs by hand, a killed measurement, and a page that later runs fill in."""

import json
from pathlib import Path

import numpy as np
import pytest
from killing import Killed

from linmu_hf.commands.chat import SHIPPED_STUDENT
from linmu_hf.conversion.source import read_raw_config
from linmu_hf.testbed.ablations.tables import summarise
from linmu_hf.testbed.check_teacher import TEACHERS, load
from linmu_hf.testbed.data import WHOLE_SCENE
from linmu_hf.testbed.evidence import __main__ as evidence
from linmu_hf.testbed.evidence import beyond
from linmu_hf.testbed.evidence.figures import beyond_tables
from linmu_hf.testbed.evidence.page import build_page
from linmu_hf.testbed.evidence.questions import make_rows


# ---- Questions


def texts(row):
    return [message["content"][-1]["text"] for message in row["messages"]]


@pytest.mark.parametrize(("size", "moments"), [(8, 4), (16, 8), (48, 8)])
def test_clips_have_so_many_frames_and_the_answer_stays_right(size, moments):
    for row in make_rows("frames", size, 3):
        frames = [np.array(frame) for frame in row["videos"][0]]
        assert len(frames) == size
        changes = [i for i in range(1, size) if (frames[i] != frames[i - 1]).any()]
        assert changes == list(range(size // moments, size, size // moments))  # each moment for as long, in order
        question, answer = texts(row)
        assert answer in question.split(" first?")[0].split(" or ")


def test_conversations_ask_nothing_twice():
    (row,) = make_rows("turns", 64, 1)
    questions, answers = texts(row)[::2], texts(row)[1::2]
    assert len(set(questions)) == len(answers) == 64
    assert len(row["images"]) == 1 and row["messages"][0]["content"][0]["type"] == "image"
    assert all(len(message["content"]) == 1 for message in row["messages"][1:])


def test_mosaics_have_the_size():
    (row,) = make_rows("pixels", 12, 1)
    assert row["images"][0].size == (192, 192)


@pytest.mark.parametrize(
    ("axis", "size"), [("frames", 20), ("frames", 2), ("frames", 7), ("pixels", 0), ("turns", 65)]
)
def test_a_size_without_questions_is_refused(axis, size, tmp_path, capsys):
    others = [word for name in beyond.SIZES if name != axis for word in (f"--{name}",)]
    code = beyond.main([f"--{axis}", str(size), *others, "--output", str(tmp_path / "out")])
    assert code == 2 and f"--{axis} {size} must be" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- Measurements


def test_costs_equal_those_by_hand():
    short, long = make_rows("pixels", 2, 1), make_rows("pixels", 10, 1)
    teacher, student = (load(folder) for folder in (TEACHERS["qwen"], SHIPPED_STUDENT))
    text = read_raw_config(str(SHIPPED_STUDENT))["text_config"]
    heads, size = text["num_key_value_heads"], text["head_dim"]
    a_token = 4 * 2 * text["num_hidden_layers"] * heads * size  # float32, keys and values
    points = [beyond.measure_point(*teacher, rows, 1) for rows in (short, long)]
    for point in points:
        assert point["cache_bytes"] == a_token * point["tokens"]
    assert points[1]["tokens"] - points[0]["tokens"] >= 100 - 4  # a token for each cell
    own = [beyond.measure_point(*student, rows, 1) for rows in (short, long)]
    assert own[0]["cache_bytes"] == own[1]["cache_bytes"]  # of constant size
    assert own[1]["flops"] > own[0]["flops"] > 0
    head = 2 * text["hidden_size"] * text["vocab_size"]
    assert points[0]["flops"] > head  # of one token: logits of the others are not needed


@pytest.fixture
def counted(monkeypatch):
    """Points without a model, and how often they were measured."""
    measured = []

    def point(model, processor, rows, repeats):
        measured.append(rows[0]["task"])
        if len(measured) == point.dies_at:
            raise Killed
        return {"right": 1, "tokens": 9, "ttft_s": 0.5, "cache_bytes": 1000, "flops": 10**9}

    point.dies_at = None
    monkeypatch.setattr(beyond, "measure_point", point)
    monkeypatch.setattr(beyond, "load", lambda folder: (None, None))
    return point, measured


def test_a_killed_measurement_goes_on(counted, tmp_path, capsys):
    point, measured = counted
    small = ["--frames", "16", "32", "--pixels", "4", "--turns", "--questions", "2"]

    def command(name, *more):
        return [*small, *more, "--output", str(tmp_path / name)]

    assert beyond.main(command("whole")) == 0 and len(measured) == 6
    measured.clear()
    point.dies_at = 4
    with pytest.raises(Killed):
        beyond.main(command("killed"))
    assert not (tmp_path / "killed" / "beyond.json").exists()
    assert beyond.main(command("killed")) == 0
    assert measured == ["16 frames", "32 frames", "4x4", "16 frames", "16 frames", "32 frames", "4x4"]
    whole, killed = (json.loads((tmp_path / name / "beyond.json").read_text()) for name in ("whole", "killed"))
    assert whole["points"] == killed["points"]
    assert (tmp_path / "killed" / "beyond.png").stat().st_size > 5_000
    measured.clear()
    assert (
        beyond.main([*command("killed"), "--pixels", "4", "5"]) == 0 and measured == ["5x5"] * 2
    )  # adds to what is there
    capsys.readouterr()
    assert beyond.main(command("killed", "--repeats", "7")) == 2
    assert "was measured with other models or settings" in capsys.readouterr().err


def test_shares_of_the_teacher():
    def point(model, size, right):
        costs = {"tokens": 90, "ttft_s": 0.25, "cache_bytes": 2000, "flops": 3e9}
        return {"model": model, "axis": "turns", "size": size, "right": right, **costs}

    points = [point("teacher", 4, 80), point("student", 4, 60), point("teacher", 32, 0), point("student", 32, 1)]
    table = beyond_tables({"questions": 100, "points": points})
    assert "| **4** | 90 | 80 [71, 87] | 60 [50, 69], 75% | 250 | 250 | 2 | 2 | 3.00 | 3.00 |" in table
    assert "| 32 | 90 | 0 [0, 4] | 1 [0, 5] |" in table  # no share of nothing, and outside the training


# ---- The page


def fake_ablation(words):
    tasks = ["cell", "when"]
    rows = [("as it is", (), [[1, 1]], [0.5]), ("one-directional Flex-MA", (), [[1, 0]], [0.6])]
    table = summarise(rows, tasks, [1, 1], WHOLE_SCENE)
    report = {
        "plans": {"referees": table}, "seeds": [0], "tasks": tasks, "test_rows": 2,
        "versions": {"torch": "0", "transformers": "0"},
    }  # fmt: skip
    Path(words[words.index("--json") + 1]).write_text(json.dumps(report))
    return 0


def test_a_later_run_fills_in_what_is_missing(tmp_path, monkeypatch, capsys):
    tiny = {
        "fidelity": ("--limit", "1"),
        "beyond": ("--frames", "--turns", "--pixels", "2", "--questions", "1", "--repeats", "1"),
        "referees": ("--seeds", "0"),
    }
    monkeypatch.setattr(evidence, "QUICK", tiny)
    monkeypatch.setattr(evidence, "TEST_ROWS", 1)
    monkeypatch.setitem(evidence.MAINS, "referees", ("linmu-ablate", fake_ablation))
    page = tmp_path / "docs" / "evidence.md"

    def run(output, *parts):
        words = ["--quick", "--output", str(tmp_path / output), "--page", str(page), "--parts", *parts]
        assert evidence.main(words) == 0, capsys.readouterr().err
        return page.read_text()

    text = run("one", "fidelity", "beyond")
    assert 'Not run yet: there are no figures here. `make evidence ARGS="--parts referees"`' in text
    assert text.count("Not run yet") == 1 and "| one-directional" not in text
    assert "lambda text" in text and "| 2x2 cells | " in text
    assert "    linmu-fidelity --model" in text and "    python -m linmu_hf.testbed.evidence.beyond --teacher" in text
    later = run("another", "referees")
    assert "Not run yet" not in later and "| one-directional Flex-MA | 1 | 100.0 | 0.0 |" in later
    assert "    linmu-ablate --plan referees" in later
    for part in ("## Fidelity", "## Beyond training"):
        section = part + text.partition(part)[2].partition("\n## ")[0]
        assert section in later  # from the files of the first run


def test_the_shipped_page_is_what_its_files_say():
    """Nobody edits the page in docs: it is made from its files."""
    page = Path(__file__).parents[2] / "docs" / "evidence.md"
    assert page.read_text() == build_page(page)
