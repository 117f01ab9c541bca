"""An error of a checkpoint is raised once, by `Checkpoints`; what Orbax and TensorStore print about it besides is left out."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any


def say_errors_once() -> None:
    """For a program, at its start: changes logging and `sys.unraisablehook` for the whole process."""
    logging.getLogger("absl").addFilter(_without_traceback)
    logging.getLogger("asyncio").addFilter(_unless_never_retrieved)
    if getattr(sys.unraisablehook, "func", None) is not _unless_abandoned:
        sys.unraisablehook = functools.partial(_unless_abandoned, sys.unraisablehook)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Orbax's threads log each of their errors several times with a traceback."""
    return not record.exc_info


def _unless_never_retrieved(record: logging.LogRecord) -> bool:
    """Of several writes that fail together Orbax takes the error of one; asyncio reports the others when they are collected."""
    return "exception was never retrieved" not in record.getMessage().partition("\n")[0]


def _unless_abandoned(report: Callable[[Any], None], unraisable: Any) -> None:
    """At the first array that cannot be written Orbax closes its event loop; TensorStore's threads then fail to hand over
    what became of the others, each time with a traceback of that alone.
    """
    abandoned = isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"
    if not abandoned:
        report(unraisable)
