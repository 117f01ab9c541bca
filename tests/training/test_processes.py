"""Processes that wait for each other: every barrier ends, names who is missing, and all stop at one step."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

from tests.devices import first
from zoo.errors import UserError
from zoo.registry import make
from zoo.training.processes import Processes, ProcessMissing
from zoo.training.settings import ProcessSettings
from zoo.training.sharding import batch_part, make_mesh
from zoo.training.watch import Watch

ROOT = Path(__file__).resolve().parents[2]


class Store:
    """The calls of the client of `jax.distributed` that are used, on a dictionary."""

    def __init__(self):
        self.values: dict[str, str] = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self.values and not allow_overwrite:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self.values[key] = value

    def key_value_try_get(self, key):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")
        return self.values[key]

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in dict(self.values).items() if key.startswith(prefix)]


@pytest.fixture
def three():
    """Three processes of one run, as threads of this one."""
    store = Store()
    watches = [Watch(store, i, 3, lost_after=600.0) for i in range(3)]
    for watch in watches:
        watch.beat = 0.02
        watch.start()
    yield [Processes(i, 3, client=store, watch=watch, wait=60.0) for i, watch in enumerate(watches)]
    for watch in watches:
        watch.close()


def at_once(processes, call):
    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(call, processes))


def test_what_process_0_says_all_hear_and_its_turn_is_first(three):
    order = []

    def run(process):
        with process.primary_first("work"):
            if process.primary:
                time.sleep(0.1)
            order.append(process.index)
        process.barrier("all")
        assert len(order) == 3
        return [process.share("value", {"from": process.index}) for _ in range(2)]

    assert at_once(three, run) == [[{"from": 0}, {"from": 0}]] * 3
    assert order[0] == 0 and sorted(order) == [0, 1, 2]


def test_a_barrier_that_is_not_reached_names_who_is_missing(three):
    for process in three:
        process._wait = 0.5

    def run(process):
        if process.index != 2:
            with pytest.raises(ProcessMissing, match=r"waited 0.5 s at 'all' for process 2 of 3 \(host \S+\)"):
                process.barrier("all")

    at_once(three, run)


def test_waiting_for_a_process_0_that_does_not_come_ends_and_names_it(three):
    three[1]._wait = 0.2
    with pytest.raises(ProcessMissing, match="process 0 of 3"):
        three[1].share("value", None)
    with pytest.raises(ProcessMissing, match="process 0 of 3"), three[1].primary_first("work"):
        raise AssertionError("its turn did not come")


@pytest.mark.parametrize("asked", [0, 2])
def test_all_stop_at_one_step_that_none_has_passed(three, asked):
    """As in training: nobody can end step s before all have begun it, and each begins `ahead` steps beyond what it has seen end."""
    ahead, total = 2, 2000
    begun = [0, 0, 0]
    changed = threading.Condition()

    def run(process):
        for step in range(1, total + 1):
            with changed:
                begun[process.index] = step
                changed.notify_all()
                changed.wait_for(lambda step=step: min(begun) >= step - ahead + 1, timeout=60)
            signal_name = "SIGTERM" if process.index == asked and step > 50 else None
            stop = process.stop_at(signal_name, step, ahead)
            if stop and step >= stop[0]:
                return step, stop[1]
            time.sleep(0.001)
        return total, "the end"

    ended = at_once(three, run)
    assert len(set(ended)) == 1 and 50 < ended[0][0] < total, ended
    assert ended[0][1].startswith(f"SIGTERM at process {asked} of 3")


def test_one_process_alone_waits_for_nobody():
    alone = Processes()
    with alone.primary_first("work"):
        alone.barrier("all")
    assert alone.primary and alone.share("value", 3) == 3
    assert alone.stop_at(None, 5, 2) is None and alone.stop_at("SIGTERM", 5, 2) == (5, "SIGTERM")


def test_the_rows_of_one_process_are_all_rows():
    for sizes in ({}, {"data": 2, "tensor": 4}, {"data": 1, "fsdp": 8}):
        assert batch_part(make_mesh(**sizes, devices=first(8))) == (0, 1)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"count": 2}, "count=2 also needs index (0 to 1) and coordinator (host:port)"),
        ({"count": 2, "index": 2, "coordinator": "a:1"}, "index=2 is not one of 0 to 1"),
        ({"count": 2, "index": 0, "coordinator": "a"}, "host:port of process 0, not 'a'"),
        ({"detect": True, "index": 0}, "give either it or them"),
        ({"count": 0}, "count must be positive, not 0"),
        ({"lost_after": 0.0}, "lost_after must be positive"),
    ],
)
def test_settings_that_make_no_sense_say_what_would(given, said):
    with pytest.raises(UserError) as caught:
        make(ProcessSettings, given, "processes")
    assert said in str(caught.value)


@pytest.mark.parametrize("instead, code", [("os._exit(7)", 7), ("None", -signal.SIGABRT)])
def test_an_abort_in_another_thread_is_met_first_and_goes_on_otherwise(instead, code):
    """In the main thread Python waits, as it does in a collective that hangs."""
    program = (
        "import os, threading\nfrom zoo.training.watch import AbortHandler\n"
        f"with AbortHandler(lambda: {instead}):\n"
        "    thread = threading.Thread(target=os.abort)\n    thread.start()\n    thread.join()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=120)
    assert ended.returncode == code, ended
