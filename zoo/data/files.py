"""Lines of a text file, plain or packed, read in bounded memory; whatever is wrong with one is named by its number.

Lines end at a line feed and nowhere else: real corpora hold U+2028, U+0085 and form feeds inside their lines, and a
reader that breaks there shifts every later row. A carriage return before the line feed is taken off, and so is a byte
order mark at the start of the file.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import lzma
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from zoo.errors import UserError, near

CHUNK = 1 << 18
# xz files name the memory that unpacking needs; the strongest preset asks for 65 MiB.
XZ_MEMORY = 1 << 28
MAX_LINE_LENGTH = 1 << 20
MAX_BYTES = 1 << 36


class Line(NamedTuple):
    """A line without its end, or what is wrong with it."""

    number: int
    text: str | None
    problem: str | None = None


def read_lines(path: str, *, max_line_length: int = MAX_LINE_LENGTH, max_bytes: int = MAX_BYTES) -> Iterator[Line]:
    """The lines of a UTF-8 file, also of a `.gz` or `.xz` one.

    A line that is not UTF-8 or has more than `max_line_length` characters comes back with a `problem`, so that the
    caller can stop or skip it; no more of it than that is ever held.

    Raises:
      UserError: the file is missing, empty, a folder, damaged, or unpacks to more than `max_bytes`.
    """
    number, held, too_long, last = 0, b"", False, b""
    for chunk in _chunks(path, max_bytes):
        *complete, rest = (held + chunk).split(b"\n")
        for raw in complete:
            number += 1
            yield _line(number, raw, max_line_length, too_long)
            too_long = False
        # A character is at most 4 bytes: beyond that the line is too long whatever it holds, and is let go.
        too_long |= len(rest) > 4 * max_line_length
        held = b"" if too_long else rest
        last = rest
    if last or too_long:
        yield _line(number + 1, held, max_line_length, too_long)
    elif number == 0:
        raise UserError(f"{path}: the file is empty")


def _line(number: int, raw: bytes, max_line_length: int, too_long: bool) -> Line:
    if not too_long:
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            problem = f"byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is not UTF-8"
            return Line(number, None, f"{problem}; save the file as UTF-8")
        if len(text) <= max_line_length:
            return Line(number, text.removeprefix("\ufeff" if number == 1 else "").removesuffix("\r"))
    return Line(
        number, None, f"the line has more than {max_line_length:,} characters; raise max_line_length to read it"
    )


def _chunks(path: str, max_bytes: int) -> Iterator[bytes]:
    total = 0
    with _opened(path) as file:
        unpacked = _unpacked(path, file)
        while True:
            try:
                chunk = next(unpacked, b"")
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                raise UserError(f"{path}: the packed file is damaged or cut short: {error}") from error
            if not chunk:
                return
            total += len(chunk)
            if total > max_bytes:
                raise UserError(f"{path}: unpacks to more than {max_bytes:,} bytes; raise max_bytes to read it")
            yield chunk


def _unpacked(path: str, file: BinaryIO) -> Iterator[bytes]:
    if path.endswith(".gz"):
        with gzip.GzipFile(fileobj=file) as packed:
            while chunk := packed.read(CHUNK):
                yield chunk
    elif path.endswith(".xz"):
        yield from _unpacked_xz(file)
    else:
        while chunk := file.read(CHUNK):
            yield chunk


def _unpacked_xz(file: BinaryIO) -> Iterator[bytes]:
    """Like `lzma.open`, which cannot be given a limit of memory."""
    data = file.read(CHUNK)
    while data:
        stream = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=XZ_MEMORY)
        while not stream.eof:
            if stream.needs_input and not data:
                raise EOFError("it ends inside a stream")
            chunk = stream.decompress(data, max_length=CHUNK)
            data = file.read(CHUNK) if stream.needs_input else b""
            if chunk:
                yield chunk
        data = (stream.unused_data + data).lstrip(b"\0") or file.read(CHUNK)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; only opening it is turned into a UserError
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_neighbours(path)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    with file:
        yield file


def _neighbours(path: str) -> str:
    folder = Path(path).parent
    if not folder.is_dir():
        return f"; there is no folder {folder}"
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())[:50]
    return f"; {near(Path(path).name, names)}" if names else f"; {folder} is empty"


def content_hash(path: str) -> str:
    """SHA-256 of the file as it lies on disk.

    Raises:
      UserError: it is missing or cannot be read.
    """
    digest = hashlib.sha256()
    with _opened(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
