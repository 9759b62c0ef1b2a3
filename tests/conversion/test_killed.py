"""A conversion may die at any moment: it leaves nothing that loads, and run again it finishes, to the same bytes."""

import multiprocessing
import os
import random
import time

import pytest
from killing import Killed
from synthetic import make_teacher

from linmu_hf import LinMUForConditionalGeneration
from linmu_hf import safetensors_io as checkpoint
from linmu_hf.conversion import convert as convert_module
from linmu_hf.conversion.convert import convert


OPTIONS = {"max_shard_size": "200KB", "keep_attention": [2]}


@pytest.fixture(scope="module")
def case(processor, tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    make_teacher(root / "teacher", processor=processor)
    convert(str(root / "teacher"), str(root / "whole"), **OPTIONS)
    return root / "teacher", contents(root / "whole")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_nothing_loads(output):
    assert not output.exists()
    work = output.with_name(output.name + ".incomplete")
    if work.exists():
        with pytest.raises(OSError, match="valid JSON"):
            LinMUForConditionalGeneration.from_pretrained(work)


def die_at(k):
    """A function that raises at its k-th call."""
    calls = iter(range(k))

    def step(*args):
        if next(calls, None) is None:
            raise Killed

    return step


class Bar:
    def __init__(self, update):
        self.update = update

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


@pytest.mark.parametrize("k", [0, 1, 10, 40, 80, 120, 160, 161, 200, 300])
def test_killed_after_k_tensors(case, tmp_path, monkeypatch, k):
    """The first half of the tensors goes by while writing, the second while verifying."""
    teacher, whole = case
    with monkeypatch.context() as patch, pytest.raises(Killed):
        step = die_at(k)
        patch.setattr(convert_module, "_progress", lambda *args: Bar(step))
        convert(str(teacher), str(tmp_path / "out"), **OPTIONS)
    assert_nothing_loads(tmp_path / "out")
    convert(str(teacher), str(tmp_path / "out"), **OPTIONS)
    assert contents(tmp_path / "out") == whole
    assert os.listdir(tmp_path) == ["out"]


def test_killed_at_every_rename(case, tmp_path, monkeypatch):
    teacher, whole = case
    replace, k, killed = os.replace, 0, True
    while killed:
        output = tmp_path / f"out-{k}"
        step = die_at(k)

        def replace_or_die(source, target, step=step):
            step()
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_or_die)
            try:
                convert(str(teacher), str(output), **OPTIONS)
                killed = False
            except Killed:
                pass
        if killed:
            assert not output.exists()
            convert(str(teacher), str(output), **OPTIONS)
        assert contents(output) == whole
        k += 1
    assert k > 2 * sum(name.endswith(".safetensors") for name in whole)


def test_killed_by_signal(case, tmp_path, monkeypatch):
    teacher, whole = case
    output = tmp_path / "out"
    real = checkpoint.StoredTensor.chunks

    def slow_chunks(self):
        time.sleep(0.02)  # several seconds in all: no kill below comes too late
        return real(self)

    with monkeypatch.context() as slowly:
        slowly.setattr(checkpoint.StoredTensor, "chunks", slow_chunks)
        moments = random.Random(0)
        for _ in range(4):
            run = multiprocessing.get_context("fork").Process(
                target=convert, args=(str(teacher), str(output)), kwargs=OPTIONS, daemon=True
            )
            run.start()
            run.join(moments.uniform(0.1, 0.8))
            assert run.exitcode is None
            run.kill()
            run.join()
            assert_nothing_loads(output)
    convert(str(teacher), str(output), **OPTIONS)
    assert contents(output) == whole


def convert_until_killed(teacher, output, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        step = die_at(120)
        patch.setattr(convert_module, "_progress", lambda *args: Bar(step))
        convert(str(teacher), str(output), **OPTIONS)


def test_finished_shards_are_not_written_again(case, tmp_path, monkeypatch):
    teacher, _ = case
    convert_until_killed(teacher, tmp_path / "out", monkeypatch)
    done = {path.name for path in (tmp_path / "out.incomplete").glob("*.safetensors")}
    written = []
    real = convert_module.write_shard

    def write_shard(file, *args):
        written.append(file.name)
        return real(file, *args)

    monkeypatch.setattr(convert_module, "write_shard", write_shard)
    convert(str(teacher), str(tmp_path / "out"), **OPTIONS)
    assert len(done) > 1 and written
    assert len(done & set(written)) <= 1  # one whose note in the manifest the kill prevented


def test_another_conversion_does_not_resume_it(case, tmp_path, monkeypatch):
    teacher, _ = case
    convert_until_killed(teacher, tmp_path / "out", monkeypatch)
    options = {**OPTIONS, "keep_attention": [1]}
    convert(str(teacher), str(tmp_path / "out"), **options)
    convert(str(teacher), str(tmp_path / "fresh"), **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_damage_on_disk_is_found(case, tmp_path, monkeypatch):
    teacher, whole = case
    real = convert_module.write_index

    def damage(folder, shards):
        real(folder, shards)
        shard = sorted(folder.glob("*.safetensors"))[2]
        data = bytearray(shard.read_bytes())
        data[-5] ^= 1
        shard.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "write_index", damage)
        with pytest.raises(OSError, match="does not read back"):
            convert(str(teacher), str(tmp_path / "out"), **OPTIONS)
    assert_nothing_loads(tmp_path / "out")
    convert(str(teacher), str(tmp_path / "out"), **OPTIONS)
    assert contents(tmp_path / "out") == whole


def test_overwrite_keeps_the_old_model_until_the_new_one_is_there(case, tmp_path, monkeypatch):
    teacher, whole = case
    output = tmp_path / "out"
    convert(str(teacher), str(output), keep_attention="all")
    old = contents(output)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        step = die_at(200)
        patch.setattr(convert_module, "_progress", lambda *args: Bar(step))
        convert(str(teacher), str(output), **OPTIONS, overwrite=True)
    assert contents(output) == old
    convert(str(teacher), str(output), **OPTIONS, overwrite=True)
    assert contents(output) == whole
    assert os.listdir(tmp_path) == ["out"]
