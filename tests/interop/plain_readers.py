"""Both formats read the plain way, to be compared with: by the safetensors library, and by Python's own unpickler with stand-ins.

Only for files that are ours, or that our readers have taken: the stand-ins let no other global in, but nothing is bounded.
"""

from __future__ import annotations

import collections
import io
import json
import pickle
import zipfile
from pathlib import Path

import ml_dtypes  # noqa: F401  gives NumPy the name bfloat16
import numpy as np
import safetensors.numpy

TYPES = {"Float": "f4", "Double": "f8", "Half": "f2", "BFloat16": "bfloat16", "Long": "i8", "Int": "i4", "Short": "i2"}
TYPES |= {"Char": "i1", "Byte": "u1", "Bool": "?"}


def safetensors_file(path: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(path)


def shards(path: Path) -> dict[str, np.ndarray]:
    """Every tensor from the file that the index names for it."""
    placed = json.loads(path.read_text())["weight_map"]
    return {name: safetensors_file(path.parent / shard)[name] for name, shard in placed.items()}


def torch_archive(path: Path) -> dict[str, np.ndarray]:
    """Element by element."""
    with zipfile.ZipFile(path) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        return _Unpickler(lambda inner: archive.read(names[inner])).load()


class _Unpickler(pickle._Unpickler):  # that of C takes memory for the largest index of the memo
    def __init__(self, member):
        super().__init__(io.BytesIO(member("data.pkl")))
        self._member = member

    def find_class(self, module, name):
        known = {
            "collections.OrderedDict": collections.OrderedDict,
            "torch._utils._rebuild_tensor_v2": lambda on, offset, shape, strides, *_: _tensor(
                *on, offset, shape, strides
            ),
            "torch._utils._rebuild_tensor_v3": lambda on, offset, shape, strides, gradient, hooks, dtype, *_: _tensor(
                on[0], dtype, offset, shape, strides
            ),
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch.storage.UntypedStorage": np.dtype("u1"),
            **{f"torch.uint{8 * size}": np.dtype(f"u{size}") for size in (2, 4, 8)},
            **{f"torch.{kind}Storage": np.dtype(dtype) for kind, dtype in TYPES.items()},
        }
        return known[f"{module}.{name}"]

    def persistent_load(self, pid):
        word, dtype, key, _, length = pid
        data = self._member(f"data/{key}")
        assert word == "storage" and len(data) == length * dtype.itemsize
        return data, dtype


def _tensor(data, dtype, offset, shape, strides):
    flat = np.frombuffer(data, dtype)
    result = np.empty(shape, dtype)
    for index in np.ndindex(*shape) if result.size else ():  # which takes memory for an empty array of a huge side
        result[index] = flat[offset + sum(i * s for i, s in zip(index, strides, strict=True))]
    return result
