"""Errors that a user can mend: the commands print them without a traceback, and exit with code 2, or 4 where it is the disk."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from os import PathLike


class UserError(ValueError):
    """Something given to the library is wrong: says what, where, and what would be right."""


class RunStopped(RuntimeError):
    """A run ended before its end, by no fault of the program; `exit_code` says why, and the message what to do."""

    exit_code: int


class WriteFailed(RuntimeError):
    """Something could not be written (a full disk, a folder that may not be written to): says what and why."""


@contextlib.contextmanager
def writing(path: str | PathLike[str]) -> Iterator[None]:
    """An `OSError` within the `with` block becomes a `WriteFailed` that names `path` and the cause.

    What a write or an fsync raises does not name its file.
    """
    try:
        yield
    except OSError as error:
        raise WriteFailed(f"{path} could not be written: {error.strerror or error}") from error


def near(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """A sentence naming what `name` may have meant among `known`, or all of `known` where nothing is near."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=count, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + f"? (known: {', '.join(known)})"
    return f"known: {', '.join(known)}"


def shown(name: object) -> str:
    """A name that somebody else has chosen, for a message: quoted, escaped, and no longer than a line."""
    text = repr(name) if isinstance(name, str) and name.isprintable() else ascii(name)
    return text if len(text) <= 100 else f"{text[:60]}…{text[-30:]}"
