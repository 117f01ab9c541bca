"""A polite end: SIGTERM or SIGINT sets a flag, the loop finishes its step, saves and exits with a code of its own."""

from __future__ import annotations

import contextlib
import signal
import sys
import types
from collections.abc import Iterator

STOPPED_EXIT_CODE = 75
"""Exit code of a run that was asked to stop and can be resumed by the same command (EX_TEMPFAIL of sysexits.h: try again later)."""


class StopRequested:
    """True once SIGTERM or SIGINT has arrived within the `with` block; a second SIGINT interrupts at once.

    >>> with StopRequested() as stop:
    ...     bool(stop)
    False
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopRequested:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


@contextlib.contextmanager
def sigterm_exits() -> Iterator[None]:
    """A SIGTERM within the `with` block, but outside `StopRequested`, exits at once with `STOPPED_EXIT_CODE`.

    For the time before and after training, in which nothing is there to be saved.
    """

    def leave(number: int, frame: types.FrameType | None) -> None:
        print("stopped: SIGTERM while not training; the same command goes on", file=sys.stderr)
        sys.exit(STOPPED_EXIT_CODE)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
