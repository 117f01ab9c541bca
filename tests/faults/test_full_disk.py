"""What cannot be written stops the run with the cause; what was written stays whole; with space again it goes on."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal

from tests.faults.disk import BOUND_BY_MODES, small_disk
from tests.faults.process import assert_same_run, finish, reached, wait_until
from tests.faults.tiny import STEPS
from zoo.command_line import NOT_WRITTEN
from zoo.training.checkpoints import steps_in
from zoo.training.manifest import verify


def limit_files(process, size):
    """No file of the process grows beyond `size` bytes from now on."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def assert_stopped(code, printed, cause, path):
    """One line at the end says what could not be written and why."""
    assert code == NOT_WRITTEN and "Traceback" not in printed and "Exception" not in printed, printed
    (last,) = (line for line in printed.splitlines() if line.startswith("stopped: "))
    assert last == printed.splitlines()[-1] and cause in last and str(path) in last, last


def whole_checkpoints(workdir):
    """The steps of the checkpoints, each of which holds what was written."""
    steps = steps_in(workdir / "checkpoints")
    for step in steps:
        assert verify(workdir / "checkpoints" / f"step_{step:08d}")["step"] == step
    return steps


def test_a_checkpoint_that_does_not_fit(launcher, unbroken, tmp_path):
    workdir, at_target = tmp_path / "run", reached(tmp_path / "run", 50)
    process = launcher.start(launcher.argv(workdir))
    wait_until(at_target, process)
    limit_files(process, 15_000)  # room for the records, not for the arrays
    code, printed = finish(process)
    assert_stopped(code, printed, os.strerror(errno.EFBIG), workdir / "checkpoints")
    steps = whole_checkpoints(workdir)
    assert steps and f"goes on from step_{max(steps):08d}" in printed
    code, printed = launcher.run(launcher.argv(workdir))
    assert code == 0 and f"resuming at step {max(steps)} of {STEPS}" in printed, printed
    assert_same_run(workdir, unbroken)


def test_a_record_that_does_not_fit(launcher, unbroken, tmp_path):
    workdir, at_target = tmp_path / "run", reached(tmp_path / "run", 40)
    # Without checkpoints on the way, for their files would meet the limit, too.
    argv = launcher.argv(workdir, "--config.train.checkpoint_every=0")
    process = launcher.start(argv)
    wait_until(at_target, process)
    limit_files(process, 5_000)
    code, printed = finish(process)
    assert_stopped(code, printed, os.strerror(errno.EFBIG), workdir / "metrics.jsonl")
    assert not whole_checkpoints(workdir)
    assert (workdir / "metrics.jsonl").stat().st_size == 5_000, "the disk took a part of the last line"
    code, printed = launcher.run(argv)
    assert code == 0, printed
    assert_same_run(workdir, unbroken)


def test_a_folder_that_becomes_read_only(launcher, unbroken, tmp_path):
    workdir, at_target = tmp_path / "run", reached(tmp_path / "run", 50)
    process = launcher.start(launcher.argv(workdir), prefix=BOUND_BY_MODES)
    wait_until(at_target, process)
    (workdir / "checkpoints").chmod(0o555)
    code, printed = finish(process)
    (workdir / "checkpoints").chmod(0o755)
    assert_stopped(code, printed, "Permission denied", workdir / "checkpoints")
    steps = whole_checkpoints(workdir)
    code, printed = launcher.run(launcher.argv(workdir), prefix=BOUND_BY_MODES)
    assert code == 0 and f"resuming at step {max(steps)} of {STEPS}" in printed, printed
    assert_same_run(workdir, unbroken)


def test_a_disk_that_becomes_full_and_is_still_full_at_the_next_start(launcher, unbroken, tmp_path):
    with small_disk(tmp_path / "disk", size=4 * 2**20) as disk:
        workdir, seen = disk.mount / "run", disk.outside / "run"
        at_target = reached(seen, 50)
        process = launcher.start(launcher.argv(workdir), prefix=disk.prefix)
        wait_until(at_target, process)
        process.send_signal(signal.SIGSTOP)  # or it might be at its end before the disk is full
        disk.fill(leave=40_000)  # room for the records, not for a checkpoint
        process.send_signal(signal.SIGCONT)
        code, printed = finish(process)
        assert_stopped(code, printed, "No space left on device", workdir)
        steps = whole_checkpoints(seen)
        assert steps
        for unfinished in (seen / "checkpoints").glob(".saving-*"):
            shutil.rmtree(unfinished)  # as the next start does, which might find room enough in its place
        disk.fill(leave=0)
        code, printed = launcher.run(launcher.argv(workdir), prefix=disk.prefix)
        assert_stopped(code, printed, "No space left on device", workdir)
        assert whole_checkpoints(seen)[0] >= steps[0]
        disk.free()
        code, printed = launcher.run(launcher.argv(workdir), prefix=disk.prefix)
        assert code == 0 and "resuming at step" in printed, printed
        assert_same_run(seen, unbroken)
