"""Archives as torch.save writes them, assembled by hand, opcode by opcode, and whatever else stands in files of that name."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

MARK, NONE, TRUE, FALSE, EMPTY_TUPLE, EMPTY_DICT, EMPTY_LIST = b"(", b"N", b"\x88", b"\x89", b")", b"}", b"]"
REDUCE, PERSISTENT, BUILD = b"R", b"Q", b"b"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return b"K" + bytes([value])
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def tuple_of(*values: bytes) -> bytes:
    return MARK + b"".join(values) + b"t"


def integers(values) -> bytes:
    return tuple_of(*map(integer, values))


def name(dotted: str) -> bytes:
    """The global module.name."""
    module, _, attribute = dotted.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(dotted: str, *arguments: bytes) -> bytes:
    return name(dotted) + tuple_of(*arguments) + REDUCE


def ordered_dict(entries: dict[str, bytes] | None = None) -> bytes:
    return call("collections.OrderedDict") + items(entries or {})


def dictionary(entries: dict[str, bytes]) -> bytes:
    return EMPTY_DICT + items(entries)


def items(entries: dict[str, bytes]) -> bytes:
    return MARK + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def storage(key: str, length: int, kind: str = "torch.FloatStorage") -> bytes:
    return tuple_of(text("storage"), name(kind), text(key), text("cpu"), integer(length)) + PERSISTENT


def tensor(on: bytes, shape, strides, offset: int = 0, *more: bytes) -> bytes:
    arguments = (on, integer(offset), integers(shape), integers(strides), FALSE, ordered_dict(), *more)
    return call(f"torch._utils._rebuild_tensor_v{3 if more else 2}", *arguments)


def parameter(value: bytes) -> bytes:
    return call("torch._utils._rebuild_parameter", value, TRUE, ordered_dict())


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def write(
    path: Path | BinaryIO, pickled: bytes, storages: dict[str, bytes], *, folder: str = "archive", **more: bytes
) -> None:
    """`more`: further members, or others in place of byteorder and version."""
    members = {
        "data.pkl": pickled,
        **{"byteorder": b"little", "version": b"3\n", **more},
        **{f"data/{key}": data for key, data in storages.items()},
    }
    with zipfile.ZipFile(path, "w") as archive:
        for inner, data in members.items():
            archive.writestr(f"{folder}/{inner}", data)
