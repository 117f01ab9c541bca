"""Names to parts: a part is a frozen dataclass of plain scalars and other parts, chosen by name in a config."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from zoo.errors import UserError, near

Part = TypeVar("Part", bound=type)


class Registry:
    """The parts of one kind, each under one name.

    >>> registry = Registry("encoding")
    >>> @registry.register("rope")
    ... @dataclasses.dataclass(frozen=True)
    ... class Rope:
    ...     theta: float = 10000.0
    >>> registry.build({"name": "rope", "theta": 500})
    Rope(theta=500.0)
    """

    def __init__(self, kind: str, base: type | None = None):
        """`base` is the class of all parts of this kind: its instances pass through `build` though they have no name here.

        A field of another part whose type is `base` takes what `build` takes.
        """
        if base is not None:
            base.registry = self
        self.kind = kind
        self._base = base
        self._parts: dict[str, type] = {}

    def register(self, name: str) -> Callable[[Part], Part]:
        def add(cls: Part) -> Part:
            if name in self._parts:
                raise ValueError(f"{self.kind} {name!r} is registered twice: {self._parts[name]} and {cls}")
            if not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:
                raise TypeError(f"{self.kind} {name!r} must be a frozen dataclass")
            self._parts[name] = cls
            cls.name = name
            return cls

        return add

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._parts))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def get(self, name: str) -> type:
        """The part class called `name`.

        Raises:
          UserError: no such name; lists the near ones.
        """
        if name not in self._parts:
            raise UserError(f"unknown {self.kind} {name!r}; {near(name, self._parts)}")
        return self._parts[name]

    def build(self, config: Any) -> Any:
        """The part that `config` describes: a name, a mapping with `name` and the part's fields, or a part already.

        Raises:
          UserError: unknown name, unknown field, or a value of the wrong type; says which would be right.
        """
        if type(config) in self._parts.values() or (self._base and isinstance(config, self._base)):
            return config
        if isinstance(config, str):
            config = {"name": config}
        if not isinstance(config, Mapping) or "name" not in config:
            raise UserError(f"{self.kind}: expected a name or a mapping with 'name', not {config!r}")
        cls = self.get(config["name"])
        where = f"{self.kind} {config['name']!r}"
        return make(cls, {k: v for k, v in config.items() if k != "name"}, where)


def make(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """An instance of the dataclass `cls` from plain values, each checked against its field's type.

    Raises:
      UserError: names the field and what would be right.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in values:
        if key not in fields:
            raise UserError(f"{where} has no argument {key!r}; {near(key, fields) if fields else 'it takes none'}")
    hints = typing.get_type_hints(cls)
    missing = [
        n
        for n, f in fields.items()
        if n not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where} needs {', '.join(missing)}")
    checked = {k: coerce(v, hints[k], f"{where}, argument {k!r}") for k, v in values.items()}
    try:
        return cls(**checked)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`: integers become floats and lists tuples; nothing else is converted."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    registry = registry_of(hint)
    if registry is not None and value is not None:
        return registry.build(value)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return coerce(value, option, where)
            except UserError:
                continue
    elif origin is typing.Literal:
        if value in args:
            return value
    elif origin is tuple:
        if isinstance(value, tuple | list):
            if len(args) == 2 and args[1] is Ellipsis:
                return tuple(coerce(v, args[0], where) for v in value)
            if len(args) == len(value):
                return tuple(coerce(v, a, where) for v, a in zip(value, args, strict=True))
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif hint is Any or (isinstance(hint, type) and hint not in (int, float) and isinstance(value, hint)):
        return value
    elif hint is type(None) and value is None:
        return None
    expected = " or ".join(repr(a) for a in args) if origin is typing.Literal else _spell(hint)
    raise UserError(f"{where}: expected {expected}, got {value!r}")


def registry_of(hint: Any) -> Registry | None:
    """The registry of the parts that a field of the type `hint` takes (`Base` or `Base | None`), None where it takes none."""
    for option in typing.get_args(hint) or (hint,):
        registry = getattr(option, "registry", None)
        if isinstance(registry, Registry):
            return registry
    return None


def _spell(hint: Any) -> str:
    return getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint)


def to_config(part: Any) -> dict[str, Any]:
    """The mapping that `Registry.build` turns back into `part`."""
    values = {f.name: _plain(getattr(part, f.name)) for f in dataclasses.fields(part) if f.init}
    return {"name": part.name, **values}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_config(value)
    if isinstance(value, tuple):
        return tuple(_plain(v) for v in value)
    return value
