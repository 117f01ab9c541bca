"""Overrides from the command line: `--config.a.b=value` sets a value, `--config.encoding=t5:num_buckets=32` replaces a part."""

from __future__ import annotations

import ast
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections.config_dict import FieldReference

from zoo.errors import UserError, near
from zoo.parts import COMPOSED, GROUPS, NESTED, REGISTRIES, Schema, describe_fields, field_defaults, field_types, schema
from zoo.registry import Registry, coerce, registry_of, to_config

Tree = dict[str, Any]


def apply(tree: Tree, overrides: Sequence[tuple[str, str]], schema: Schema = schema) -> None:
    """Sets each (dotted path, text) in `tree`, nested dicts of plain values, tuples and field references.

    Whole parts are replaced before their fields are set, so that the order on the command line does not matter.

    Raises:
      UserError: a path given twice, an unknown key, part or argument, or a value of the wrong type; says what is near
        and, for a part, which arguments it takes.
    """
    paths = [path for path, _ in overrides]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"--config.{path} is given twice")
    writer = _Writer(tree, schema)
    for path, text in sorted(overrides, key=lambda override: override[0].count(".")):
        writer.set_below(tree, path.split("."), text, "config")


@dataclass(frozen=True)
class _Writer:
    """Sets texts in the tree `root`; `where` is the dotted path of the node at hand, from "config" on."""

    root: Tree
    schema: Schema

    def set_below(self, node: Any, keys: list[str], text: str, where: str) -> Any:
        """`node` with `text` set at `keys`: dicts are changed in place, a tuple is made anew."""
        key, rest = keys[0], keys[1:]
        if isinstance(node, tuple):
            index = _index(node, key, where)
            item = self.replaced(node[index], rest, text, f"{where}.{key}", {})
            return (*node[:index], item, *node[index + 1 :])
        cls = fields_class(node, where, self.schema)
        hints = field_types(cls) if cls else {}
        if key not in node and key in hints:
            node[key] = field_defaults(cls).get(key)
        if key == "name" and "name" in node:
            raise UserError(f"{where}.name cannot be set alone; --{where}={text} replaces the whole part")
        if key not in node:
            raise UserError(self.unknown_key(key, node, where))
        node[key] = self.replaced(node[key], rest, text, f"{where}.{key}", hints)
        return node

    def replaced(self, present: Any, rest: list[str], text: str, where: str, hints: Mapping[str, Any]) -> Any:
        """What stands in the place of `present`, found at `where`, once `text` is set at `rest` below it."""
        registry = registry_at(where, self.schema)
        if rest and registry and isinstance(present, str) and present in registry.names():
            present = {"name": present}
        if rest and isinstance(present, dict | tuple):
            return self.set_below(present, rest, text, where)
        if rest:
            raise UserError(f"{where} is a value ({_plain(present)!r}) and has no key {rest[0]!r}")
        hint = hints.get(where.rsplit(".", 1)[-1])
        if registry and literal(text) is None and type(None) in typing.get_args(hint):
            return None
        if is_part(present) or (registry and not isinstance(present, dict)):
            parts = parse_parts(text, where, self.schema)
            bare = isinstance(present, str) and text in registry.names()
            return text if bare else parts
        if isinstance(present, dict):
            raise UserError(f"{where} is a group, not a value; set one of its keys: {', '.join(sorted(present))}")
        if isinstance(present, FieldReference):
            present.set(None if literal(text) is None else _parse_like(text, present.get_type(), None, f"--{where}"))
            return present
        if hint is not None:
            return parse_as(text, hint, f"--{where}")
        return _parse_like(text, type(present), present, f"--{where}")

    def unknown_key(self, key: str, node: Tree, where: str) -> str:
        cls = fields_class(node, where, self.schema)
        if cls:
            return unknown_field(node, cls, key, where)
        message = f"{where} has no key {key!r}; {near(key, node.keys() - {'name'})}"
        elsewhere = [path for path in _paths(self.root, "config") if path.rsplit(".", 1)[-1] == key]
        return message + (f"; there is {' and '.join(elsewhere[:3])}" if elsewhere else "")


def kind_of(where: str) -> str:
    """The config key that says what stands at `where`: `encoding` for config.encoding, config.encoding.0 and a block's own
    encoding inside config.model; "" for the plain fields of another part or group, such as config.mesh.data.
    """
    keys = [key for key in where.split(".") if not key.isdigit()]
    of_plain_fields = (REGISTRIES.keys() | GROUPS.keys()) - {"model"}
    return "" if len(keys) > 2 and keys[-2] in of_plain_fields and keys[-1] not in NESTED else keys[-1]


def registry_at(where: str, schema: Schema) -> Registry | None:
    """The registry of the part at `where`, or None where no part stands there."""
    found = schema(kind_of(where))
    return found if isinstance(found, Registry) else None


def fields_class(node: Mapping[str, Any], where: str, schema: Schema) -> type | None:
    """The dataclass whose fields `node` at `where` holds: that of its part or of its group, None where there is neither."""
    found = schema(kind_of(where))
    if isinstance(found, Registry):
        return found.get(node["name"]) if node.get("name") in found.names() else None
    return found


def is_part(value: Any) -> bool:
    """Whether a config value is a part, a mapping with a name, or a sequence of parts."""
    if isinstance(value, tuple):
        return bool(value) and all(isinstance(v, Mapping) and is_part(v) for v in value)
    return isinstance(value, Mapping) and "name" in value


def parse_parts(text: str, where: str, schema: Schema = schema) -> Any:
    """`name`, `name:field=value,field=value`, or several joined by `+`, as the mapping or the tuple of mappings it means.

    A `+` joins parts only before a letter, so 1e+4 is a number. Fields that are not given take their defaults.
    """
    pieces = _split(text, re.compile(r"\+(?=[A-Za-z_])"))
    parts = tuple(_parse_part(piece, where, registry_at(where, schema)) for piece in pieces)
    if len(parts) > 1:
        check_composed(where, parts)
    return parts[0] if len(parts) == 1 else parts


def check_composed(where: str, parts: tuple[Any, ...]) -> None:
    """Refuses several parts where one is taken.

    Raises:
      UserError: names the keys that take several.
    """
    if kind_of(where) not in COMPOSED:
        raise UserError(f"{where} takes one part, not {len(parts)}; only {', '.join(sorted(COMPOSED))} takes several")


def _parse_part(text: str, where: str, registry: Registry | None) -> Tree:
    name, _, arguments = text.partition(":")
    if registry is None:
        raise UserError(f"{where} cannot be replaced whole, only its keys one by one: no parts are registered for it")
    if name not in registry.names():
        raise UserError(f"{where}: unknown {registry.kind} {name!r}; {near(name, registry.names())}")
    cls = registry.get(name)
    types, values = field_types(cls), {}
    for argument in _split(arguments, re.compile(r",(?=\s*[A-Za-z_]\w*=)")) if arguments else ():
        field, equals, value = argument.partition("=")
        field = field.strip()
        if not equals:
            raise UserError(f"{where}: {argument!r} is not argument=value; {name} takes {describe_fields(cls)}")
        if field not in types:
            raise UserError(unknown_field({"name": name}, cls, field, where))
        if field in values:
            raise UserError(f"{where}: {name} is given {field!r} twice")
        values[field] = parse_as(value, types[field], f"{where}, argument {field!r}")
    return to_config(registry.build({"name": name, **values}))


def unknown_field(node: Mapping[str, Any], cls: type, field: str, where: str) -> str:
    """The sentence about a field that the part or group `node` does not have, with the fields it has."""
    fields = field_types(cls)
    close = near(field, fields).partition("?")[0] if fields else ""
    hint = f" {close}?" if close.startswith("did you mean") else ""
    who = f"{node['name']} " if "name" in node else ""
    return f"{where}: {who}has no argument {field!r};{hint} {who or 'it '}takes {describe_fields(cls)}"


def parse_as(text: str, hint: Any, where: str) -> Any:
    """`text` as the type `hint` of a part's field: a Python literal, true, false or none where the type allows it, else a string.

    A field that holds a part takes `name`, or `(name:field=value,field=value)`.

    Raises:
      UserError: the text is none of what the type allows.
    """
    registry = registry_of(hint)
    if registry is not None and literal(text) is not None:
        return registry.build(_parse_part(text.strip().removeprefix("(").removesuffix(")"), where, registry))
    readings = [_unquoted(text)] if hint is str else [literal(text), text, *_sequence(text)]
    refusals = []
    for reading in readings:
        try:
            return coerce(reading, hint, where)
        except UserError as error:
            refusals.append(error)
    raise refusals[0]


def _parse_like(text: str, kind: type, present: Any, where: str) -> Any:
    """`text` as the type of the present value; a present None says nothing about the type, so any literal does."""
    if kind is type(None):
        return literal(text)
    if kind is tuple:
        value = parse_as(text, tuple[Any, ...], where)
        kinds = {type(item) for item in present or ()}
        return parse_as(text, tuple[kinds.pop(), ...], where) if len(kinds) == 1 else value
    return parse_as(text, kind, where)


def literal(text: str) -> Any:
    """The number, string, tuple, boolean (true, false) or None (none) that `text` spells, else `text` itself."""
    words = {"true": True, "false": False, "none": None}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    if isinstance(value, list):
        value = tuple(value)
    return value if isinstance(value, int | float | str | tuple) else text


def _unquoted(text: str) -> str:
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _sequence(text: str) -> list[tuple[Any, ...]]:
    """The tuple that a bare list such as `a.tsv,b.tsv` means, where no bracket or quote says otherwise."""
    if not text.strip() or any(character in text for character in "()[]'\""):
        return []
    items = [item.strip() for item in text.split(",")]
    return [tuple(literal(item) for item in items), tuple(items)]


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """`text` cut at each match of `separator` that stands outside brackets and quotes."""
    pieces, start, depth, quote = [], 0, 0, ""
    for i, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([":
            depth += 1
        elif character in ")]":
            depth -= 1
        elif depth == 0 and separator.match(text, i):
            pieces.append(text[start:i])
            start = i + 1
    return [*pieces, text[start:]]


def _index(node: tuple[Any, ...], key: str, where: str) -> int:
    if key.isdigit() and int(key) < len(node):
        return int(key)
    items = [f"{where}.{i}" + (f" ({item['name']})" if is_part(item) else "") for i, item in enumerate(node)]
    raise UserError(f"{where} is a sequence of {len(node)} and has no {key!r}; write {' or '.join(items) or where}")


def _paths(node: Any, where: str) -> Iterator[str]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, tuple) else ()
    for key, value in items:
        yield f"{where}.{key}"
        yield from _paths(value, f"{where}.{key}")


def _plain(value: Any) -> Any:
    return value.get() if isinstance(value, FieldReference) else value
