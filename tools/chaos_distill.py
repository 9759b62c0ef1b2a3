"""
Kills `linmu-distill` by SIGKILL at random moments and lets the same command end what it began, with one process and
with two: every run has to end with the weights and losses of one that nobody killed, bit by bit, and no folder that a
kill leaves may load as something else.

    python tools/chaos_distill.py [--runs 20] [--seed N] [--json FILE]

Half of the moments are random times, half come shortly after something on disk: a checkpoint or a stage's folder that
is being written, a stage that is finished, a group of layers that begins or ends, the teacher's answers. With one
process the teacher-fed stage trains two layers at a time. Every run is a process group of its own, forked from this
process once all is imported. With two processes, which have torchrun's environment variables, the whole group is
killed. Exit code 1: a run that ended otherwise.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

import linmu_hf.distillation.runner  # noqa: F401  (imported once, for all runs)
from linmu_hf import LinMUConfig, LinMUForConditionalGeneration
from linmu_hf.commands.distill import main as distill
from linmu_hf.files import write_text
from linmu_hf.testbed.processor import build_processor


sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from distillation_fixtures import save_pair, tiny_teacher_config


STAGES = ("align", "fed", "lora")
STAGES_YAML = """
- {name: align, trains: [flex, swin], max_steps: 4, learning_rate: 1e-3, hid: 0.1, hidden_input: teacher}
- {name: fed, trains: [flex], max_steps: 5, learning_rate: 1e-3, hid: 0.1, tok: 0.5}
- {name: lora, trains: [flex, swin, lora], max_steps: 5, learning_rate: 1e-3, tok: 0.4, seq: 0.3, sup: 0.3, lora_r: 2}
"""

# What is on disk when a kill comes a little later.
MOMENTS = {
    "a checkpoint": "*.running/**/checkpoint-*",
    "a group of layers": "align.running/layers-*",
    "a stage's folder": "*.partial",
    "a finished stage": "*/training_log.jsonl",
    "the teacher's answers": "pseudo_targets/shard-*/answers.jsonl",
    "the model": "*.part",
}
LIMIT = 120  # seconds that no run takes


def make_inputs(folder: Path) -> None:
    """Writes a tiny teacher, a student on its backbone and a few rows about random pictures and clips."""
    processor = build_processor()
    config = tiny_teacher_config(processor)
    torch.manual_seed(0)
    teacher = LinMUForConditionalGeneration(LinMUConfig.from_teacher(config, keep_attention="all"))
    student = LinMUForConditionalGeneration(LinMUConfig.from_teacher(config))
    student.load_state_dict(teacher.state_dict(), strict=False)
    save_pair(folder, processor, student, teacher)

    pixels = np.random.default_rng(0)
    lines = []
    for index in range(6):
        names = [f"{index}-{number}.png" for number in range(4 if index % 3 == 2 else 1 + index % 2)]
        for name in names:
            Image.fromarray(pixels.integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(folder / name)
        media = {"videos": [{"frames": names, "fps": 2}]} if index % 3 == 2 else {"images": names}
        marks = "<video>" if "videos" in media else "<image>" * len(names)
        question = {"role": "user", "content": f"{marks}row {index}?"}
        lines.append(json.dumps({"messages": [question, {"role": "assistant", "content": str(index)}], **media}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "stages.yaml").write_text(STAGES_YAML)


def command(folder: Path, out: Path, processes: int) -> list[str]:
    """Returns the arguments of `linmu-distill`, which are the same in every attempt."""
    values = {
        "model": folder / "student",
        "teacher": folder / "teacher",
        "dataset": folder / "rows.jsonl",
        "stages": folder / "stages.yaml",
        "output_dir": out,
        "per_device_train_batch_size": 2 // processes,
        "max_completion_length": 3,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    if processes == 1:
        values["layers_at_a_time"] = 2
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def start(folder: Path, out: Path, processes: int, log: Path) -> int:
    """Forks a process group that runs the command; returns its leader's id."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = command(folder, out, processes)
    sys.stdout.flush()
    leader = os.fork()
    os.setpgid(leader, leader)  # both do it: a kill of the group then finds one
    if leader:
        return leader
    with open(log, "ab", buffering=0) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    if processes == 1:
        _become(arguments)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    ranks = []
    for rank in range(processes):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
            _become(arguments)
        ranks.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks]
    os._exit(next((abs(code) for code in codes if code), 0))


def _become(arguments: list[str]) -> None:
    code = 1
    try:
        code = distill(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(leader: int, until: Callable[[], bool] | None = None) -> int | None:
    """Waits for a run to end and returns its exit code, or kills its group once `until` is true and returns `None`."""
    end = time.monotonic() + LIMIT
    while True:
        done, status = os.waitpid(leader, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        late = time.monotonic() > end
        if late or (until is not None and until()):
            os.killpg(leader, signal.SIGKILL)
            os.waitpid(leader, 0)
            _wait_for_group(leader)
            if late:
                raise TimeoutError(f"a run takes more than {LIMIT} s")
            return None
        time.sleep(0.001)


def _wait_for_group(leader: int) -> None:
    """The processes below the leader have ended, too."""
    try:
        while True:
            os.killpg(leader, 0)
            time.sleep(0.001)
    except ProcessLookupError:
        pass


def moment(chance: random.Random, out: Path, seconds: float) -> tuple[str, Callable[[], bool]]:
    """Draws when to kill a run that takes `seconds`: at a time, or shortly after something has appeared on disk."""
    began = time.monotonic()
    if chance.random() < 0.5:
        after = chance.uniform(0, seconds)
        return f"after {after:.2f} s", lambda: time.monotonic() - began >= after
    name, pattern = chance.choice(list(MOMENTS.items()))
    before, delay, seen = set(out.glob(pattern)), chance.choice((0, chance.uniform(0, 0.1))), []

    def until() -> bool:
        if not seen and any(path not in before for path in out.glob(pattern)):
            seen.append(time.monotonic())
        return bool(seen) and time.monotonic() - seen[0] >= delay

    return f"{1000 * delay:.0f} ms after {name}", until


def weights(folder: Path) -> dict[str, torch.Tensor] | None:
    """Returns the weights of a folder that loads as a model, or `None`."""
    try:
        json.loads((folder / "config.json").read_text())
        return load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError):
        return None


def differs(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str | None:
    """Returns the name of the first tensor that is not the same bit by bit."""
    for name in found.keys() | expected.keys():
        if name not in found or name not in expected or not torch.equal(found[name], expected[name]):
            return name
    return None


def check_left(out: Path, whole: Path) -> list[str]:
    """Returns what is wrong with the folders that a kill left: those that load must hold a stage's trained weights."""
    wrong = []
    for folder in (out, *(path for path in out.glob("*") if path.is_dir())):
        found = weights(folder)
        stage = STAGES[-1] if folder == out else folder.name.split(".")[0]
        if found is not None:
            tensor = differs(found, weights(whole / stage) or {})
            if tensor:
                wrong.append(f"{folder.name} loads with another {tensor}")
    return wrong


def check_end(out: Path, whole: Path) -> list[str]:
    """Returns what is wrong with a finished run: its stages, its model, its log, and what should be gone."""
    wrong = check_left(out, whole)
    for folder in (out, *(out / stage for stage in STAGES)):
        if weights(folder) is None:
            wrong.append(f"{folder.name} does not load")
    names = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in (out, whole)]
    for name in sorted(set(names[0]) ^ set(names[1])):
        wrong.append(f"{name} is {'there' if name in names[0] else 'missing'}")
    wrong += [f"{path} is left" for path in out.parent.glob(f".{out.name}*")]
    if _losses(out) != _losses(whole):
        wrong.append("the log has other losses")
    return wrong


def _losses(out: Path) -> list[dict[str, object]]:
    """The log's figures but for times and summaries: a stage that was killed after its last checkpoint has none."""
    rows = map(json.loads, (out / "training_log.jsonl").read_text().splitlines())
    return [{**row, "seconds": None} for row in rows if "loss" in row]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=None, help="by default another one every time")
    parser.add_argument("--most_kills", type=int, default=3, help="most kills of one run")
    parser.add_argument("--work", type=Path, default=None, help="folder to work in, which is kept")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    chance, began = random.Random(seed), time.monotonic()
    # That of tqdm is a semaphore which all forks share: one that is killed while it writes would block all after it.
    tqdm.set_lock(threading.RLock())
    folder = Path(tempfile.mkdtemp(prefix="chaos-")) if arguments.work is None else arguments.work
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    make_inputs(folder)

    seconds = {}
    for processes in (1, 2):
        start_time, log = time.monotonic(), folder / f"whole-{processes}.log"
        code = wait(start(folder, folder / f"whole-{processes}", processes, log))
        seconds[processes] = time.monotonic() - start_time
        if code:
            print(log.read_text(), file=sys.stderr)
            raise RuntimeError(f"the run of {processes} processes that nobody kills ends with {code}")
        print(f"{processes} processes, not killed: {seconds[processes]:.1f} s", flush=True)

    rows, unequal = [], 0
    for number in range(arguments.runs):
        processes = 1 + number % 2
        out, whole = folder / f"run-{number}", folder / f"whole-{processes}"
        log, wanted = folder / f"run-{number}.log", 1 + chance.randrange(arguments.most_kills)
        kills, wrong, code = [], [], None
        while code is None:
            if len(kills) < wanted:
                when, until = moment(chance, out, seconds[processes])
                code = wait(start(folder, out, processes, log), until)
                if code == 0 and not kills:  # it ended before: once more from the beginning
                    shutil.rmtree(out)
                    code = None
                elif code is None:
                    kills.append(when)
                    wrong += check_left(out, whole)
            else:
                code = wait(start(folder, out, processes, log))
        wrong += [f"exit code {code}"] if code else check_end(out, whole)
        unequal += bool(wrong)
        rows.append({"run": number, "processes": processes, "kills": kills, "wrong": wrong})
        print(f"{number:3}  {processes} processes  {'; '.join(kills):80}  {'; '.join(wrong) or 'equal'}", flush=True)
        if wrong:
            print(f"     {folder}: {log.name}")
    total = sum(len(row["kills"]) for row in rows)
    took = time.monotonic() - began
    print(f"\n{total} kills of {len(rows)} runs: {len(rows) - unequal} equal endings, {unequal} others; {took:.0f} s")
    if arguments.json:
        report = {"seed": seed, "kills": total, "equal": len(rows) - unequal, "seconds": round(took, 1), "runs": rows}
        write_text(arguments.json, json.dumps(report, indent=2) + "\n")
    if not unequal and arguments.work is None:
        shutil.rmtree(folder)
    return int(unequal > 0)


if __name__ == "__main__":
    sys.exit(main())
