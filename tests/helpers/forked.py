"""
Processes of a test that need not import everything anew: forked from one that has done so, once for each test worker.

What `torchrun` does besides is done here, too: every process knows its rank, and all end when one has failed.
"""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from typing import Any

import linmu_hf


LOADED = ["distil_worker", "fill_worker", "linmu_hf.commands.evaluate", "linmu_hf.distillation.runner"]
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # DeepSpeed asks for ninja
    "PYTHONPATH": f"{Path(linmu_hf.__file__).parents[1]}:{Path(__file__).parent}",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(LOADED)


def run_forked(
    main: Callable[[], Any], arguments: Sequence[Any], processes: int = 1, timeout: float = 300
) -> CompletedProcess:
    """
    Runs `main`, which a module of `LOADED` has at its top, in so many processes with `sys.argv[1:]` of `arguments`.

    Returns:
        `CompletedProcess`: with the outputs of all of them, and the exit status of the first that failed.
    """
    with TemporaryDirectory() as folder:
        started, outputs = [], []
        port = _free_port()
        for rank in range(processes):
            outputs.append([Path(folder) / f"{rank}.{stream}" for stream in ("out", "err")])
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            given = ranks | {"MASTER_ADDR": "localhost", "MASTER_PORT": port} if processes > 1 else {}
            started.append(start_forked(main, arguments, given, outputs[-1]))
        status = _wait(started, time.monotonic() + timeout)
        texts = ["".join(path.read_text() for path in paths if path.exists()) for paths in zip(*outputs)]
    return CompletedProcess(list(map(str, arguments)), status, *texts)


def start_forked(
    main: Callable[[], Any], arguments: Sequence[Any], environment: Mapping[str, Any], outputs: Sequence[Path]
) -> Any:
    """Starts `main` in one process, with its outputs in two files."""
    words = tuple(map(str, arguments))
    process = forkserver.Process(target=_run, args=(main, words, dict(environment), tuple(outputs)))
    with _environment():
        process.start()
    return process


def _run(main: Callable[[], Any], words: Sequence[str], environment: dict[str, Any], outputs: Sequence[Path]) -> None:
    for descriptor, path in zip((1, 2), outputs):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update({name: str(value) for name, value in (ENVIRONMENT | environment).items()})
    sys.argv[1:] = words
    try:
        status = main() or 0
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
        status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait(processes: Sequence[Any], end: float) -> int:
    """Waits for all processes, ends the others when one has failed, and returns the status of that one, or 0."""
    failed = 0
    while any(process.is_alive() for process in processes):
        failed = failed or next((p.exitcode for p in processes if p.exitcode), 0)
        late = time.monotonic() > end
        for process in processes if failed or late else ():
            process.terminate() if not late else process.kill()
        for process in processes:
            process.join(0.05)
        if late:
            raise TimeoutError("the processes of a test did not end in time")
    return failed or next((p.exitcode for p in processes if p.exitcode), 0)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


@contextmanager
def _environment():
    """That of the process that others are forked from: it imports what reads the environment."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
