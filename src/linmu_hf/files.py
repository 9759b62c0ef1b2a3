"""Files and folders that appear whole or not at all, and the lock of a folder that one run at a time may write."""

import errno
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError


try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
TORCH_WRITER = r"inline_container|PytorchStreamWriter|iostream error"  # what a failed `torch.save` says


@contextmanager
def whole_file(file: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens `file` for writing; it gets its name, and replaces an older one, only when complete and on disk."""
    part = file.with_name(f"{file.name}.part")
    with open(part, mode, encoding=None if "b" in mode else "utf-8") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, file)


def write_text(file: Path, text: str) -> None:
    """Writes a text file that is either the old one or the new one, also after a crash."""
    with whole_file(file) as stream:
        stream.write(text)


def copy_file(source: Path, file: Path) -> None:
    """Copies a file, which appears whole or not at all."""
    with open(source, "rb") as content, whole_file(file, "wb") as stream:
        shutil.copyfileobj(content, stream)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to fill, which becomes `folder` at the end and replaces an older one."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    replace_folder(partial, folder)


def replace_folder(complete: Path, folder: Path) -> None:
    """Renames a complete folder to `folder`; an older one goes only after that."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(complete, folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """
    Turns what is raised where a disk is full or fails, by safetensors, `torch.save` and files without saying where,
    into an `OSError` that names `folder`.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError):
            told, reason = error.errno in FULL and error.filename is None, error.strerror
        else:
            written = re.search(r"[Ss]erializ.*\(os error \d+\)|" + TORCH_WRITER, str(error))
            told, reason = written is not None, "a file could not be written whole"
        if not told:
            raise
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        raise OSError(
            f"{folder} cannot be written, with {free / 2**20:,.1f} MiB left on its disk: {reason}. Nothing that was "
            "complete is lost: make room, and go on"
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Holds the lock of a folder, which need not exist yet. The system frees it when the process ends, however it ends.

    Raises:
        `BlockingIOError`: Another run holds it.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_name(f".{folder.name}.lock")
    stream = _hold(file, folder)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # still held: a process that opened it meanwhile will see that it is gone
        stream.close()


def _hold(file: Path, folder: Path) -> IO[str]:
    while True:
        stream = open(file, "a+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if fcntl is None or os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                break
        except FileNotFoundError:  # its holder has just ended
            pass
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read() or "another process"
            stream.close()
            raise BlockingIOError(
                f"{folder} is being written by {holder}: wait for it or end it, or name another folder"
            ) from None
        stream.close()
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {socket.gethostname()}")
    stream.flush()
    return stream


def check_report(file: str | Path | None, option: str = "--json") -> None:
    """Raises an `OSError` if a report cannot be written to `file`, before the work that it is about."""
    if file is None:
        return
    path = Path(file).expanduser().absolute()
    if path.is_dir():
        raise IsADirectoryError(f"{option} {file} is a folder: name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {file}: its folder does not exist")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"{option} {file} cannot be written ({error.strerror}): name a file in another folder") from None
