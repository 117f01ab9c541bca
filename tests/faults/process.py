"""`train.py` as a process of its own, which can be watched, stopped and killed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from zoo.run import CHECKPOINTS
from zoo.training.checkpoints import restore_numpy

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 240.0  # seconds that anything here may take on a busy machine before it counts as hung


class Launcher:
    """Starts `train.py` on one corpus; all processes share compiled programs through a cache on disk."""

    def __init__(self, corpus: Path, cache: Path, *, flags: str = ""):
        self.corpus, self.cache, self.flags = corpus, cache, flags

    def argv(self, workdir: Path, *more: str, task: str = "masked_lm", config: str = "tiny.py") -> list[str]:
        """The arguments of `train.py` for a tiny run."""
        spec = f"{ROOT / 'tests' / 'faults' / config}:{task},folder={self.corpus}"
        return [f"--config={spec}", f"--workdir={workdir}", *more]

    def start(
        self, argv: list[str], *, devices: int = 1, prefix: Sequence[str] = (), program: str = "train.py"
    ) -> subprocess.Popen[str]:
        """A process that has just been started, by the command `prefix` where there is one; `finish` reads what it prints."""
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {self.flags}",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        command = [*prefix, sys.executable, program, *argv]
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE)

    def run(self, argv: list[str], *, devices: int = 1, prefix: Sequence[str] = ()) -> tuple[int, str]:
        """(exit code, what was printed) of a process that ends by itself."""
        return finish(self.start(argv, devices=devices, prefix=prefix))


@contextlib.contextmanager
def together(
    launcher: Launcher,
    *argvs: list[str],
    count: int,
    devices: int,
    only: Sequence[int] | None = None,
    program: str = "train.py",
) -> Iterator[list[subprocess.Popen[str]]]:
    """The `count` processes of one run, `devices` each (those of index `only`), killed at the end whatever happens.

    `argvs`: that of each process, or one for all.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argvs = argvs if len(argvs) == count else argvs * count
    started: list[subprocess.Popen[str]] = []
    try:
        for index in range(count) if only is None else only:
            place = {"count": count, "index": index, "coordinator": f"127.0.0.1:{port}"}
            more = [f"--config.processes.{name}={value}" for name, value in place.items()]
            started.append(launcher.start([*argvs[index], *more], devices=devices, program=program))
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit code, what was printed) once the process has ended."""
    try:
        _, printed = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    return process.returncode, printed


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], *, every: float = 0.002) -> None:
    """Returns once the condition holds; fails if the process ends before."""
    end = time.monotonic() + DEADLINE
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode} before it could be disturbed: {finish(process)[1]}")
        assert time.monotonic() < end, "the process hangs"
        time.sleep(every)


def reached(workdir: Path, step: int) -> Callable[[], bool]:
    """Whether the process started next has recorded `step` (not one that was recorded before it cut the file back)."""
    path = workdir / "metrics.jsonl"
    before = path.stat().st_ino if path.exists() else None

    def holds() -> bool:
        if not path.exists() or path.stat().st_ino == before:
            return False
        return any(json.loads(line)["step"] >= step for line in whole_lines(path)[-1:])

    return holds


def whole_lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def partial_checkpoints(workdir: Path) -> set[int]:
    """The folders (their inodes) of checkpoints that are there in part."""
    folder = workdir / CHECKPOINTS
    found = os.scandir(folder) if folder.is_dir() else ()
    return {entry.inode() for entry in found if entry.name.startswith(".saving-")}


def assert_same_run(workdir: Path, other: Path) -> None:
    """Both ended with the same bytes in every array of the state and in `metrics.jsonl`."""
    ours, theirs = (flat_state(folder) for folder in (workdir, other))
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("params/") for name in ours) and any(name.startswith("opt_state/") for name in ours)
    for name, value in ours.items():
        assert (value.dtype, value.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert value.tobytes() == theirs[name].tobytes(), f"{name} differs"
    assert (workdir / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


def flat_state(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint by its name."""
    return flatten_dict(restore_numpy(workdir / CHECKPOINTS).state, sep="/")


def losses(workdir: Path) -> dict[int, float]:
    """The training loss at every recorded step."""
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file below a folder; empty where there is none."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in _files(folder)}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
