"""Where each kind of part is registered, and how a part presents itself to a reader: its summary and its fields."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

from zoo.registry import Registry

# Config key → (module, attribute) of the registry that its value is chosen from. Modules are imported only when asked
# for: `python -m zoo list --help` and a mistyped flag should not wait for JAX.
REGISTRIES: dict[str, tuple[str, str]] = {
    "encoding": ("zoo.encodings", "registry"),
    "scaling": ("zoo.encodings.rope_scaling", "registry"),
    "mixer": ("zoo.mixers", "registry"),
    "feed_forward": ("zoo.layers.feed_forward", "registry"),
    "norm": ("zoo.layers.norms", "registry"),
    "arrangement": ("zoo.layers.arrangements", "registry"),
    "convolution": ("zoo.layers.convolution", "registry"),
    "task": ("zoo.tasks", "registry"),
    "positions": ("zoo.data.positions", "registry"),
    "data": ("zoo.data", "registry"),
    "tokenizer": ("zoo.data.tokenizers", "registry"),
    "optimizer": ("zoo.training.optimizer", "registry"),
    "schedule": ("zoo.training.schedules", "registry"),
}

# The keys that may hold several parts at once, `fox+rope`; the others hold one.
COMPOSED = frozenset({"encoding"})

# The keys of a part that hold a part themselves: `config.encoding.scaling`, `config.task.positions`.
NESTED = frozenset({"scaling", "positions"})

# Config key → (module, attribute) of the frozen dataclass whose fields the group holds.
GROUPS: dict[str, tuple[str, str]] = {
    "model": ("zoo.models", "ModelConfig"),
    "train": ("zoo.training.settings", "RunSettings"),
    "mesh": ("zoo.training.settings", "MeshSettings"),
    "processes": ("zoo.training.settings", "ProcessSettings"),
}

Schema = Callable[[str], Registry | type | None]


def schema(key: str) -> Registry | type | None:
    """What stands under a config key: a part of a registry, a group of a dataclass's fields, or None, something else."""
    if key not in REGISTRIES and key not in GROUPS:
        return None
    module, attribute = (REGISTRIES | GROUPS)[key]
    return getattr(importlib.import_module(module), attribute)


def field_types(cls: type) -> dict[str, Any]:
    """Field name → type, of the fields of a part that a config may set, in order."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def field_defaults(cls: type) -> dict[str, Any]:
    """Field name → default, of the fields that have one."""
    defaults = {}
    for field in dataclasses.fields(cls):
        if field.init and field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.init and field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    return defaults


def describe_fields(cls: type) -> str:
    """`theta: float = 10000.0, fraction: float = 1.0`, or `no arguments`."""
    defaults = field_defaults(cls)
    spelled = [
        f"{name}: {spell_type(hint)}" + (f" = {defaults[name]!r}" if name in defaults else "")
        for name, hint in field_types(cls).items()
    ]
    return ", ".join(spelled) or "no arguments"


def spell_type(hint: Any) -> str:
    """A type as a reader writes it: `float`, `int | None`, `'cls' | 'mean'`, `tuple[float, ...]`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(repr(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(spell_type(argument) for argument in arguments)
    if origin is not None and arguments:
        return f"{origin.__name__}[{', '.join('...' if a is ... else spell_type(a) for a in arguments)}]"
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def summary(cls: type) -> str:
    """The first sentence or paragraph of a part's docstring, on one line."""
    paragraph = (inspect.getdoc(cls) or "").split("\n\n")[0]
    return " ".join(paragraph.split()).rstrip(":")
