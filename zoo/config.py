"""Configs: a Python file with `get_config(arg)` → plain values, overridden from the command line, saved as JSON.

A config file named on the command line is the user's own program and is run. A saved config is data: it holds numbers,
strings, booleans, None, sequences and groups, and reading it never leads to code.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import os
import re
import sys
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, RequiredValueError

from zoo.atomic import write_atomically
from zoo.errors import UserError, near, writing
from zoo.overrides import apply, check_composed, fields_class, registry_at, unknown_field
from zoo.parts import Schema, field_defaults, field_types, schema
from zoo.registry import to_config

FORMAT_VERSION = 1
LARGEST_SAVED_CONFIG = 16 * 2**20  # bytes; a config is a few kilobytes, and its size is checked before it is read


def load_config(spec: str, overrides: Sequence[tuple[str, str]] = (), schema: Schema = schema) -> ConfigDict:
    """The config that `path.py` or `path.py:argument` makes, with (dotted path, text) overrides set, locked.

    Every part and every group of known fields in it is completed with the defaults of its fields, so that a saved config means the same
    after a default has changed.

    Raises:
      UserError: no such file, no `get_config`, an error inside it, a value that is not plain, or a wrong override.
    """
    path, argument = split_spec(spec)
    made = _run_get_config(path, argument)
    if not isinstance(made, ConfigDict):
        raise UserError(f"{path}: get_config must return an ml_collections.ConfigDict, not {type(made).__name__}")
    tree = _tree(made, "config")
    apply(tree, overrides, schema)
    return completed(tree, schema)


def completed(config: ConfigDict | Mapping[str, Any], schema: Schema = schema) -> ConfigDict:
    """The config with the default of every field that its parts and groups leave out, locked.

    So a config that was saved before a field was there reads as the same run: a new field's default is what was done before.

    Raises:
      UserError: a part or field that there is not, or a value that is not plain.
    """
    tree = _complete(_tree(config, "config"), "config", schema)
    plain(tree)  # every value is checked here, before anything is made from the config
    return ConfigDict(tree).lock()


def split_spec(spec: str) -> tuple[Path, str]:
    """`configs/nezha.py:ner,size=tiny` → (configs/nezha.py, "ner,size=tiny").

    Raises:
      UserError: the path does not end in .py, or no such file; names files nearby.
    """
    match = re.fullmatch(r"(.*?\.py)(?::(.*))?", spec)
    if not match:
        raise UserError(
            f"--config takes a Python file, path.py or path.py:argument, not {spec!r}{_files_near(Path(spec))}"
        )
    path = Path(match[1])
    if not path.is_file():
        raise UserError(f"no config file {path}{_files_near(path)}")
    return path, match[2] or ""


def _files_near(path: Path) -> str:
    folders = [folder for folder in (path.parent, Path("configs")) if folder.is_dir()]
    files = {str(file) for folder in folders for file in folder.glob("*.py") if file.name != "__init__.py"}
    return f"; {near(str(path), files)}" if files else ""


def _run_get_config(path: Path, argument: str) -> Any:
    name = f"config_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # only while it runs: a dataclass in the file looks its module up by name
    try:
        spec.loader.exec_module(module)
        return _call_get_config(module, path, argument)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{_line_of(error, path)}: {type(error).__name__}: {error}") from error
    finally:
        del sys.modules[name]


def _call_get_config(module: types.ModuleType, path: Path, argument: str) -> Any:
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"{path} has no function get_config(arg)")
    parameters = inspect.signature(get_config).parameters.values()
    if argument and not parameters:
        raise UserError(f"{path}: get_config takes no argument, yet {argument!r} is given after the colon")
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return get_config(argument) if argument or required else get_config()


def _line_of(error: Exception, path: Path) -> str:
    """`file:line` of the innermost line of the config file that led to `error`."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) in (path, path.absolute())]
    return f"{path}:{frames[-1].lineno}" if frames else str(path)


def parse_argument(
    argument: str | None, *, tasks: Sequence[str] = (), options: Mapping[str, Sequence[str]] | None = None
) -> tuple[str, dict[str, str]]:
    """`task,key=value,…`, the argument of a config file → (task, {key: value}).

    With `tasks`, the task must be one of them and the first is the default. With `options`, each a sequence of its
    choices, every key must be one of them and an option that is not given takes its first choice.

    >>> parse_argument("ner,size=tiny", tasks=("pretrain", "ner"), options={"size": ("base", "tiny")})
    ('ner', {'size': 'tiny'})

    Raises:
      UserError: an unknown task, key or choice, a key given twice, or something that is not key=value.
    """
    pieces = [piece.strip() for piece in argument.split(",")] if argument else []
    task = pieces.pop(0) if pieces and "=" not in pieces[0] else (tasks[0] if tasks else "")
    if tasks and task not in tasks:
        raise UserError(f"unknown task {task!r} after the colon; {near(task, tasks)}")
    chosen: dict[str, str] = {}
    for piece in pieces:
        key, equals, value = piece.partition("=")
        if not equals or not key:
            raise UserError(f"{piece!r} after the colon is not key=value; write path.py:task,key=value")
        if key in chosen:
            raise UserError(f"{key!r} is given twice after the colon")
        if options is not None and key not in options:
            raise UserError(
                f"unknown key {key!r} after the colon; {near(key, options) if options else 'none is taken'}"
            )
        if options is not None and value not in options[key]:
            raise UserError(f"{key}={value!r} after the colon: {near(value, options[key])}")
        chosen[key] = value
    return task, {**{key: choices[0] for key, choices in (options or {}).items()}, **chosen}


def _tree(value: Any, where: str) -> Any:
    """A config as nested dicts and tuples that may be changed; references between its values stay alive."""
    if isinstance(value, ConfigDict):
        return {k: _tree(v, f"{where}.{k}") for k, v in value.items(preserve_field_references=True)}
    if isinstance(value, Mapping):
        return {k: _tree(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_tree(v, f"{where}.{i}") for i, v in enumerate(value))
    return value


def _complete(value: Any, where: str, schema: Schema) -> Any:
    """The tree `value` with the default of every field that a part or a group of known fields in it leaves out."""
    if isinstance(value, tuple):
        if registry_at(where, schema) is not None:
            check_composed(where, value)
        return tuple(_complete(v, f"{where}.{i}", schema) for i, v in enumerate(value))
    if not isinstance(value, dict):
        return value
    cls = fields_class(value, where, schema)
    registry = registry_at(where, schema)
    if cls is None and registry is not None and "name" in value:
        raise UserError(f"{where}: unknown {registry.kind} {value['name']!r}; {near(value['name'], registry.names())}")
    if cls is not None:
        for field in sorted(value.keys() - {"name"} - field_types(cls).keys()):
            raise UserError(unknown_field(value, cls, field, where))
        value = {**value, **{k: _as_config(v) for k, v in field_defaults(cls).items() if k not in value}}
    return {k: _complete(v, f"{where}.{k}", schema) for k, v in value.items()}


def _as_config(default: Any) -> Any:
    if isinstance(default, tuple):
        return tuple(_as_config(v) for v in default)
    return to_config(default) if hasattr(type(default), "__dataclass_fields__") else default


def plain(config: Any, where: str = "config") -> Any:
    """A config as nested dicts and tuples of plain values, references resolved.

    Raises:
      UserError: a value that is not a number, string, boolean, None, sequence or group, or one that must be given
        and is not.
    """
    if isinstance(config, FieldReference):
        try:
            config = config.get()
        except RequiredValueError as error:
            raise UserError(f"{where} must be given: --{where}=VALUE") from error
        except (TypeError, ValueError, ArithmeticError) as error:
            raise UserError(f"{where} cannot be computed from the other values: {error}") from error
    if isinstance(config, ConfigDict):
        config = dict(config.items(preserve_field_references=True))
    if isinstance(config, Mapping):
        return {_key(k, where): plain(v, f"{where}.{k}") for k, v in config.items()}
    if isinstance(config, tuple | list):
        return tuple(plain(v, f"{where}.{i}") for i, v in enumerate(config))
    if isinstance(config, float) and not math.isfinite(config):
        raise UserError(f"{where} is {config}, which a saved config cannot hold; leave it None")
    if config is None or type(config) in (bool, int, float, str):
        return config
    raise UserError(
        f"{where} is a {type(config).__name__}; a config holds numbers, strings, booleans, None, tuples and groups"
    )


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str) or "." in key:
        raise UserError(f"{where} has the key {key!r}; keys are strings without a dot")
    return key


def save_config(config: ConfigDict, path: str | os.PathLike[str]) -> None:
    """Writes the config as JSON, whole or not at all."""
    path = Path(path)
    text = json.dumps({"format_version": FORMAT_VERSION, "config": plain(config)}, indent=2, ensure_ascii=False)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, f"{text}\n".encode())


def load_saved(path: str | os.PathLike[str]) -> ConfigDict:
    """The locked config that `save_config` wrote; sequences are tuples again.

    Raises:
      UserError: no such file, no valid JSON, a newer format, or a key beside `format_version` and `config`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no saved config {path}")
    if path.stat().st_size > LARGEST_SAVED_CONFIG:
        raise UserError(f"{path} has {path.stat().st_size} bytes; a saved config has at most {LARGEST_SAVED_CONFIG}")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deep for a config") from error
    if not isinstance(saved, dict) or "format_version" not in saved:
        raise UserError(f"{path} is not a saved config: it has no format_version")
    version = saved["format_version"]
    if type(version) is not int or version < 1:
        raise UserError(
            f"{path}: format_version {version!r} is none that was ever written; this version reads 1 to {FORMAT_VERSION}"
        )
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} was written by a newer version: format_version {version}, this one reads up to {FORMAT_VERSION}"
        )
    if not isinstance(saved.get("config"), dict):
        raise UserError(f"{path} holds no config: 'config' must be an object")
    for key in saved.keys() - {"format_version", "config"}:
        raise UserError(f"{path} has the unknown key {key!r}; known: config, format_version")
    return ConfigDict(plain(saved["config"])).lock()


def difference(a: ConfigDict, b: ConfigDict, names: tuple[str, str] = ("here", "there")) -> list[str]:
    """One line for each value in which two configs differ, `optimizer.learning_rate: 0.001 here, 0.01 there`; sorted."""
    first, second = (dict(_leaves(plain(config), "")) for config in (a, b))
    lines = []
    for path in sorted(first.keys() | second.keys()):
        if path not in second:
            lines.append(f"{path}: {first[path]!r} {names[0]}, absent {names[1]}")
        elif path not in first:
            lines.append(f"{path}: absent {names[0]}, {second[path]!r} {names[1]}")
        elif not _same(first[path], second[path]):
            lines.append(f"{path}: {first[path]!r} {names[0]}, {second[path]!r} {names[1]}")
    return lines


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of what is not a non-empty group; a sequence of groups is walked as well."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, tuple) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from _leaves(item, f"{where}.{i}")
    else:
        yield where, value


def _same(a: Any, b: Any) -> bool:
    """Equal as config values: 1 and 1.0 are, since both mean the same to a float field; 1 and true are not."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)
