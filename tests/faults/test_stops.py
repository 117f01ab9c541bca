"""A run that is killed, stopped or moved to other devices ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import time

import numpy as np
import pytest

from tests.faults.process import assert_same_run, finish, losses, partial_checkpoints, reached, wait_until
from tests.faults.tiny import STEPS
from zoo.training.signals import STOPPED_EXIT_CODE

KILLS = {6: {"starting": 1, "training": 2, "saving": 3}, 20: {"starting": 4, "training": 10, "saving": 6}}
START_UP = 4.0  # seconds within which a kill meets imports, compilation or the restoring of a checkpoint
MARGIN = 80  # steps that a process cannot make between its target and its death


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_equals_an_unbroken_one(launcher, unbroken, tmp_path, kills):
    seed = int(os.environ.get("FAULT_SEED", random.SystemRandom().randrange(10**6)))
    rng = random.Random(seed)
    moments = [kind for kind, count in KILLS[kills].items() for _ in range(count)]
    rng.shuffle(moments)
    targets = sorted(rng.randrange(1, STEPS - MARGIN) for _ in moments)
    workdir, argv, in_a_save = tmp_path / "run", launcher.argv(tmp_path / "run"), 0
    for moment, target in zip(moments, targets, strict=True):
        at_target, left = reached(workdir, target), partial_checkpoints(workdir)
        process = launcher.start(argv)
        if moment == "starting":
            end, begun = time.monotonic() + rng.uniform(0, START_UP), reached(workdir, 1)
            wait_until(lambda end=end, begun=begun: time.monotonic() > end or begun(), process)
        else:
            wait_until(at_target, process)
            if moment == "saving":
                wait_until(lambda old=left: partial_checkpoints(workdir) - old, process, every=0.0005)
            time.sleep(rng.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        code, printed = finish(process)
        assert code == -signal.SIGKILL, f"FAULT_SEED={seed}: {printed}"
        in_a_save += bool(partial_checkpoints(workdir) - left)
    print(f"FAULT_SEED={seed}: {len(moments)} kills, {in_a_save} of them in a save")
    assert in_a_save >= kills // 6, "hardly any kill met a save"
    code, printed = launcher.run(argv)
    assert code == 0, f"FAULT_SEED={seed}: {printed}"
    assert_same_run(workdir, unbroken)
    assert not partial_checkpoints(workdir)


def test_two_equal_runs_write_the_same_bytes(launcher, unbroken, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "12345")  # nothing may hang on the order of a set
    code, printed = launcher.run(launcher.argv(tmp_path / "run"))
    assert code == 0, printed
    assert_same_run(tmp_path / "run", unbroken)


def test_a_finished_run_is_left_as_it_is(launcher, unbroken):
    before = (unbroken / "metrics.jsonl").read_bytes(), sorted(os.listdir(unbroken / "checkpoints"))
    code, printed = launcher.run(launcher.argv(unbroken))
    assert code == 0, printed
    assert ((unbroken / "metrics.jsonl").read_bytes(), sorted(os.listdir(unbroken / "checkpoints"))) == before


def test_sigterm_before_training_exits_with_its_own_code(launcher, tmp_path):
    process = launcher.start(launcher.argv(tmp_path / "run"))
    wait_until(lambda: (tmp_path / "run" / "tokenizer").exists(), process)
    process.terminate()
    code, printed = finish(process)
    assert code == STOPPED_EXIT_CODE and "Traceback" not in printed, printed
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_sigterm_saves_and_other_numbers_of_devices_go_on_with_the_same_data(launcher, unbroken, tmp_path):
    workdir = tmp_path / "run"
    argv = launcher.argv(workdir)
    for devices, target in ((1, 37), (8, 91)):
        at_target = reached(workdir, target)
        process = launcher.start(argv, devices=devices)
        wait_until(at_target, process)
        process.send_signal(signal.SIGTERM)
        code, printed = finish(process)
        assert code == STOPPED_EXIT_CODE, printed
        step = max(int(name.removeprefix("step_")) for name in os.listdir(workdir / "checkpoints"))
        assert target <= step < STEPS and f"SIGTERM at step {step} of {STEPS}, which is saved" in printed
    code, printed = launcher.run(argv, devices=2)
    assert code == 0 and f"resuming at step {step} of {STEPS}" in printed
    ours, theirs = (losses(folder) for folder in (workdir, unbroken))
    assert ours.keys() == theirs.keys() and len(ours) == STEPS // 5
    ours, theirs = np.array(list(ours.values())), np.array(list(theirs.values()))
    # Other rows, masks or dropout bits would show: the losses of different batches are further apart than this.
    assert np.median(np.abs(np.diff(theirs))) > 1e-2
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_sigterm_and_resume_give_the_bytes_of_an_unbroken_run(launcher, unbroken, tmp_path):
    workdir = tmp_path / "run"
    argv = launcher.argv(workdir)
    at_target = reached(workdir, 63)
    process = launcher.start(argv)
    wait_until(at_target, process)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == STOPPED_EXIT_CODE
    code, printed = launcher.run(argv)
    assert code == 0, printed
    assert_same_run(workdir, unbroken)
