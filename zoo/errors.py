"""Errors that a user can mend: the commands print them without a traceback and exit with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something given to the library is wrong: says what, where, and what would be right."""


def near(name: str, known: Iterable[str], *, count: int = 3) -> str:
    """A sentence naming what `name` may have meant among `known`, or all of `known` where nothing is near."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=count, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + f"? (known: {', '.join(known)})"
    return f"known: {', '.join(known)}"
