"""JSON of a checkpoint: data from strangers, read with a limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zoo.errors import UserError

# Of any JSON file but a tokenizer; an index of shards of a thousand layers is smaller.
LARGEST = 64 * 2**20


def read_json(path: Path, kind: type) -> Any:
    """What a JSON file holds, which must be of `kind`, dict or list.

    Raises:
      UserError: no such file, too large, no JSON, a key twice, or of another kind.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes; at most {LARGEST:,} are read")
    try:
        value = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=lambda pairs: _without_repeats(pairs, path)
        )
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deep") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} must hold a JSON {'object' if kind is dict else 'array'}")
    return value


def _without_repeats(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise UserError(f"{path}: the key {next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return found
