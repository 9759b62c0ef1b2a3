"""Whole runs on streams, in workers, packed, with bad rows: equal where they must be, resumed bit for bit."""

import json
import logging

import pytest
import torch
from distillation_fixtures import Rows
from killing import Killed, kill_at

from linmu_hf.data.mixture import Mixture, StreamMixture
from linmu_hf.distillation import DistillConfig, distill
from linmu_hf.distillation.fingerprint import fingerprint_rows
from linmu_hf.distillation.rows.stream import StreamedRow
from linmu_hf.distillation.trainer import DistillTrainer


pytestmark = pytest.mark.core_training


def steps(*counts):
    """The paper's stages with so many steps, faster and with smaller adapters."""
    changes = ["all.learning_rate=3e-3", "stage-3.learning_rate=1e-3", "stage-3.lora_r=2"]
    return [*changes, *(f"stage-{number}.max_steps={count}" for number, count in enumerate(counts, 1))]


ARGUMENTS = {
    "stage_overrides": steps(0, 4, 4),
    "per_device_train_batch_size": 2,
    "max_completion_length": 4,
    "save_steps": 2,
    "logging_steps": 2,
    "disable_tqdm": True,
    "max_grad_norm": 0.5,
}


@pytest.fixture(scope="module")
def run(rows, processor, make_student, make_teacher):
    """Distils a fresh student into a folder; returns its weights and its log without times."""

    def run(folder, rows=rows, **changes):
        student = make_student()
        config = DistillConfig(output_dir=str(folder), use_cpu=True, **ARGUMENTS | changes)
        log = distill(config, student, make_teacher(), rows, processor)
        return student.state_dict(), [row["loss"] for row in log if "loss" in row]

    return run


def equal(one, other, tolerance=0.0):
    assert one[1] == pytest.approx(other[1], rel=max(tolerance, 1e-12))
    for name, value in other[0].items():
        torch.testing.assert_close(one[0][name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture
def killed(monkeypatch):
    """Runs until the loss is asked for once more than `after` times."""

    def killed(run, after, *args, **kwargs):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            kill_at(patched, DistillTrainer, "compute_loss", after + 1)
            run(*args, **kwargs)

    return killed


def test_streamed_equals_map_style(run, rows, tmp_path):
    """In order, up to the end of the rows: then a stream goes on where map-style data has a short batch."""
    changes = {"train_sampling_strategy": "sequential", "stage_overrides": steps(0, 5, 3)}
    equal(run(tmp_path / "a", Rows(rows), **changes), run(tmp_path / "b", rows, **changes))


@pytest.mark.parametrize("stream", [True, False])
def test_workers_change_nothing(run, rows, tmp_path, stream):
    source = Rows(rows) if stream else rows
    changes = {"shuffle_buffer_size": 4, "stage_overrides": steps(0, 4, 0)}
    alone = run(tmp_path / "a", source, **changes)
    equal(
        run(tmp_path / "b", source, shuffle_buffer_size=4, stage_overrides=steps(0, 4, 0), dataloader_num_workers=2),
        alone,
    )


CASES = {
    "a stream": {"stream": True, "shuffle_buffer_size": 4},
    "a stream with workers": {"stream": True, "shuffle_buffer_size": 4, "dataloader_num_workers": 2},
    "packed": {"packing": True},
    "packs": {"max_length": 150, "per_device_train_batch_size": 1},
    "packs of a stream": {"stream": True, "max_length": 150, "per_device_train_batch_size": 1},
    "buckets": {"train_sampling_strategy": "group_by_length"},
    "bad rows": {"bad": True, "max_bad_rows": 2},
    "a stream with bad rows": {"bad": True, "stream": True, "max_bad_rows": 2, "shuffle_buffer_size": 4},
}


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_continues_with_the_same_result(run, killed, some_bad, rows, tmp_path, name):
    changes = dict(CASES[name])
    data = some_bad if changes.pop("bad", False) else rows
    data = Rows(data) if changes.pop("stream", False) else data
    whole = run(tmp_path / "whole", data, **changes)
    killed(run, 3, tmp_path / "killed", data, **changes)
    killed(run, 4, tmp_path / "killed", data, **changes)  # once more, in the stage after
    equal(run(tmp_path / "killed", data, **changes), whole)


def test_a_killed_run_does_not_encode_what_it_had_passed(run, killed, rows, tmp_path, monkeypatch):
    """The checkpoint is that of the second of four steps."""
    encoded, load, changes = [], StreamedRow.load, {"stage_overrides": steps(0, 4, 0)}
    monkeypatch.setattr(StreamedRow, "load", lambda self: encoded.append(self.number) or load(self))
    run(tmp_path / "whole", Rows(rows), **changes)
    whole = list(encoded)
    killed(run, 3, tmp_path / "killed", Rows(rows), **changes)
    encoded.clear()
    run(tmp_path / "killed", Rows(rows), **changes)
    assert encoded == [whole[0], *whole[5:]]  # the first one is read before work starts


@pytest.fixture(scope="module")
def some_bad(rows, tmp_path_factory):
    """Row 3 names a picture that is not there, and row 7 one that no header shows to be damaged."""
    picture = tmp_path_factory.mktemp("bad") / "damaged.png"
    rows[7]["images"][0].save(picture)
    picture.write_bytes(picture.read_bytes()[:-200])
    bad = {3: "none.png", 7: str(picture)}
    return [
        {**row, "id": f"r{i}", "images": [bad[i]] * len(row["images"])} if i in bad else row
        for i, row in enumerate(rows)
    ]


def test_packed_equals_padded(run, tmp_path):
    equal(run(tmp_path / "a", packing=True), run(tmp_path / "b", packing=False), tolerance=2e-4)


@pytest.mark.parametrize("stream", [True, False])
def test_bad_rows(run, some_bad, tmp_path, stream, caplog):
    data = Rows(some_bad) if stream else some_bad
    changes = {"stage_overrides": steps(0, 6, 0), "train_sampling_strategy": "sequential"}
    with pytest.raises(ValueError, match=r"^row 3, id 'r3' .*none\.png does not exist: give a file, [^\n]*$"):
        run(tmp_path / "none", data, **changes)
    with pytest.raises(
        ValueError, match=r"^2 rows cannot be read, and max_bad_rows=1: rows 3, and now row 7, id 'r7'"
    ):
        run(tmp_path / "one", data, max_bad_rows=1, **changes)
    with caplog.at_level(logging.WARNING, logger="linmu_hf"):
        run(tmp_path / "two", data, max_bad_rows=2, **changes)
    assert ["row 3, id 'r3'" in caplog.messages[-2], "row 7, id 'r7'" in caplog.messages[-1]] == [True, True]


def test_all_rows_bad(run, some_bad, tmp_path):
    for data in ([some_bad[3]] * 2, Rows([some_bad[3]] * 2)):
        with pytest.raises(ValueError, match="no row of the dataset can be read"):
            run(tmp_path / "out", data, max_bad_rows=5)


def test_mixtures_train(run, rows, tmp_path):
    changes = {"stage_overrides": steps(0, 3, 0)}
    _, losses = run(tmp_path / "a", Mixture([rows[:4], rows[4:]], [1, 1]), **changes)
    _, streamed = run(tmp_path / "b", StreamMixture([rows[:4], rows[4:]], [1, 1]), **changes)
    assert len(losses) == len(streamed) == 2


@pytest.mark.parametrize(
    ("stream", "arguments", "message"),
    [
        (False, {"max_length": 0}, "max_length=0 must be at least 1"),
        (False, {"max_length": 64, "packing": False}, "max_length=64 has no effect without packing"),
        (False, {"packing": True, "train_sampling_strategy": "group_by_length"}, "no effect on packed rows"),
        (False, {"max_bad_rows": -1}, "max_bad_rows=-1 must not be negative"),
        (False, {"shuffle_buffer_size": -1}, "shuffle_buffer_size=-1 must not be negative"),
        (True, {"train_sampling_strategy": "group_by_length"}, "needs rows that have a length.*packing=True"),
    ],
)
def test_arguments_without_effect_are_refused(run, rows, tmp_path, stream, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", Rows(rows) if stream else rows, **arguments)


def test_other_rows_are_other_settings(run, rows, tmp_path):
    assert fingerprint_rows(Rows(rows)) == fingerprint_rows(Rows(rows)) != fingerprint_rows(Rows(rows[1:]))
    run(tmp_path / "out", Rows(rows), stage_overrides=steps(0, 1, 0))
    settings = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert settings["packing"] is False and settings["max_length"] is None
    for changes in ({"shuffle_buffer_size": 3}, {"max_length": 99}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))} was"):
            run(tmp_path / "out", Rows(rows), stage_overrides=steps(0, 1, 0), **changes)
