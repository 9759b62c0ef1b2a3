"""Files and folders appear whole or not at all; one run at a time writes a folder."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killing import Killed
from safetensors.torch import save_file

from linmu_hf.files import check_report, copy_file, disk_errors, locked, whole_file, whole_folder, write_text


HOLD = """
import sys, time
from pathlib import Path
from linmu_hf.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old ü")
    with pytest.raises(Killed), whole_file(file, "wb") as stream:
        stream.write(b"half")
        raise Killed
    assert file.read_text(encoding="utf-8") == "old ü"
    copy_file(file, tmp_path / "b.txt")
    write_text(file, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt"]
    assert (file.read_text(), (tmp_path / "b.txt").read_text(encoding="utf-8")) == ("new", "old ü")


@pytest.mark.parametrize("existed", [False, True])
def test_a_folder_is_the_old_one_or_the_new_one(tmp_path, existed):
    folder = tmp_path / "out"
    if existed:
        folder.mkdir()
        (folder / "old").write_text("")
    with pytest.raises(Killed), whole_folder(folder) as partial:
        (partial / "half").write_text("")
        raise Killed
    assert [path.name for path in folder.iterdir()] == ["old"] if existed else not folder.exists()
    with whole_folder(folder) as partial:
        (partial / "new").write_text("")
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path / "run"`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_two_runs_in_one_folder(tmp_path, holder):
    with pytest.raises(BlockingIOError) as error, locked(tmp_path / "run"):
        pass
    for part in (str(tmp_path / "run"), str(holder.pid), socket.gethostname(), "name another folder"):
        assert part in str(error.value)
    with locked(tmp_path / "other"):
        pass
    holder.send_signal(signal.SIGKILL)  # the lock of a dead process blocks nobody
    holder.wait()
    with locked(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_report_that_cannot_be_written_is_told_before(tmp_path):
    check_report(None)
    check_report(tmp_path / "report.json")
    assert not [*tmp_path.iterdir()]
    for file, message in (
        (tmp_path, "--json .* is a folder: name a file"),
        (tmp_path / "no" / "a.json", "--json .*: its folder does not exist"),
        (Path("/proc/a.json"), "--json /proc/a.json cannot be written .*: name a file in another folder"),
    ):
        with pytest.raises(OSError, match=message):
            check_report(file)
    with pytest.raises(OSError, match=r"--png .* is a folder"):
        check_report(tmp_path, "--png")


def test_a_lock_ends_with_an_error_and_holds_inside_one_process(tmp_path):
    with pytest.raises(Killed), locked(tmp_path / "new" / "run"):
        with pytest.raises(BlockingIOError), locked(tmp_path / "new" / "run"):
            pass
        raise Killed
    with locked(tmp_path / "new" / "run"):
        pass


@pytest.mark.parametrize("write", [torch.save, save_file, lambda tensors, file: write_text(file, "long" * 1000)])
def test_a_full_disk_is_told_in_one_way(tmp_path, write):
    """Files that may not grow simulate it: `torch.save` raises a `RuntimeError`, safetensors an error of its own."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OSError, match=f"{tmp_path} cannot be written, with .* MiB left.*make room"):
            with disk_errors(tmp_path):
                write({"a": torch.zeros(1000)}, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError("cannot identify image file"), Killed()])
def test_other_errors_pass_a_disk_by(tmp_path, error):
    with pytest.raises(type(error)) as found, disk_errors(tmp_path):
        raise error
    assert found.value is error
