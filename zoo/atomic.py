"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from zoo.errors import UserError, writing


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` beside `path`, makes it durable, and renames it into place.

    Raises:
      WriteFailed: it could not be; what was at `path` before is still there, or `data` is.
    """
    part = path.with_name(f".{path.name}.part")
    with writing(path):
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Makes the names in `directory` durable (a rename survives a power cut only after this)."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_free(path: Path) -> None:
    """Refuses a directory that is to be made new and is there already; an empty one is taken.

    Raises:
      UserError: `path` is a file, or holds something.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there already; name a new directory")
