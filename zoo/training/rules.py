"""Ordered rules over parameter names: the first pattern found in a name decides, and a name that no rule covers is an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax

from zoo.errors import UserError

Value = TypeVar("Value")
Path = tuple[str, ...]
HasLayerAxis = Callable[[Path], bool]


def path_parts(key_path: Sequence[Any]) -> Path:
    """The plain words of a JAX key path: dictionary keys, field names and sequence indices."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in key_path)


def named_leaves(tree: Any) -> list[tuple[Path, Any]]:
    """The leaves of `tree`, each with the words of its path, in the order of `jax.tree.leaves`."""
    return [(path_parts(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def first_match(rules: Iterable[tuple[str, Value]], names: Sequence[str], kind: str) -> list[Value]:
    """For each name the value of the first rule whose pattern is found in it (`re.search`).

    Raises:
      UserError: a pattern that does not compile, or names that no rule covers (all of them are listed).
    """
    compiled = []
    for pattern, value in rules:
        try:
            compiled.append((re.compile(pattern), value))
        except re.error as error:
            raise UserError(f"{kind} rule {pattern!r} is not a regular expression: {error}") from error
    found, uncovered = [], []
    for name in names:
        for pattern, value in compiled:
            if pattern.search(name):
                found.append(value)
                break
        else:
            uncovered.append(name)
    if uncovered:
        raise UserError(
            f"no {kind} rule covers {', '.join(uncovered)}; add a rule (pattern, value) that does,"
            f" the patterns are {', '.join(repr(p.pattern) for p, _ in compiled) or 'none'}"
        )
    return found
