"""Pages of which some parts are written by hand and some are made, each of these between two marks."""

from __future__ import annotations

from collections.abc import Mapping

from zoo.errors import UserError


def with_blocks(page: str, made: Mapping[str, str], *, by: str, where: str) -> str:
    """`page` with the text between the marks of each name replaced; `by` is the command that its first mark names.

    Raises:
      UserError: a mark is missing; says which.
    """
    for name, text in made.items():
        begin, end = f"<!-- {name}: made by {by} -->\n", f"<!-- {name}: end -->"
        before, opened, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not opened or not closed:
            raise UserError(f"{where} has no lines {begin.strip()!r} and {end!r} around what is made there")
        page = f"{before}{begin}{text}{end}{after}"
    return page
