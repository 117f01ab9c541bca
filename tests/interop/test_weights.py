"""Directories of safetensors: read lazily and as the library writes them, written as it reads them, refused where anything is off."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from zoo.errors import UserError, WriteFailed
from zoo.interop.weights import open_weights, write_weights

DTYPES = [np.bool_, *"bhilBHIL", np.float16, np.float32, np.float64, ml_dtypes.bfloat16]


def drawn(seed=0):
    """A tensor of each dtype, a scalar, an empty one, and one of other names and order in memory."""
    rng = np.random.default_rng(seed)
    tensors = {f"a.{np.dtype(d).name}": rng.integers(0, 2, (3, 5)).astype(d) for d in DTYPES}
    tensors["scalar"] = np.float32(rng.normal())[...]
    tensors["empty"] = np.zeros((0, 7), np.int64)
    tensors['Wörter/变换 "x"'] = rng.normal(size=(4, 6)).T[::2]
    return tensors


def same(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


def entry(dtype, shape, begin, end, **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def put(directory, header, data=b"", *, name="model.safetensors", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / name).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def test_what_the_library_writes_is_read(tmp_path):
    expected = {name: np.ascontiguousarray(a) if a.ndim else a for name, a in drawn().items()}
    safetensors.numpy.save_file(expected, tmp_path / "model.safetensors", metadata={"made": "here"})
    with open_weights(tmp_path) as weights:
        assert set(weights.names()) == set(weights) == set(expected) and len(weights) == len(expected)
        assert weights.nbytes == sum(a.nbytes for a in expected.values())
        assert "scalar" in weights and "other" not in weights
        for name, array in expected.items():
            assert weights.shape(name) == array.shape and weights.dtype(name) == array.dtype
            found = weights.read(name)
            same(found, array)
            assert found.flags.writeable and found.flags.c_contiguous
            assert not np.may_share_memory(found, weights.read(name))
        with pytest.raises(UserError, match=r"no tensor 'b' among its"):
            weights.read("b")


@pytest.mark.parametrize("limit", [10**6, 100])
def test_what_is_written_is_read_by_the_library(tmp_path, limit):
    expected = drawn()
    write_weights(tmp_path, (item for item in expected.items()), max_shard_bytes=limit)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    for path in shards:
        with safetensors.safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118  not a mapping
                same(file.get_tensor(name), np.asarray(expected[name], order="C"))
    with open_weights(tmp_path) as weights:
        assert set(weights) == set(expected)
        for name in weights:
            same(weights.read(name), np.asarray(expected[name], order="C"))


def test_shards_are_as_transformers_names_them(tmp_path):
    tensors = {name: np.full(10, i, np.float32) for i, name in enumerate("abcd")}
    write_weights(tmp_path, {**tensors, "large": np.zeros(50)}, max_shard_bytes=80)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first, second, third = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    assert index == {
        "metadata": {"total_size": 4 * 40 + 400},
        "weight_map": {"a": first, "b": first, "c": second, "d": second, "large": third},
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == [first, second, third, "model.safetensors.index.json"]


def test_files_are_for_whom_the_mask_lets(tmp_path):
    (tmp_path / "other").touch()
    write_weights(tmp_path, {"a": np.zeros(2)})
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    tensors = {"a": np.zeros(10), "b": np.zeros(10)}
    (tmp_path / ".model-00007.safetensors.part").touch()  # of a write that was killed
    for called in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, called, lambda *_: full(0))
            with pytest.raises(WriteFailed, match=r"could not be written: No space left on device"):
                write_weights(tmp_path, tensors, max_shard_bytes=80)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="tensor 'b' is of complex128"):
        write_weights(tmp_path, {"a": np.zeros(10), "b": np.zeros(10, complex)}, max_shard_bytes=8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, "there are no tensors to write"),
        ([("a", np.zeros(1)), ("a", np.zeros(1))], "tensor 'a' comes twice"),
        ({"__metadata__": np.zeros(1)}, "a name of the format's own"),
        ({"a": np.array(["text"])}, "tensor 'a' is of <U4, which is not written"),
        ({"a": np.zeros(1, ml_dtypes.int4)}, "tensor 'a' is of int4"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, tensors, message):
    with pytest.raises(UserError, match=message):
        write_weights(tmp_path, tensors)
    assert list(tmp_path.iterdir()) == []


def test_weights_are_not_written_over_others(tmp_path):
    write_weights(tmp_path, {"a": np.zeros(1)})
    with pytest.raises(UserError, match=r"holds weights already \('model.safetensors'\)"):
        write_weights(tmp_path, {"a": np.ones(1)})
    with pytest.raises(UserError, match="is no directory"):
        write_weights(tmp_path / "none", {"a": np.ones(1)})
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"holds weights already \('model-00001-of-00002.safetensors'\)"):
        write_weights(tmp_path, {"a": np.ones(1)})
    assert (tmp_path / "model-00001-of-00002.safetensors").exists()


def test_a_directory_without_weights_lists_what_is_there(tmp_path):
    (tmp_path / "tf_model.h5").touch()
    with pytest.raises(UserError, match=r"looked for model.safetensors, model.safetensors.index.json.*'tf_model.h5'"):
        open_weights(tmp_path)
    with pytest.raises(UserError, match="is no directory"):
        open_weights(tmp_path / "tf_model.h5")


ONE = entry("F32", [2], 0, 8)
REFUSED = {
    "empty file": (None, None, "it is empty"),
    "no header": (None, b"1234", "it has 4 bytes, and 8 say how long"),
    "Git LFS": (None, b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "header longer than the file": ({"a": ONE}, 1 << 60, r"its header would have \d+ bytes and the file has"),
    "no object": (b"[1]", b"", "no JSON object"),
    "no JSON": (b"{", b"", "its header is wrong"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not UTF-8 at byte 2"),
    "UTF-16": ('{"a": 1}'.encode("utf-16-le"), b"", "its header is wrong"),
    "nested": (b'{"a":' + b"[" * 100_000, b"", "its header is wrong|nested too deep"),
    "a name twice": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}',
        bytes(8),
        "the key 'a' stands there twice",
    ),
    "a field twice": (
        b'{"a":{"dtype":"F32","dtype":"F64","shape":[1],"data_offsets":[0,8]}}',
        bytes(8),
        "'dtype' .*twice",
    ),
    "a field more": ({"a": {**ONE, "device": "cuda"}}, bytes(8), "tensor 'a' other fields than"),
    "a field less": ({"a": {"dtype": "F32"}}, bytes(8), "tensor 'a' other fields than"),
    "no fields": ({"a": 1}, bytes(8), "tensor 'a' other fields than"),
    "dtype of nobody": ({"a": entry("F31", [2], 0, 8)}, bytes(8), "tensor 'a' has the dtype 'F31'; read are BOOL, I8"),
    "dtype without scales": ({"a": entry("F8_E4M3", [8], 0, 8)}, bytes(8), "has the dtype 'F8_E4M3'"),
    "dtype a list": ({"a": entry(["F32"], [2], 0, 8)}, bytes(8), "has the dtype"),
    "negative": ({"a": entry("F32", [-2], 0, 8)}, bytes(8), "tensor 'a' has a shape that no array has"),
    "a boolean for a size": ({"a": entry("F64", [True], 0, 8)}, bytes(8), "a shape that no array has"),
    "a fraction": ({"a": entry("F32", [2.0], 0, 8)}, bytes(8), "a shape that no array has"),
    "many axes": ({"a": entry("F64", [1] * 65, 0, 8)}, bytes(8), "a shape that no array has"),
    "overflow": ({"a": entry("F32", [2**32, 2**32], 0, 8)}, bytes(8), "a shape that no array has"),
    "overflow of nothing": ({"a": entry("F32", [0, 2**62, 2**62], 0, 0)}, b"", "a shape that no array has"),
    "another size": ({"a": entry("F32", [3], 0, 8)}, bytes(8), r"tensor 'a' has 8 bytes; shape \(3,\) of F32 takes 12"),
    "large": ({"a": entry("F32", [2**58], 0, 2**60)}, bytes(8), "cut short: tensor 'a' ends beyond the 8 bytes"),
    "cut short": ({"a": ONE}, bytes(7), "cut short: tensor 'a' ends beyond the 7 bytes"),
    "more than said": ({"a": ONE}, bytes(9), "1 bytes at its end belong to no tensor"),
    "overlap": ({"a": ONE, "b": entry("F32", [1], 4, 8)}, bytes(8), "tensors 'a' and 'b' overlap"),
    "the same bytes": ({"a": ONE, "b": ONE}, bytes(8), "tensors 'a' and 'b' overlap"),
    "gap": ({"a": ONE, "b": entry("F32", [1], 12, 16)}, bytes(16), "4 bytes before tensor 'b' belong to none"),
    "backwards": ({"a": entry("F32", [2], 8, 0)}, bytes(8), "no two positions in order"),
    "three offsets": ({"a": {**ONE, "data_offsets": [0, 8, 8]}}, bytes(8), "no two positions in order"),
    "metadata of numbers": ({"__metadata__": {"epoch": 1}, "a": ONE}, bytes(8), "__metadata__ in its header"),
    "half a character": (b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', b"", "library says"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_damaged_or_hostile_file_is_refused(tmp_path, case):
    header, data, message = REFUSED[case]
    if header is None:
        (tmp_path / "model.safetensors").write_bytes(data or b"")
    elif isinstance(data, int):
        put(tmp_path, header, length=data)
    else:
        put(tmp_path, header, data)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message) as refused:
            open_weights(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert f"{tmp_path / 'model.safetensors'} is refused: " in str(refused.value)


def test_a_header_beyond_the_limit_is_not_read(tmp_path):
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", (8 << 20) + 1))
        file.truncate(9 << 20)
    with pytest.raises(UserError, match="its header has 8388609 bytes, more than 8388608"):
        open_weights(tmp_path)
    with open(tmp_path / "model.safetensors.index.json", "wb") as file:
        file.truncate((8 << 20) + 1)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has 8,388,609 bytes; at most 8,388,608 are read"):
        open_weights(tmp_path)


def test_booleans_are_none_or_one(tmp_path):
    put(tmp_path, {"a": entry("BOOL", [2], 0, 2)}, b"\x01\x07")
    with open_weights(tmp_path) as weights, pytest.raises(UserError, match="neither 0 nor 1"):
        weights.read("a")


def test_a_file_cut_short_while_open_is_an_error(tmp_path):
    put(tmp_path, {"a": ONE}, bytes(8))
    with open_weights(tmp_path) as weights:
        os.truncate(tmp_path / "model.safetensors", 20)
        with pytest.raises(UserError, match="cut short after it was opened"):
            weights.read("a")


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="it is no file"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.safetensors.index.json")
    with pytest.raises(UserError, match=r"index.json: no such file"):
        open_weights(tmp_path)


def shards(directory, weight_map, **held):
    """An index, and shards that hold a float of each name."""
    text = weight_map if isinstance(weight_map, str) else json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(text)
    for shard, names in held.items():
        header = {name: entry("F32", [], 4 * i, 4 * i + 4) for i, name in enumerate(names)}
        put(directory, header, np.arange(len(names), dtype=np.float32).tobytes(), name=f"{shard}.safetensors")


def test_shards_may_lie_behind_links(tmp_path):
    """As in the caches of the Hugging Face hub."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    shards(tmp_path / "blobs", {"a": "one.safetensors", "b": "two.safetensors"}, one=["a"], two=["b"])
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{path.name}")
    with open_weights(tmp_path / "snapshot") as weights:
        assert weights.names() == ("a", "b") and weights.read("b") == 0


@pytest.mark.parametrize(
    "weight_map, message",
    [
        ({"a": "/etc/passwd"}, "names the file '/etc/passwd'; a shard is a file of the same directory"),
        ({"a": "../one.safetensors"}, "names the file '../one.safetensors'; a shard"),
        ({"a": ".."}, "names the file '..'; a shard"),
        ({"a": "below/one.safetensors"}, "names the file 'below/one.safetensors'; a shard"),
        ({"a": "below\\one.safetensors"}, "a shard is a file of the same directory"),
        ({"a": "one.safetensors\0"}, r"names the file 'one.safetensors\\x00'; a shard"),
        ({"a": ""}, "names the file ''; a shard"),
        ({"a": "three.safetensors"}, "names the file 'three.safetensors', which is not there"),
        ({"a": "one.safetensors"}, "'one.safetensors' holds the tensor 'b', and the index does not name it"),
        (
            {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"},
            "index.json places in 'two.safetensors' what is not there: 'b'|holds the tensor 'b', and the index places it in",
        ),
        (
            {"a": "one.safetensors", "b": "one.safetensors", "d": "two.safetensors"},
            "places in 'two.safetensors' .*: 'd'",
        ),
        ({"a": 1}, "has no weight_map"),
        ({}, "has no weight_map"),
        ("[]", "must hold a JSON object"),
        ('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "the key 'a' stands there twice"),
        ("{", "index.json: not JSON: "),
    ],
)
def test_an_index_that_misleads_is_refused(tmp_path, weight_map, message):
    (tmp_path / "below").mkdir()
    shards(tmp_path / "below", {}, one=["a"])
    shards(tmp_path, weight_map, one=["a", "b"], two=["c"])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    with pytest.raises(UserError, match=message) as refused:
        open_weights(tmp_path)
    assert "model.safetensors.index.json" in str(refused.value)
    assert before is None or len(os.listdir("/proc/self/fd")) == before
