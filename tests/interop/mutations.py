"""Valid files of weights, and ways to spoil them: at random in their bytes, and knowingly in what they say."""

from __future__ import annotations

import io
import itertools
import json
import pickletools
import random
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import safetensors.numpy

from tests.interop import archives as a

GOLDEN = Path(__file__).parent / "golden" / "pytorch_model.bin"
NUMBERS = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    255,
    256,
    1 << 15,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    (1 << 62),
    (1 << 63) - 1,
]
NUMBERS += [1 << 63, (1 << 64) - 1, 1 << 64, -1, -2]
# What an attacker or a later torch may say; each alone, or between others.
OPCODES = [
    b"N",
    b")",
    b"}",
    b"]",
    b"(",
    b"t",
    b"\x85",
    b"\x86",
    b"\x87",
    b"R",
    b"Q",
    b"b",
    b"s",
    b"u",
    b"e",
    b"a",
    b".",
]
OPCODES += [
    b"h\x00",
    b"q\x00",
    b"j\xff\xff\xff\xff",
    b"r\xff\xff\xff\xff",
    b"0",
    b"2",
    b"1",
    b"\x81",
    b"\x94",
    b"o",
    b"\x8f",
]
OPCODES += [a.integer(n) for n in NUMBERS] + [a.text("x"), a.text(""), a.text("0"), b"\x82\x01", b"\x96" + b"\xff" * 8]
OPCODES += [
    a.name(n) for n in ("torch.FloatStorage", "torch.LongStorage", "torch.uint16", "builtins.eval", "torch.float32")
]
OPCODES += [
    a.storage("0", 6),
    a.tensor(a.storage("1", 2), (2,), (1,)),
    a.ordered_dict(),
    b"\x8d" + b"\xff" * 8,
    b"G" + b"\x7f" * 8,
]


def at_random(rng: random.Random, data: bytes) -> bytes:
    """Bits flipped, numbers replaced, or bytes cut out, put in, moved, or left off at the end."""
    spoiled = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(spoiled) + 1)
        length = min(rng.choice((1, 2, 4, 8, 30, 200)), len(spoiled))
        match rng.randrange(7):
            case 0 if at < len(spoiled):
                spoiled[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(spoiled):
                spoiled[at] = rng.randrange(256)
            case 2:
                size = rng.choice((2, 4, 8))
                spoiled[at : at + size] = (rng.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
            case 3:
                del spoiled[at:]
            case 4:
                del spoiled[at : at + length]
            case 5:
                spoiled[at:at] = rng.randbytes(length)
            case 6:
                start = rng.randrange(len(spoiled) - length + 1)
                spoiled[at : at + rng.choice((0, length))] = spoiled[start : start + length]
    return bytes(spoiled)


def safetensors_files() -> list[bytes]:
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array([True, False]),
        "c": np.zeros((0, 4), np.int16),
    }
    return [
        safetensors.numpy.save(tensors, {"format": "pt"}),
        safetensors.numpy.save({"x": np.arange(3.0), "y": np.arange(3)}),
    ]


def header(rng: random.Random, data: bytes) -> bytes:
    """The header of a safetensors file changed, and its length with it."""
    length = struct.unpack("<Q", data[:8])[0]
    text, rest = data[8 : 8 + length], data[8 + length :]
    said = json.loads(text)
    name = rng.choice([n for n in said if n != "__metadata__"])
    match rng.randrange(8):
        case 0:
            said[name]["dtype"] = rng.choice(
                ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "f32", "", None, 1]
            )
        case 1:
            said[name]["shape"] = rng.choice(
                ([], [rng.choice(NUMBERS)], [rng.choice(NUMBERS), rng.choice(NUMBERS)], [6], None, [0])
            )
        case 2:
            said[name]["data_offsets"] = rng.choice(
                ([rng.choice(NUMBERS), rng.choice(NUMBERS)], [0, len(rest)], [], None, [0.0, 8.0])
            )
        case 3:
            said[rng.choice(["z", "", "a", "__metadata__", "\ud800", "x" * 5000])] = said.pop(name)
        case 4:
            said[rng.choice(["z", "__metadata__"])] = rng.choice([said[name], {"a": "b"}, {"a": 1}, [], None, "x"])
        case 5:
            del said[name]
        case 6:
            rest = rest[: rng.randrange(len(rest) + 1)] if rng.randrange(2) else rest + bytes(rng.choice((1, 8)))
        case 7:
            text = at_random(rng, text)
            return struct.pack("<Q", len(text)) + text + rest
    text = json.dumps(said).encode()
    if rng.randrange(3) == 0:
        text = re.sub(rb"\d+", lambda m: str(rng.choice(NUMBERS)).encode() if rng.randrange(8) == 0 else m[0], text)
    return struct.pack("<Q", len(text)) + text + rest


INDEX = json.dumps(
    {"metadata": {"total_size": 56}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}
)


def write_shards(folder: Path) -> None:
    """What INDEX names, and a file that it does not."""
    for name, tensors in {
        "1": {"a": np.arange(3.0), "c": np.arange(2)},
        "2": {"b": np.arange(2.0)},
        "3": {"a": np.ones(1)},
    }.items():
        safetensors.numpy.save_file(tensors, folder / f"{name}.safetensors")


def index(rng: random.Random, text: bytes) -> bytes:
    """Names and files of an index exchanged, left out, or led elsewhere."""
    said = json.loads(text)
    placed = said["weight_map"]
    match rng.randrange(5):
        case 0:
            placed[rng.choice("abcd")] = rng.choice(
                ["1.safetensors", "2.safetensors", "3.safetensors", "/1.safetensors", ".", "", 1]
            )
        case 1:
            placed[rng.choice("abcd")] = rng.choice(
                ["../" * 8 + "etc/passwd", "./1.safetensors", "1.safetensors/", "a/../1.safetensors"]
            )
        case 2:
            del placed[rng.choice("abc")]
        case 3:
            said[rng.choice(["weight_map", "metadata"])] = rng.choice(
                [None, {}, [], "1.safetensors", {"a": "1.safetensors"}]
            )
        case 4:
            said["weight_map"] = dict(rng.sample(list(placed.items()), len(placed)))
    return json.dumps(said).encode()


def torch_archives() -> list[bytes]:
    """The one that torch made, and one without a memo."""
    body = a.ordered_dict(
        {
            "w": a.parameter(a.tensor(a.storage("0", 6), (2, 3), (1, 2))),
            "v": a.tensor(a.storage("0", 6), (3,), (2,), 1),
            "b": a.tensor(a.storage("1", 2, "torch.BoolStorage"), (2,), (1,)),
        }
    )
    made = io.BytesIO()
    a.write(made, a.program(body), {"0": np.arange(6, dtype=np.float32).tobytes(), "1": b"\1\0"})
    return [GOLDEN.read_bytes(), made.getvalue()]


def rewritten(rng: random.Random, data: bytes, *, pickle_alone: bool = False) -> bytes:
    """Members of an archive changed, mostly the pickle, and their checksums with them."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    name = pickled if pickle_alone or rng.randrange(8) else rng.choice(list(members))
    change = rng.choice((at_random, opcodes)) if name == pickled else at_random
    members[name] = change(rng, members[name])
    if not pickle_alone and rng.randrange(16) == 0:
        members[rng.choice(["archive/data/9", "../x", "archive/.more", "/x"])] = members.pop(rng.choice(list(members)))
    spoiled = io.BytesIO()
    with zipfile.ZipFile(spoiled, "w", rng.choice((zipfile.ZIP_STORED,) * 15 + (zipfile.ZIP_DEFLATED,))) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return spoiled.getvalue()


def opcodes(rng: random.Random, pickled: bytes) -> bytes:
    """Opcodes of a pickle left out, repeated, moved, or others put between them; numbers replaced."""
    starts = [position for _, _, position in pickletools.genops(pickled)] + [len(pickled)]
    parts = [pickled[begin:end] for begin, end in itertools.pairwise(starts)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(1, len(parts))
        match rng.randrange(5):
            case 0:
                del parts[at]
            case 1:
                parts.insert(at, rng.choice(OPCODES))
            case 2:
                parts[at] = rng.choice(OPCODES)
            case 3:
                parts.insert(at, rng.choice(parts))
            case 4:
                numbers = [i for i, part in enumerate(parts) if part[:1] in b"KMJ"]
                parts[rng.choice(numbers)] = a.integer(rng.choice(NUMBERS))
        if len(parts) < 2:
            break
    return b"".join(parts)
