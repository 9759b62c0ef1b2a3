import json
import os
import subprocess
import sys

import pytest
from datasets import DatasetDict
from distillation_fixtures import as_stored, save_pair

from linmu_hf.commands.distill import main as distill
from linmu_hf.commands.pseudo_targets import main
from linmu_hf.distillation.targets.store import PseudoTargets


@pytest.fixture(scope="module")
def folders(tmp_path_factory, rows, processor, make_student, make_teacher):
    root = tmp_path_factory.mktemp("cli")
    save_pair(root, processor, make_student(), make_teacher())
    DatasetDict({"train": as_stored(rows)}).save_to_disk(root / "data")
    return root


def command(root, out, *more, **changes):
    values = {
        "teacher": root / "teacher",
        "dataset": root / "data",
        "output_dir": out,
        "max_completion_length": 2,
        "device": "cpu",
    } | changes
    return [*(part for name, value in values.items() for part in (f"--{name}", str(value))), *more]


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "answers"
    report = out.parent / "report.json"
    assert main(command(folders, out, top_k=3, json=report)) == 0
    return out, json.loads(report.read_text())


def test_answers_and_a_report(whole, folders, capsys):
    out, report = whole
    store = PseudoTargets(out)
    assert len(store) == report["rows"] == report["rows_in_store"] == 10 and report["found"] == 0
    assert store.top_k == 3 and all(len(store.topk(key).ids) for key in store.places)
    answers = [answer for key in store.places for answer in store.answers(key)]
    assert report["answers"] == len(answers)
    assert report["answers_cut"] == sum(not answer.stopped for answer in answers) > 0
    assert store.header["about"]["teacher"] == str(folders / "teacher")
    assert main(command(folders, out, top_k=3)) == 0  # again: nothing is left to do
    assert "10 rows in" in (printed := capsys.readouterr().out) and "10 of them known before; 0 new" in printed


def test_shares_and_streams_give_the_same(whole, folders, tmp_path, monkeypatch):
    out = tmp_path / "answers"
    assert main(command(folders, out, "--streaming", shard="1/2", top_k=3)) == 0
    assert len(PseudoTargets(out)) == 5
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(command(folders, out, top_k=3, json=tmp_path / "report.json")) == 0
    assert json.loads((tmp_path / "report.json").read_text())["share"] == "0/3"
    for rank in ("1", "2"):
        monkeypatch.setenv("RANK", rank)
        assert main(command(folders, out, top_k=3)) == 0
    one, other = PseudoTargets(whole[0]), PseudoTargets(out)
    assert one.places.keys() == other.places.keys()
    assert all(one.answers(key) == other.answers(key) for key in one.places)


def test_distillation_takes_them(whole, folders, tmp_path, capsys):
    def run(*more):
        values = {
            "model": folders / "student", "teacher": folders / "teacher", "dataset": folders / "data",
            "output_dir": tmp_path / "out", "stage_overrides": "all.max_steps=0 stage-3.max_steps=1",
            "per_device_train_batch_size": 2, "use_cpu": True,
            "disable_tqdm": True, "pseudo_targets": whole[0],
        }  # fmt: skip
        return distill([*(p for name, value in values.items() for p in (f"--{name}", *str(value).split())), *more])

    assert run("--max_completion_length", "3") == 2
    assert "max_new_tokens is 2 there and 3 here: set max_completion_length to 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run("--max_completion_length", "2") == 0
    assert (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out" / "pseudo_targets").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "/nowhere/teacher"}, "/nowhere/teacher is not a folder"),
        ({"dataset": "/nowhere/data"}, "/nowhere/data"),
        ({"dataset_train_split": "dev"}, "has no split 'dev'"),
        ({"processor": "/nowhere/student"}, "/nowhere/student"),
        ({"shard": "2/2"}, "--shard 2/2 must be I/N with I from 0 to N - 1"),
        ({"shard": "first"}, "--shard first must be I/N"),
        ({"top_k": 0}, "--top_k 0 must be at least 1"),
        ({"batch_size": 0}, "--batch_size 0 must be at least 1"),
        ({"max_completion_length": 0}, "--max_completion_length 0 must be at least 1"),
        ({"attn_implementation": "none"}, "none"),
        ({"json": "/nowhere/report.json"}, "its folder does not exist"),
    ],
)
def test_one_line_for_each_error(folders, tmp_path, capsys, changes, message):
    assert main(command(folders, tmp_path / "out", **changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("linmu-pseudo-targets: error: ") and message in error
    assert not (tmp_path / "out").exists()


def test_a_bad_row_stops_before_decoding(folders, rows, tmp_path, capsys):
    lines = [{"messages": row["messages"][:2], "images": ["/nowhere/a.png"] * len(row["images"])} for row in rows[:2]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(command(folders, tmp_path / "out", dataset=tmp_path / "rows.jsonl")) == 2
    assert "row 0" in (error := capsys.readouterr().err) and "/nowhere/a.png does not exist" in error
    assert not (tmp_path / "out").exists()


def test_other_settings_for_the_same_folder(whole, folders, capsys):
    assert main(command(folders, whole[0], top_k=3, max_completion_length=4)) == 2
    assert "max_new_tokens is 2 there and 4 here: set max_completion_length to 2" in capsys.readouterr().err
    assert main(command(folders, whole[0])) == 2
    assert "top_k is 3 there and 0 here: set top_k to 3" in capsys.readouterr().err


def test_a_launcher_and_a_share_by_hand(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command(folders, tmp_path / "out", shard="0/2")) == 2
    assert "--shard 0/2 has no effect: a launcher has started 2 processes" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_of_torchrun(whole, folders, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_endpoint", "localhost:0"]
    words = command(folders, tmp_path / "answers", top_k=3)
    subprocess.run([*launch, "-m", "linmu_hf.commands.pseudo_targets", *words], check=True, env=os.environ)
    one, other = PseudoTargets(whole[0]), PseudoTargets(tmp_path / "answers")
    assert one.places.keys() == other.places.keys()
    assert {place.shard.name for place in other.places.values()} == {"shard-00000", "shard-00001"}
    assert all(one.answers(key) == other.answers(key) for key in one.places)
