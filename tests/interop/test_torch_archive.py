"""pytorch_model.bin without torch: its tensors are read right, and whatever else a pickle or an archive may hold is refused.

Against torch itself, with many dtypes and strides: tests/peers/test_weight_files.py.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.interop import archives as a
from tests.interop import mutations
from zoo.errors import UserError
from zoo.interop.state_dict_pickle import MOST_OPCODES, parse
from zoo.interop.weights import open_weights

GOLDEN = Path(__file__).parent / "golden" / "pytorch_model.bin"
STORAGES = {
    "Float": np.float32,
    "Double": np.float64,
    "Half": np.float16,
    "BFloat16": ml_dtypes.bfloat16,
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
}
SIX = np.arange(6, dtype=np.float32)
VECTOR = a.tensor(a.storage("0", 6), (6,), (1,))


def read(directory):
    with open_weights(directory) as weights:
        return {name: weights.read(name) for name in weights}


def put(directory, body, *, name="pytorch_model.bin", **more):
    """An archive whose pickle is `body`, with six floats as storage 0."""
    a.write(directory / name, a.program(body), {"0": SIX.tobytes()}, **more)


def refused(directory, message, *, memory=2 << 20):
    """open_weights refuses, naming the file, and takes no memory for it."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message) as found:
            open_weights(directory)
        assert tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()
    assert f"{directory / 'pytorch_model.bin'} is refused: " in str(found.value)


def test_a_file_of_torch_is_read(tmp_path):
    shutil.copy(GOLDEN, tmp_path)
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    expected = {
        "weight": SIX.reshape(2, 3) / 4,
        "bias": SIX[:2],
        "tied": SIX.reshape(2, 3) / 4,
        "parameter": SIX[:2],
        "transposed": base.T,
        "sliced": base[1:, ::2],
        "scalar": np.int64(7)[...],
        "empty": np.zeros((0, 3), np.float32),
        "torch.bool": np.array([False, True]),
        **{f"torch.{d}": np.array([0, 1], d) for d in ("uint16", "float16")},
        "torch.bfloat16": np.array([0, 1], ml_dtypes.bfloat16),
    }
    with open_weights(tmp_path) as weights:
        assert list(weights) == list(expected)
        assert weights.nbytes == sum(array.nbytes for array in expected.values())
        for name, array in expected.items():
            found = weights.read(name)
            assert (
                found.dtype == weights.dtype(name) == array.dtype and found.shape == weights.shape(name) == array.shape
            )
            np.testing.assert_array_equal(found, array)
            assert found.flags.c_contiguous and found.flags.writeable
        assert not np.may_share_memory(weights.read("weight"), weights.read("tied"))


@pytest.mark.parametrize("kind", STORAGES)
def test_dtypes(tmp_path, kind):
    array = np.array([[0, 1, 1], [1, 0, 1]], STORAGES[kind])
    body = a.dictionary({"x": a.tensor(a.storage("7", 6, f"torch.{kind}Storage"), (2, 3), (3, 1))})
    a.write(tmp_path / "pytorch_model.bin", a.program(body), {"7": array.tobytes()})
    found = read(tmp_path)["x"]
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_dtypes_without_a_storage_type(tmp_path, size):
    array = np.array([1, 2, 3], f"<u{size}")
    on = a.storage("0", array.nbytes, "torch.storage.UntypedStorage")
    body = a.dictionary({"x": a.tensor(on, (3,), (1,), 0, a.name(f"torch.uint{8 * size}"))})
    a.write(tmp_path / "pytorch_model.bin", a.program(body), {"0": array.tobytes()})
    found = read(tmp_path)["x"]
    assert found.dtype == array.dtype and found.tolist() == [1, 2, 3]


def test_views_of_one_storage(tmp_path):
    on = a.storage("0", 6)
    views = {
        "transposed": ((3, 2), (1, 3), 0, SIX.reshape(2, 3).T),
        "offset": ((2,), (2,), 1, SIX[1::2][:2]),
        "windows": ((2, 2), (1, 2), 0, np.array([[0, 2], [1, 3]])),
        "scalar": ((), (), 5, SIX[5]),
        "one": ((1, 6), (1 << 62, 1), 0, SIX[None]),
        "empty": ((0, 3), (9, 9), 6, np.zeros((0, 3))),
    }
    put(tmp_path, a.ordered_dict({n: a.tensor(on, shape, strides, at) for n, (shape, strides, at, _) in views.items()}))
    for name, array in read(tmp_path).items():
        assert array.shape == views[name][3].shape and array.flags.c_contiguous
        np.testing.assert_array_equal(array, views[name][3])


def test_shards(tmp_path):
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for tensor, shard in weight_map.items():
        put(tmp_path, a.dictionary({tensor: VECTOR}), name=shard)
    assert read(tmp_path).keys() == {"a", "b"}


def reduced(function, *arguments):
    """What pickle writes for an object whose unpickling calls `function`."""

    class Call:
        def __reduce__(self):
            return function, arguments

    return pickle.dumps(Call(), protocol=2)[2:-1]


HOSTILE = {
    "os.system": (reduced(os.system, "touch here"), "the global 'posix.system', which a state dict"),
    "eval": (reduced(eval, "1"), "the global '__builtin__.eval'"),
    "getattr": (reduced(getattr, "text", "format"), "the global '__builtin__.getattr'"),
    "a chain of getattr": (
        a.call("builtins.getattr", a.name("torch.FloatStorage"), a.text("mro")),
        "'builtins.getattr'",
    ),
    "a dotted attribute": (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", "__globals__'"),
    "an escape": (a.call("collections.Ordered\\x44ict"), "a global with a backslash in its name"),
    "numpy": (a.call("numpy.core.multiarray.scalar"), "'numpy.core.multiarray.scalar'"),
    "torch's own loader": (a.call("torch.load", a.text("other")), "'torch.load'"),
    "a call of a storage": (a.call("torch.FloatStorage", a.integer(1 << 40)), "a call of torch.FloatStorage"),
    "a call of a dtype": (a.call("torch.uint16"), "a call of torch.uint16"),
    "a call of a tensor": (VECTOR + a.EMPTY_TUPLE + a.REDUCE, "a tensor in place of a global"),
    "a call without a tuple": (
        a.name("collections.OrderedDict") + a.EMPTY_LIST + a.REDUCE,
        "a list of 0 in place of a tuple",
    ),
    "OrderedDict of pairs": (a.call("collections.OrderedDict", a.EMPTY_LIST), "OrderedDict with other arguments"),
    "BUILD of a tensor": (VECTOR + a.EMPTY_DICT + a.BUILD, "a tensor in place of an OrderedDict"),
    "BUILD of a plain dict": (
        a.EMPTY_DICT + a.dictionary({"_metadata": a.EMPTY_DICT}) + a.BUILD,
        "a dict of 0 in place of an OrderedDict",
    ),
    "a key twice": (a.EMPTY_DICT + b"(" + (a.text("x") + a.NONE) * 2 + b"u", "the key 'x' twice"),
    "BUILD with attributes": (
        a.ordered_dict() + a.dictionary({"__class__": a.NONE}) + a.BUILD,
        "BUILD, which sets attributes",
    ),
    "BUILD with slots": (a.ordered_dict() + a.tuple_of(a.NONE, a.NONE) + a.BUILD, "a tuple of 2 in place of a dict"),
    "INST": (b"(S'touch here'\nios\nsystem\n", "the opcode STRING"),
    "INST alone": (b"(ios\nsystem\n", "the opcode INST"),
    "OBJ": (b"(" + a.name("collections.OrderedDict") + b"o", "the opcode OBJ"),
    "NEWOBJ": (a.name("collections.OrderedDict") + b")\x81", "the opcode NEWOBJ"),
    "STACK_GLOBAL": (a.text("os") + a.text("system") + b"\x93", "the opcode STACK_GLOBAL"),
    "EXT1": (b"\x82\x01", "the opcode EXT1"),
    "EXT4": (b"\x84\x01\x00\x00\x00", "the opcode EXT4"),
    "PERSID": (b"Pstorage\n", "the opcode PERSID"),
    "BYTEARRAY8": (b"\x96" + struct.pack("<Q", 3) + b"abc", "the opcode BYTEARRAY8"),
    "NEXT_BUFFER": (b"\x97", "the opcode NEXT_BUFFER"),
    "a protocol later": (b"\x80\x02N", "of protocol 2"),
    "an opcode of nobody": (b"\xff", "its pickle is damaged: .*unknown"),
    "a text cut short": (b"X\xff\xff\xff\x7fab", "its pickle is damaged"),
    "a huge text": (b"\x8d" + struct.pack("<Q", 1 << 62) + b"ab", "the opcode BINUNICODE8"),
    "a huge number": (b"\x8b\xff\xff\xff\x7f1234", "the opcode LONG4"),
    "a number of 2000 bits": (b"\x8a\xff" + b"\x7f" * 255, "a number of more than 64 bits"),
    "digits without end": (b"I" + b"9" * 100_000 + b"\n", "the opcode INT"),
    "a huge memo": (a.NONE + b"r\xff\xff\xff\xff" + b"j\xfe\xff\xff\xff", "the memo has no entry 4294967294"),
    "a memo of nothing": (b"q\x00", "takes a value where there is none"),
    "below the mark": (a.NONE + b"(" + b"\x85", "takes a value where there is none"),
    "no mark": (a.NONE + b"t", "looks for a mark where there is none"),
    "a mark left": (b"(" + a.EMPTY_DICT, "does not end with one value"),
    "two values": (a.EMPTY_DICT + a.EMPTY_DICT, "does not end with one value"),
    "nothing": (b"", "does not end with one value"),
    "a key without a value": (a.EMPTY_DICT + b"(" + a.NONE + b"u", "a key without a value"),
    "a deep key": (a.EMPTY_DICT + b"(" + b"}" + b"\x85" * 20_000 + b"Nu", "a tuple of 1 as a key"),
    "a deep value": (a.EMPTY_DICT + a.text("x") + b"}" + b"\x85" * 20_000 + b"s", "it maps 'x' to a tuple of 1;"),
    "a list in itself": (b"]q\x00(h\x00h\x00e", "it holds a list of 2; a state dict"),
    "a dict in itself": (b"}q\x00" + a.text("x") + b"h\x00s", "it maps 'x' to a dict of 1"),
    "a storage of another kind": (
        a.tuple_of(a.text("module"), a.name("torch.FloatStorage"), a.text("0"), a.text("cpu"), a.integer(6))
        + a.PERSISTENT,
        "a persistent id that is no storage",
    ),
    "a storage elsewhere": (a.storage("../version", 6), "a persistent id that is no storage"),
    "a negative storage": (a.storage("0", -6), "a persistent id that is no storage"),
    "a boolean storage": (
        a.tuple_of(a.text("storage"), a.name("torch.FloatStorage"), a.text("0"), a.text("cpu"), a.TRUE) + a.PERSISTENT,
        "a persistent id that is no storage",
    ),
    "a text for a storage": (a.tensor(a.text("0"), (6,), (1,)), "_rebuild_tensor_v2 with other arguments"),
    "hooks": (
        a.call("torch._utils._rebuild_parameter", VECTOR, a.TRUE, a.dictionary({"hook": a.NONE})),
        "_rebuild_parameter with other arguments",
    ),
    "a fraction for a size": (
        a.call(
            "torch._utils._rebuild_tensor_v2",
            *(a.storage("0", 6), a.integer(0), a.tuple_of(b"G" + bytes(8)), a.integers([1]), a.FALSE, a.ordered_dict()),
        ),
        "_rebuild_tensor_v2 with other arguments",
    ),
    "an untyped tensor": (
        a.tensor(a.storage("0", 24, "torch.storage.UntypedStorage"), (6,), (1,)),
        "v2 with other arguments",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path, case, monkeypatch):
    body, message = HOSTILE[case]
    monkeypatch.chdir(tmp_path)
    put(tmp_path, body)
    refused(tmp_path, message, memory=64 * len(body) + (2 << 20))  # an opcode of one byte makes a tuple or a dict
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


NO_STATE_DICTS = {
    "a model": ({"model": a.dictionary({"x": VECTOR})}, "its tensors are nested under the key 'model'"),
    "a training state": (
        {
            "epoch": a.integer(3),
            "optimizer": a.dictionary({"lr": b"G" + struct.pack(">d", 1e-3), "betas": a.EMPTY_LIST + a.NONE + b"a"}),
            "state_dict": a.ordered_dict({"x": VECTOR}),
        },
        "its tensors are nested under the key 'state_dict'",
    ),
    "a number": ({"x": VECTOR, "epoch": a.integer(3)}, "it maps 'epoch' to an int; a state dict maps names"),
    "a text": ({"x": a.text("y")}, "it maps 'x' to a str"),
    "None": ({"x": a.NONE}, "it maps 'x' to None"),
    "a storage": ({"x": a.storage("0", 6)}, "it maps 'x' to a storage"),
    "a type": ({"x": a.name("torch.FloatStorage")}, "it maps 'x' to the global torch.FloatStorage"),
    "nothing": ({}, "it holds a dict of 0; a state dict"),
}


@pytest.mark.parametrize("case", NO_STATE_DICTS)
def test_what_is_no_state_dict_is_refused_by_name(tmp_path, case):
    entries, message = NO_STATE_DICTS[case]
    put(tmp_path, a.dictionary(entries))
    refused(tmp_path, message)


def test_a_tensor_alone_and_names_that_are_no_text_are_refused(tmp_path):
    put(tmp_path, VECTOR)
    refused(tmp_path, "it holds a tensor; a state dict")
    put(tmp_path, a.EMPTY_DICT + b"(" + a.integer(7) + VECTOR + b"u")
    refused(tmp_path, "it maps 7 to a tensor")


VIEWS = {
    "beyond": ((7,), (1,), 0, "tensor 'x' reaches beyond the 24 bytes of its storage data/0"),
    "offset beyond": ((6,), (1,), 1, "tensor 'x' reaches beyond"),
    "strides beyond": ((2, 3), (4, 1), 0, "tensor 'x' reaches beyond"),
    "negative offset": ((2,), (1,), -1, "strides or an offset that no tensor has"),
    "negative stride": ((2,), (-1,), 5, "strides or an offset that no tensor has"),
    "strides missing": ((2, 3), (1,), 0, "strides or an offset that no tensor has"),
    "negative shape": ((-2,), (1,), 0, "tensor 'x' has a shape that no array has"),
    "overflow": ((1 << 40, 1 << 40), (0, 0), 0, "tensor 'x' has a shape that no array has"),
    "overflow of strides": ((2, 2), (1 << 62, 1 << 62), 0, "tensor 'x' reaches beyond"),
    "overflow of nothing": ((0, 1 << 62, 1 << 62), (1, 1, 1), 0, "a shape that no array has"),
    "expanded": ((1 << 40,), (0,), 0, "tensor 'x' has 1099511627776 elements, more than its storage"),
    "overlapping": ((5, 5), (1, 0), 0, "tensor 'x' has 25 elements, more than its storage"),
    "many axes": ((1,) * 33, (1,) * 33, 0, "tensor 'x' has a shape that no array has"),
}


@pytest.mark.parametrize("case", VIEWS)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, case):
    shape, strides, offset, message = VIEWS[case]
    put(tmp_path, a.dictionary({"x": a.tensor(a.storage("0", 6), shape, strides, offset)}))
    refused(tmp_path, message)


def test_a_storage_is_as_the_pickle_says(tmp_path):
    for on, message in (
        (a.storage("0", 5), "its storage data/0 has 24 bytes, and the pickle says 20"),
        (a.storage("0", 1 << 60), "its storage data/0 has 24 bytes, and the pickle says"),
        (a.storage("0", 6, "torch.DoubleStorage"), "its storage data/0 has 24 bytes, and the pickle says 48"),
        (a.storage("1", 6), "tensor 'x' is in the storage data/1, which is not there"),
    ):
        put(tmp_path, a.dictionary({"x": a.tensor(on, (1,), (1,))}))
        refused(tmp_path, message)


def test_a_storage_has_one_dtype(tmp_path):
    """torch would give the second tensor the dtype of the first."""
    ints = a.tensor(a.storage("0", 6, "torch.IntStorage"), (6,), (1,))
    put(tmp_path, a.dictionary({"x": VECTOR, "y": ints}))
    refused(tmp_path, "tensor 'y' gives its storage data/0 another dtype than one before it")


def test_booleans_are_none_or_one(tmp_path):
    put(tmp_path, a.dictionary({"x": a.tensor(a.storage("0", 24, "torch.BoolStorage"), (24,), (1,))}))
    with open_weights(tmp_path) as weights, pytest.raises(UserError, match="booleans that are neither 0 nor 1"):
        weights.read("x")


def test_opcodes_and_bytes_are_counted(tmp_path):
    with pytest.raises(ValueError, match="its pickle has more than 300000 opcodes"):
        parse(b"\x80\x02" + b"N" * (MOST_OPCODES + 1))
    with pytest.raises(ValueError, match="2 bytes follow the end of its pickle"):
        parse(a.program(a.dictionary({"x": VECTOR})) + b"N.")
    for data in (b"\x80\x04N.", b"\x80\x03N."):
        with pytest.raises(ValueError, match=f"its pickle is of protocol {data[1]}; torch.save writes 2"):
            parse(data)
    put(tmp_path, a.text("x" * (8 << 20)))
    refused(tmp_path, r"its data.pkl has 83886\d\d bytes, more than 8388608")


def test_the_format_before_1_6_is_refused_with_the_way_out(tmp_path):
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
    (tmp_path / "pytorch_model.bin").write_bytes(magic + pickle.dumps(1001, protocol=2))
    refused(tmp_path, r"as torch wrote before 1.6; load it with torch.load\(..., weights_only=True\) and save it again")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\0" * 100)
    refused(tmp_path, "it is no archive of torch.save")
    (tmp_path / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(tmp_path, "git lfs pull")


STATE = a.dictionary({"x": VECTOR})


def zipped(path, members, **settings):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            archive.writestr(name, data, **settings)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    "members, message",
    [
        (
            [("archive/data.pkl", b"."), ("/etc/passwd", b"")],
            "its member '/etc/passwd' is no file in the folder 'archive'",
        ),
        ([("archive/data.pkl", b"."), ("archive/../x", b"")], "its member 'archive/../x' is no file in the folder"),
        ([("archive/data.pkl", b"."), ("archive/a\\b", b"")], "is no file in the folder"),
        ([("archive/data.pkl", b"."), ("archive/data/", b"")], "its member 'archive/data/' is no file in the folder"),
        ([("archive/data.pkl", b"."), ("other/data/0", b"")], "its member 'other/data/0' is no file in the folder"),
        ([("archive/data.pkl", b"."), ("other/data.pkl", b".")], "it has no data.pkl in one folder"),
        ([("archive/data.pkl", b"."), ("archive/data.pkl", b".")], "it has no data.pkl in one folder"),
        (
            [("archive/data.pkl", b"."), ("archive/data/0", b""), ("archive/data/0", b"")],
            "'archive/data/0' is there twice",
        ),
        ([("data.pkl", b".")], "it has no data.pkl in one folder"),
        ([("archive/data.pkl", b"."), ("archive/code/m.py", b"")], "it is TorchScript, a program"),
        ([("archive/data.pkl", b"."), ("archive/byteorder", b"big")], "its byte order is 'big'; little is read"),
        ([("archive/data.pkl", b"."), ("archive/version", b"11\n")], r"its version is '11\\n'; 1 to 10 are read"),
        ([("archive/data.pkl", b".")], "its version is ''; 1 to 10 are read"),
    ],
)
def test_members_that_torch_does_not_write_are_refused(tmp_path, members, message):
    zipped(tmp_path / "pytorch_model.bin", members)
    refused(tmp_path, message)


def test_compressed_members_are_refused(tmp_path):
    zeros = bytes(1 << 22)
    zipped(
        tmp_path / "pytorch_model.bin",
        [("archive/data.pkl", a.program(STATE)), ("archive/data/0", zeros)],
        compress_type=zipfile.ZIP_DEFLATED,
    )
    assert (tmp_path / "pytorch_model.bin").stat().st_size < 1 << 18
    refused(tmp_path, "its member 'archive/data.pkl' is compressed; torch.save stores the bytes as they are")


def edited(path, old, new, *, last=False):
    """Replaces bytes of a file, at their first place or at their last."""
    data = path.read_bytes()
    at = data.rindex(old) if last else data.index(old)
    path.write_bytes(data[:at] + new + data[at + len(old) :])


def test_a_directory_that_lies_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    six = struct.pack("<II", 24, 24)  # the sizes of data/0, compressed and not
    for new, message in (
        (struct.pack("<II", 1 << 30, 1 << 30), "'archive/data/0' ends beyond the file"),
        (struct.pack("<II", 24, 1 << 30), "'archive/data/0' is compressed"),
        (struct.pack("<II", 20, 20), "its storage data/0 has 20 bytes, and the pickle says 24"),
    ):
        put(tmp_path, STATE)
        edited(path, six, new, last=True)
        refused(tmp_path, message)
    put(tmp_path, STATE)
    edited(path, b"archive/data/0", b"archive/data/1")  # in the member's own header, not in the directory
    refused(tmp_path, "its member 'archive/data/0' is not where the archive's directory says")


def test_members_that_lie_over_each_other_are_refused(tmp_path):
    """Ten names for one member: each is within the file, and together they are larger than it."""
    path = tmp_path / "pytorch_model.bin"
    a.write(path, a.program(STATE), {"0": bytes(10_000)})
    data = path.read_bytes()
    begin = data.index(b"PK\x01\x02")
    end = data.index(b"PK\x05\x06")
    entry = data[data.rindex(b"PK\x01\x02") : end]
    # Their names differ in the directory only, so each of the copies would be refused on its own, too, but later.
    copies = b"".join(entry.replace(b"data/0", b"data/%d" % i) for i in range(1, 10))
    directory = data[begin:end] + copies
    count = data[begin:end].count(b"PK\x01\x02") + 9
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(directory), begin, 0)
    path.write_bytes(data[:begin] + directory + tail)
    refused(tmp_path, "is not where the archive's directory says|its members have 1000")


def test_a_damaged_or_truncated_archive_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    put(tmp_path, STATE)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        refused(tmp_path, "it is cut short|it is empty|it is no archive")
    path.write_bytes(whole)
    edited(path, struct.pack("<f", 3), struct.pack("<f", 5))
    with open_weights(tmp_path) as weights, pytest.raises(UserError, match="data/0 does not have its checksum"):
        weights.read("x")
    path.write_bytes(whole)
    edited(path, b"FloatStorage", b"FloatStorAge")
    refused(tmp_path, "data.pkl does not have its checksum")


def test_a_directory_without_end_is_not_read(tmp_path):
    """A sparse file of 1 GiB that says it is nothing but the archive's directory."""
    size = 1 << 30
    with open(tmp_path / "pytorch_model.bin", "wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(size - 22)
        file.seek(0, os.SEEK_END)
        file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 9, 9, size - 22 - 4, 4, 0))
    refused(tmp_path, "the archive's directory has 1073741798 bytes, more than 8388608")


@pytest.mark.parametrize(("bit", "said"), [(0x1, "encrypted"), (0x40, "encrypted"), (0x20, "a patch")])
def test_members_that_are_not_plain_bytes_are_refused(tmp_path, bit, said):
    file = bytearray(mutations.torch_archives()[0])
    file[file.index(b"PK\x01\x02") + 8] |= bit  # flags of the first member in the archive's directory
    (tmp_path / "pytorch_model.bin").write_bytes(file)
    with pytest.raises(UserError, match=said):
        open_weights(tmp_path)
