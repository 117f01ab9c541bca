"""The settings of a checkpoint's config.json as data: which is which entry of our config, with the values that both know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zoo.errors import UserError, near


@dataclass(frozen=True)
class Setting:
    """One key of config.json.

    Attributes:
      theirs: the key.
      ours: the dotted path of our entry; None for a key that has none and must have one of the `values`' names, of which the
        first is written.
      default: what the source library takes where the key is missing; REQUIRED for none.
      values: their value → ours, where the two are spelled differently; ours may be a mapping, which is merged into the entry.
      least: the smallest number that the source library can run with.
    """

    theirs: str
    ours: str | None
    default: Any
    values: Mapping[Any, Any] | None = field(default=None, hash=False)
    least: int | None = None


REQUIRED = object()
# Sizes beyond this are a damaged or hostile file's, and shapes of them would overflow.
LARGEST = 10**8


def must_be(key: str, *values: Any) -> Setting:
    """A setting that changes the computation and of which we have these values alone, the first being the default."""
    return Setting(key, None, values[0], {value: value for value in values})


def read(settings: Sequence[Setting], theirs: Mapping[str, Any], template: Mapping[str, Any], where: str) -> dict:
    """Our config: `template` with every setting entered.

    Raises:
      UserError: a key that is missing, of the wrong type, or of a value that we do not have.
    """
    tree = _copy(template)
    for setting in settings:
        value = theirs.get(setting.theirs, setting.default)
        if value is REQUIRED:
            raise UserError(f"{where}: the key {setting.theirs!r} is missing")
        _check_type(value, setting, where)
        if setting.values is not None:
            value = _known(value, setting, where)
        if setting.ours is not None:
            enter(tree, setting.ours, value)
    return tree


def written(settings: Sequence[Setting], tree: Mapping[str, Any]) -> dict[str, Any] | None:
    """The keys of config.json that `read` makes the entries of `tree` from; None where a value is none of theirs."""
    theirs = {}
    for setting in settings:
        if setting.ours is None:
            # Not the default, which need not be one of those that we have.
            theirs[setting.theirs] = next(iter(setting.values))
            continue
        value = entry(tree, setting.ours)
        if value is None and setting.values is None and setting.default is not None:
            # This model has no such entry: whoever reads what is written finds another in its place.
            continue
        if setting.values is not None:
            found = [name for name, ours in setting.values.items() if _holds(value, ours)]
            if not found:
                return None
            value = found[0]
        if setting.least is not None and value < setting.least:
            return None
        theirs[setting.theirs] = value
    return theirs


def enter(tree: dict[str, Any], path: str, value: Any) -> None:
    """Sets the entry at a dotted path; a mapping is merged into what is there."""
    *groups, last = path.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
    if isinstance(value, Mapping):
        tree.setdefault(last, {}).update(value)
    else:
        tree[last] = value


def entry(tree: Mapping[str, Any], path: str) -> Any:
    """The entry at a dotted path, None where there is none."""
    for name in path.split("."):
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree


def _holds(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        return isinstance(value, Mapping) and all(_holds(value.get(k), v) for k, v in wanted.items())
    return value == wanted and isinstance(value, bool) == isinstance(wanted, bool)


def _known(value: Any, setting: Setting, where: str) -> Any:
    for name, ours in setting.values.items():
        if value == name and isinstance(value, bool) == isinstance(name, bool):
            return ours
    named = {repr(name) for name in setting.values}
    raise UserError(
        f"{where}: {setting.theirs}={value!r} is not among what this zoo computes; {near(repr(value), named)}. Nothing is "
        "approximated"
    )


def _check_type(value: Any, setting: Setting, where: str) -> None:
    if setting.values is not None or setting.default is None:
        return
    wanted = type(setting.default) if setting.default is not REQUIRED else int
    fits = isinstance(value, int | float) if wanted is float else isinstance(value, wanted)
    if not fits or (isinstance(value, bool) and wanted is not bool):
        raise UserError(f"{where}: {setting.theirs} must be of type {wanted.__name__}, but is {value!r}")
    if setting.least is not None and value < setting.least:
        raise UserError(f"{where}: {setting.theirs} must be at least {setting.least}, but is {value!r}")
    if wanted is int and not -LARGEST <= value <= LARGEST:
        raise UserError(f"{where}: {setting.theirs}={value} is larger than any model's; it must be at most {LARGEST}")


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _copy(v) for k, v in value.items()}
    return tuple(map(_copy, value)) if isinstance(value, tuple | list) else value
