"""Signs of life between the processes of a run, so that none waits for ever for one that is gone.

JAX's own health check ends a process by a C++ abort that does not say which other process is missing, and a collective
whose peer has died may hang for ever. So each process puts its status into the key-value store of `jax.distributed`
(served by process 0) once per beat; process 0 compares them and puts what follows beside them: who is lost, who has failed,
and the step at which all of them stop. Two threads, since a call to a process 0 that is stalled hangs: one exchanges, the
other looks at the clock and ends this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

LOST_EXIT_CODE = 69
"""Exit code of a process that ends because another one is lost (EX_UNAVAILABLE of sysexits.h)."""

_STATUS, _SAID = "zoo/status/", "zoo/said/"
_LONGEST_BEAT = 1.0  # seconds


class Watch:
    """The status of this process, and what process 0 says about all of them.

    Args:
      client: the client of `jax.distributed`.
      index, count: of this process.
      lost_after: seconds without a sign of life after which a process counts as lost.
    """

    def __init__(self, client: Any, index: int, count: int, lost_after: float):
        self._client, self._index, self._count, self._lost_after = client, index, count, lost_after
        self.beat = min(_LONGEST_BEAT, lost_after / 40)
        # This process's word, replaced as a whole at every beat. `asked` is the signal that asks to stop, `agreed` the step
        # this process knows it stops at, `failed` the exit code and the message of an error, `left` that it is about to end.
        self._status: dict[str, Any] = {
            "host": platform.node(),
            "asked": None,
            "agreed": None,
            "failed": None,
            "left": False,
        }
        # Process 0's word: its `host`, `stop` = [step, why], `lost` = [name, …], `failed` = [index, name, code, message].
        self._said: dict[str, Any] = {"host": None, "stop": None, "lost": [], "failed": None}
        self._asking: str | None = None  # process 0: who asks to stop, and by what
        now = time.monotonic()
        self._heard: dict[int, tuple[str, float]] = dict.fromkeys(
            range(count), ("", now)
        )  # process 0: last word and when
        self._reached = now  # when the last exchange that succeeded had begun
        self._beats = 0
        self._wake, self._closed, self._leaving = threading.Event(), threading.Event(), threading.Event()
        self._one_ends = threading.Lock()
        self._threads = [
            threading.Thread(target=work, name=work.__name__, daemon=True) for work in (self._exchanges, self._judges)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends the threads: from here on nobody is watched."""
        self._closed.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(self._lost_after)

    def name(self, index: int) -> str:
        """`process 1 of 4 (host a)`, for this process and process 0; process 0 knows the hosts of the others too."""
        host = self._status["host"] if index == self._index else (self._word(index) or {}).get("host")
        host = host or (self._said["host"] if index == 0 else None)
        return f"process {index} of {self._count} (host {host or 'unknown'})"

    def stop_at(self, asked: str | None, step: int, ahead: int) -> tuple[int, str] | None:
        """(step, why) at which all processes stop; None while nobody has asked for it. To be called at every step.

        Process 0 picks the step and holds its own next step back until all know: the others depend on its part of each
        step, so none of them is more than `ahead` steps further. There is no other cost: nothing waits on the network before
        somebody asks.
        """
        if asked is not None and self._status["asked"] is None:
            self._status["asked"] = asked
            self._wake.set()
        if self._index == 0 and self._said["stop"] is None:
            if self._asking is None:
                return None
            self._said["stop"] = [step + ahead, self._asking]
            self._wait_for(lambda: all((self._word(i) or {}).get("agreed") for i in range(1, self._count)), None)
        stop = self._said["stop"]
        return None if stop is None else (stop[0], stop[1])

    def leave(self, code: int, text: str, *, perhaps_lost: bool) -> None:
        """Ends this process with `code`, once the others know; prints `text` unless process 0 has printed the same.

        `perhaps_lost`: the error may be the echo of a process that died, which the watch will find out by itself; then that is
        what is said.
        """
        if perhaps_lost:
            time.sleep(self._lost_after + 3 * self.beat)
        self._leaving.set()
        self._status["failed"] = [code, text]
        self._wake.set()
        if self._index == 0:
            say(text)
            self._wait_for(self._others_left, self._lost_after)
        else:
            self._wait_for(lambda: self._said["failed"] is not None, self._lost_after)
            if self._said["failed"] is None or self._said["failed"][0] != 0 or self._said["failed"][3] != text:
                say(text)
            self._say_goodbye()
        end(code)

    def coordinator_aborts(self) -> None:
        """Called when this process is being aborted: ends it with a readable message if process 0 is what is missing.

        JAX's client aborts as soon as its connection to process 0 breaks, and holds a lock that an exchange needs. So an
        exchange that still succeeds says that the abort has another cause; then this returns.
        """
        begun = time.monotonic()
        self._wake.set()
        if not self._wait_for(lambda: self._reached > begun, 3 * self.beat):
            self._end_as_lost([self.name(0)])

    def _word(self, index: int) -> dict[str, Any] | None:
        word = self._heard[index][0]
        return json.loads(word) if word else None

    def _wait_for(self, condition: Callable[[], bool], seconds: float | None) -> bool:
        end = None if seconds is None else time.monotonic() + seconds
        while not condition():
            if end is not None and time.monotonic() > end:
                return False
            self._wake.set()
            time.sleep(self.beat / 20)
        return True

    def _others_left(self) -> bool:
        present = [i for i in range(1, self._count) if self.name(i) not in self._said["lost"]]
        return all((self._word(i) or {}).get("left") for i in present)

    def _say_goodbye(self) -> None:
        self._status["left"] = True
        begun = time.monotonic()
        self._wait_for(lambda: self._reached > begun, 3 * self.beat)

    def _exchanges(self) -> None:
        while not self._closed.is_set():
            begun = time.monotonic()
            try:
                self._exchange()
                self._reached = begun
            except Exception:
                pass
            self._wake.wait(self.beat)
            self._wake.clear()

    def _exchange(self) -> None:
        self._beats += 1
        mine = json.dumps({**self._status, "beat": self._beats})
        self._client.key_value_set(f"{_STATUS}{self._index}", mine, allow_overwrite=True)
        if self._index == 0:
            self._listen()
            self._client.key_value_set(f"{_SAID}all", json.dumps(self._said), allow_overwrite=True)
            return
        for _, said in self._client.key_value_dir_get(_SAID):
            self._said = json.loads(said)
        if self._said["stop"] is not None and self._status["agreed"] is None:
            self._status["agreed"] = self._said["stop"][0]
            self._wake.set()

    def _listen(self) -> None:
        """Process 0 reads what all say, and decides who is lost and who has failed."""
        self._said["host"] = self._status["host"]
        now = time.monotonic()
        for key, word in self._client.key_value_dir_get(_STATUS):
            index = int(key.rpartition("/")[2])
            if word != self._heard[index][0]:
                self._heard[index] = (word, now)
        words = {i: self._word(i) or {} for i in range(self._count)}
        silent = {i: now - when for i, (_, when) in self._heard.items() if i != 0 and not words[i].get("left")}
        if any(seconds > self._lost_after for seconds in silent.values()):
            # Whoever went with the first, a beat later, is named beside it.
            self._said["lost"] = [self.name(i) for i, seconds in silent.items() if seconds > self._lost_after / 2]
        failed = [[i, self.name(i), *word["failed"]] for i, word in words.items() if word.get("failed")]
        if failed and self._said["failed"] is None:
            self._said["failed"] = failed[0]
        asking = [f"{word['asked']} at {self.name(i)}" for i, word in words.items() if word.get("asked")]
        self._asking = asking[0] if asking else None

    def _judges(self) -> None:
        failed_since = None
        while not self._closed.wait(self.beat / 2):
            now = time.monotonic()
            if self._leaving.is_set():
                continue
            if self._index != 0 and now - self._reached > self._lost_after:
                self._end_as_lost([self.name(0)])
            if self._said["lost"]:
                self._end_as_lost(self._said["lost"])
            if self._said["failed"] is not None:
                # An error that all meet comes to all: give this process the time to meet it.
                failed_since = failed_since or now
                if now - failed_since > 3 * self.beat:
                    _, name, code, text = self._said["failed"]
                    cause = text.splitlines()[-1:] if text.startswith("Traceback") else [text]
                    self._end_because(code, ": ".join([f"stopped: {name} has stopped", *filter(None, cause)]))

    def _end_as_lost(self, names: list[str]) -> None:
        self._end_because(
            LOST_EXIT_CODE,
            f"stopped: {', '.join(names)}: killed, stalled or cut off (no sign of life for {self._lost_after:g} s, or the "
            "connection to it broke). What was saved is whole; the same command on all hosts resumes",
        )

    def _end_because(self, code: int, text: str) -> None:
        with self._one_ends:  # never released: the process ends here
            say(text)
            if self._index == 0:
                self._wait_for(self._others_left, self._lost_after / 2)
            elif self._said["lost"] or self._said["failed"]:  # process 0 is there to hear it
                self._say_goodbye()
            end(code)


class AbortHandler:
    """Calls `instead` when this process is about to abort, within the `with` block; the abort goes on when that returns.

    `signal.signal` would run its handler in the main thread only, which an abort does not wait for.
    """

    def __init__(self, instead: Callable[[], None]):
        self.instead = instead
        self._libc = ctypes.CDLL(None)
        self._libc.signal.argtypes, self._libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._handle)  # kept: C holds no reference to it
        self._previous: int | None = None

    def __enter__(self) -> AbortHandler:
        self._previous = self._libc.signal(signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p))
        return self

    def __exit__(self, *_: object) -> None:
        self._libc.signal(signal.SIGABRT, self._previous)

    def _handle(self, number: int) -> None:
        self.instead()
        self._libc.signal(signal.SIGABRT, self._previous)


def say(text: str) -> None:
    """Prints to stderr."""
    if text:
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar may have hidden it
        with contextlib.suppress(OSError):  # stderr may be a file on a full disk
            print(f"{show_cursor}{text}", file=sys.stderr, flush=True)


def end(code: int, text: str = "") -> None:
    """Ends the process at once. An ordinary exit would wait for collectives and for `jax.distributed` to say goodbye."""
    say(text)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)
