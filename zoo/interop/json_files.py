"""JSON of a checkpoint: data from strangers, read with a limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoo.errors import UserError, shown

# Of any JSON but a tokenizer: an index of a thousand layers has 1 MB. Python's values may take 25 times as much.
LARGEST = 8 << 20


def read_json(path: Path, kind: type) -> Any:
    """What a JSON file holds, which must be of `kind`, dict or list.

    Raises:
      UserError: no such file, too large, no JSON, a key twice, or of another kind.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if (size := path.stat().st_size) > LARGEST:
        raise UserError(f"{path} has {size:,} bytes; at most {LARGEST:,} are read")
    try:
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} could not be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} must hold a JSON {'object' if kind is dict else 'array'}")
    return value


def parse_json(data: bytes) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
      ValueError: it is none, an object has a key twice, or it is nested too deep; the message says so.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} in line {error.lineno}") from error
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {shown(twice)} stands there twice")
    return found
