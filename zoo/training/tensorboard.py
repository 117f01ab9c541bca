"""TensorBoard's event files, written in the thread that calls.

tensorboardX's own `SummaryWriter` writes from a thread behind a queue of ten: when the disk is full, the thread ends with a
traceback, the queue fills up, and the run waits for ever to put an eleventh event into it. Its record format and messages
are used here without the thread, so that a failure is raised where the event is written.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

FILE_VERSION = "brain.Event:2"
FLUSH_EVERY = 30.0  # seconds after which a curve being watched is brought up to date


class EventFile:
    """One new event file in `directory`, which hides what earlier files there hold from `first_step` on.

    Raises:
      OSError: from every method, when the file cannot be written.
    """

    def __init__(self, directory: Path, *, first_step: int):
        directory.mkdir(parents=True, exist_ok=True)
        # The process's number: a run that is resumed within the second must not replace its file of before.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self.path = directory / name
        self._writer = RecordWriter(str(self.path))
        self._write(Event(file_version=FILE_VERSION))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve."""
        for name, value in values.items():
            self._write(Event(step=step, summary=scalar(name, value)))
        if time.monotonic() - self._flushed > FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Makes everything written so far durable."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write(event.SerializeToString())
