"""Several processes train the same run as one does, and none waits for ever for one that is gone."""

from __future__ import annotations

import contextlib
import json
import os
import signal

import numpy as np
import pytest

from tests.faults.process import Launcher, finish, flat_state, losses, reached, together, wait_until
from zoo.run import CHECKPOINTS
from zoo.training.checkpoints import steps_in
from zoo.training.signals import STOPPED_EXIT_CODE
from zoo.training.watch import LOST_EXIT_CODE

HOST = os.uname().nodename
STEPS = 120
LOST_AFTER = 15.0  # less is too little where many share few cores: at a load of 20 on 2 cores, 8 s were
SHORT = (f"--config.train.steps={STEPS}", "--config.train.checkpoint_every=20", "--config.train.evaluate_every=60")
RTOL = 1e-5  # sums over devices are taken in another order; other rows or masks are 1e-2 away


def argv_of(launcher, workdir):
    return launcher.argv(workdir, *SHORT, f"--config.processes.lost_after={LOST_AFTER}")


@pytest.fixture(scope="module")
def launcher(launcher):
    """As for the other faults, but with quick compilation: here no bytes are compared."""
    return Launcher(launcher.corpus, launcher.cache, flags="--xla_backend_optimization_level=0")


@pytest.fixture(scope="module")
def alone(launcher, tmp_path_factory):
    """The run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    code, printed = launcher.run(launcher.argv(workdir, *SHORT), devices=4)
    assert code == 0, printed
    return workdir


@pytest.fixture(scope="module")
def pair(launcher, tmp_path_factory):
    """(the run of two processes with one device each, what each of them has printed)."""
    workdir = tmp_path_factory.mktemp("pair") / "run"
    with together(launcher, argv_of(launcher, workdir), count=2, devices=1) as processes:
        ended = [finish(process) for process in processes]
    assert [code for code, _ in ended] == [0, 0], ended
    return workdir, [printed for _, printed in ended]


def assert_same_losses(workdir, other):
    ours, theirs = losses(workdir), losses(other)
    assert ours.keys() == theirs.keys() and len(ours) == STEPS // 5
    theirs = np.array(list(theirs.values()))
    assert np.median(np.abs(np.diff(theirs))) > 1e-2
    np.testing.assert_allclose(list(ours.values()), theirs, rtol=RTOL)


def scores(workdir):
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {(r["step"], name): value for r in records for name, value in r.items() if name.startswith("dev/")}


def test_two_processes_train_and_score_what_one_does(pair, alone):
    workdir, _ = pair
    assert_same_losses(workdir, alone)
    ours, theirs = scores(workdir), scores(alone)
    assert ours.keys() == theirs.keys() and len(ours) >= 4
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=RTOL)
    assert (workdir / "config.json").read_bytes() == (alone / "config.json").read_bytes()
    assert (workdir / "tokenizer" / "vocab.txt").read_bytes() == (alone / "tokenizer" / "vocab.txt").read_bytes()


def test_process_0_alone_says_what_all_do(pair):
    _, (first, second) = pair
    assert f"finished {STEPS} steps" in first and f"{STEPS}/{STEPS}" in first
    assert [line for line in second.splitlines() if "[Gloo]" not in line] == []


def test_a_checkpoint_of_two_processes_is_whole_in_numpy(pair, alone):
    ours, theirs = flat_state(pair[0]), flat_state(alone)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value.dtype, value.shape) == (theirs[name].dtype, theirs[name].shape), name
        # LAMB divides by norms: what differs in the last bits of a gradient differs by more in a moment near zero.
        np.testing.assert_allclose(value, theirs[name], rtol=1e-3, atol=1e-6, err_msg=name)


def test_two_processes_score_a_run_as_its_training_did(launcher, pair):
    workdir, _ = pair
    argv = [f"--workdir={workdir}"]
    with together(launcher, argv, count=2, devices=1, program="eval.py") as processes:
        ended = [finish(process) for process in processes]
    assert [code for code, _ in ended] == [0, 0], ended
    report = json.loads((workdir / "scores_dev.json").read_text())
    assert report["step"] == STEPS
    recorded = {name.removeprefix("dev/"): value for (step, name), value in scores(workdir).items() if step == STEPS}
    assert report["scores"].keys() == recorded.keys()
    for name, value in recorded.items():
        assert report["scores"][name] == pytest.approx(value, rel=RTOL), name


def test_sigterm_at_one_process_stops_all_at_one_step_and_other_counts_go_on(launcher, alone, tmp_path):
    """Two are asked to stop, of four one is stalled and one killed, one ends the run: the losses are those of one alone."""
    workdir = tmp_path / "run"
    argv = argv_of(launcher, workdir)
    at_target = reached(workdir, 10)
    with together(launcher, argv, count=2, devices=1) as processes:
        wait_until(at_target, processes[0])
        processes[1].send_signal(signal.SIGTERM)
        ended = [finish(process) for process in processes]
    assert [code for code, _ in ended] == [STOPPED_EXIT_CODE] * 2, ended
    stopped_at = steps_in(workdir / CHECKPOINTS)[0]
    assert 10 <= stopped_at < STEPS
    assert f"stopped: SIGTERM at process 1 of 2 (host {HOST}) at step {stopped_at}" in ended[0][1]
    assert "stopped" not in ended[1][1]

    target = stopped_at + 5 - stopped_at % 5  # the next step that is recorded
    at_target = reached(workdir, target)
    with together(launcher, argv, count=4, devices=1) as processes:
        wait_until(at_target, processes[0])
        processes[2].send_signal(signal.SIGSTOP)
        processes[3].send_signal(signal.SIGKILL)
        ended = [finish(process) for process in processes[:2]]
    assert [code for code, _ in ended] == [LOST_EXIT_CODE] * 2, ended
    assert f"resuming at step {stopped_at} of {STEPS}" in ended[0][1]
    for _, printed in ended:
        assert f"stopped: process 2 of 4 (host {HOST}), process 3 of 4 (host {HOST}): killed, stalled" in printed, ended

    saved = steps_in(workdir / CHECKPOINTS)[0]
    assert saved >= stopped_at
    code, printed = launcher.run(argv, devices=4)
    assert code == 0 and f"resuming at step {saved} of {STEPS}" in printed, printed
    assert_same_losses(workdir, alone)


def test_the_others_stop_and_name_process_0_killed_or_stalled(launcher, pair, tmp_path):
    """Process 0 serves the store that all the others look at."""
    with contextlib.ExitStack() as stack:
        survivors = {}
        for sent in (signal.SIGSTOP, signal.SIGKILL):
            workdir = tmp_path / sent.name
            at_target = reached(workdir, 40)
            victim, survivors[workdir] = stack.enter_context(
                together(launcher, argv_of(launcher, workdir), count=2, devices=1)
            )
            wait_until(at_target, victim)
            victim.send_signal(sent)
        for workdir, survivor in survivors.items():
            code, printed = finish(survivor)
            assert code == LOST_EXIT_CODE, printed
            last = printed.rstrip().splitlines()[-1]
            assert last.startswith(f"stopped: process 0 of 2 (host {HOST}): killed, stalled"), printed
            assert steps_in(workdir / CHECKPOINTS)[0] >= 20
            flat_state(workdir)  # verifies the content


def test_a_mistake_that_one_process_meets_ends_all_of_them(launcher, tmp_path):
    """Process 1 is given a folder of its own, as on hosts that share no file system."""
    argvs = [argv_of(launcher, tmp_path / name) for name in ("run", "elsewhere")]
    with together(launcher, *argvs, count=2, devices=1) as processes:
        (first, told), (second, said) = [finish(process) for process in processes]
    assert (first, second) == (2, 2), told + said
    assert "error: " in said and "on a file system that all hosts share" in said and "Traceback" not in said, said
    assert "stopped: process 1 of 2" in told and "that all hosts share" in told and "Traceback" not in told, told


def test_a_mistake_that_all_meet_is_printed_once(launcher, tmp_path):
    argv = [*argv_of(launcher, tmp_path / "run"), "--config.data.train=missing.txt"]
    with together(launcher, argv, count=2, devices=1) as processes:
        (first, said), (second, told) = [finish(process) for process in processes]
    assert (first, second) == (2, 2), said + told
    assert said.count("error: ") == 1 and "missing.txt" in said
    assert "Traceback" not in said + told and told.startswith("stopped: process 0 of 2")


def test_processes_that_do_not_all_start_end_in_time(launcher, tmp_path):
    argv = [*argv_of(launcher, tmp_path / "run"), "--config.processes.start_within=3"]
    with together(launcher, argv, count=2, devices=1, only=(0,)) as (process,):
        code, printed = finish(process)
    assert code == LOST_EXIT_CODE, printed
    assert "stopped: process 0 of 2 waited 3 s for all others to start" in printed, printed
    assert not (tmp_path / "run").exists()
