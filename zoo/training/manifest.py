"""The commit marker of a checkpoint: what belongs to it, to the byte.

`checkpoint.json` holds `body` and the SHA-256 of its canonical JSON; the body holds the format version, the step, size and
SHA-256 of every other file, shape and dtype of every array, and what the caller keeps beside them. It is written last, so a
directory without it was never finished or has lost a file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from zoo.atomic import write_atomically
from zoo.errors import UserError

FORMAT_VERSION = 1
FILE_NAME = "checkpoint.json"
MAX_BYTES = 64 * 2**20


class Damaged(Exception):
    """A checkpoint is not what its manifest says; the message names the file."""


def write_manifest(directory: Path, *, step: int, arrays: dict[str, Any], extra: dict[str, Any]) -> None:
    """Reads back every file under `directory`, and writes the manifest."""
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        files[path.relative_to(directory).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    body = {"format_version": FORMAT_VERSION, "step": step, "files": files, "arrays": arrays, "extra": extra}
    record = {"sha256": hashlib.sha256(_canonical(body)).hexdigest(), "body": body}
    write_atomically(directory / FILE_NAME, json.dumps(record, sort_keys=True, allow_nan=False).encode())


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest's body; the other files are not looked at.

    Raises:
      Damaged: the manifest is missing or altered.
      UserError: it was written by a newer version of this library.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        raise Damaged(f"{FILE_NAME} (the commit marker) is missing")
    if path.stat().st_size > MAX_BYTES:
        raise Damaged(f"{FILE_NAME} is larger than {MAX_BYTES} bytes")
    try:
        record = json.loads(path.read_bytes())
        body, digest = record["body"], record["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{FILE_NAME} is not readable ({error})") from error
    if digest != hashlib.sha256(_canonical(body)).hexdigest():
        raise Damaged(f"{FILE_NAME} was altered: its content does not have its SHA-256")
    if body["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{directory} has format version {body['format_version']}; this version reads up to {FORMAT_VERSION}:"
            " use a newer version of the library"
        )
    return body


def verify(directory: Path) -> dict[str, Any]:
    """The manifest's body, after every file has been compared with it.

    Raises:
      Damaged: a file is missing, has another size or another content, or the manifest itself is damaged.
      UserError: the checkpoint was written by a newer version of this library.
    """
    body = read_manifest(directory)
    for name, expected in body["files"].items():
        path = directory / name
        if not path.is_file():
            raise Damaged(f"file {name} is missing")
        if path.stat().st_size != expected["size"]:
            raise Damaged(f"file {name} is {path.stat().st_size} bytes long instead of {expected['size']}")
        if _sha256(path) != expected["sha256"]:
            raise Damaged(f"file {name} was altered: its content does not have its SHA-256")
    return body


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
