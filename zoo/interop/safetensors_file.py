"""A safetensors file, read strictly, and written.

    8 bytes     N, the length of the header, little-endian
    N bytes     JSON: name → {"dtype", "shape", "data_offsets": [begin, end]}, and perhaps "__metadata__": text → text
    the rest    the tensors' bytes, little-endian, rows first

Everything is checked before a tensor is read, by the rules of the `safetensors` library and some that it does not have: it
takes the last of two tensors of one name, keys it does not know, booleans that are neither 0 nor 1, and maps the file, so that
one cut short while it is read ends the process. It is asked all the same when a file is opened: what it refuses is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from zoo.errors import UserError, shown, writing
from zoo.interop.json_files import parse_json
from zoo.interop.weight_file import LARGEST_HEADER, Stored, WeightFile

METADATA = "__metadata__"
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    **{f"{kind}{8 * size}": np.dtype(f"<{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_FIELDS = {"dtype", "shape", "data_offsets"}


class SafetensorsFile(WeightFile):
    """The tensors of one safetensors file.

    Refused, before anything is allocated for a tensor: a header that is longer than 8 MiB or than the file, is no JSON, or
    has a key twice; a dtype that NumPy and JAX do not share (complex numbers, and 8 bits or fewer to a float, which mean
    nothing without scales); offsets that overlap, leave a gap, do not fit the shape, or end elsewhere than the file.

    Raises:
      UserError: one of these, or the file cannot be read; says which file and what is wrong.
    """

    def _open(self) -> None:
        header, self._data = self._header()
        entries = [(*self._entry(name, entry), name) for name, entry in header.items() if name != METADATA]
        self._check_metadata(header.get(METADATA, {}))
        self._check_offsets(sorted((begin, end, name) for _, begin, end, name in entries))
        self.tensors = {name: stored for stored, _, _, name in entries}
        self._begins = {name: begin for _, begin, _, name in entries}
        try:
            with safetensors.safe_open(os.fspath(self.path), framework="numpy"):
                pass
        except (safetensors.SafetensorError, OSError) as error:
            self.refuse(f"the safetensors library says: {error}")

    def read(self, name: str) -> np.ndarray:
        shape, dtype = self.tensors[name]
        data = self.bytes_at(self._data + self._begins[name], self.tensors[name].nbytes)
        if dtype == np.bool_ and data.size and data.max() > 1:
            self.refuse(f"tensor {shown(name)} has booleans that are neither 0 nor 1")
        return data.view(dtype).reshape(shape)

    def _header(self) -> tuple[dict[str, Any], int]:
        """The JSON object, and where the data begin."""
        if self.size < 8:
            self.refuse(f"it has {self.size} bytes, and 8 say how long the header of a safetensors file is")
        length = int.from_bytes(self.bytes_at(0, 8).tobytes(), "little")
        if length > self.size - 8:
            self.refuse(
                f"its header would have {length} bytes and the file has {self.size}: cut short, or no safetensors"
            )
        if length > LARGEST_HEADER:
            self.refuse(f"its header has {length} bytes, more than {LARGEST_HEADER}")
        try:
            header = parse_json(self.bytes_at(8, length).tobytes())
        except ValueError as error:
            self.refuse(f"its header is wrong: {error}")
        if not isinstance(header, dict):
            self.refuse("its header is no JSON object")
        return header, 8 + length

    def _entry(self, name: str, entry: Any) -> tuple[Stored, int, int]:
        """What the header says of one tensor, and where its bytes begin and end behind the header."""
        if not isinstance(entry, dict) or set(entry) != _FIELDS:
            self.refuse(f"its header gives tensor {shown(name)} other fields than {', '.join(sorted(_FIELDS))}")
        code = entry["dtype"]
        if not isinstance(code, str) or code not in DTYPES:
            self.refuse(f"tensor {shown(name)} has the dtype {shown(code)}; read are {', '.join(DTYPES)}")
        stored = Stored(self.check_shape(name, entry["shape"], DTYPES[code]), DTYPES[code])
        match entry["data_offsets"]:
            case [int(begin), int(end)] if type(begin) is int and type(end) is int and 0 <= begin <= end:
                if end > self.size - self._data:
                    self.refuse(
                        f"it is cut short: tensor {shown(name)} ends beyond the {self.size - self._data} bytes of data"
                    )
                if end - begin != stored.nbytes:
                    self.refuse(
                        f"tensor {shown(name)} has {end - begin} bytes; shape {stored.shape} of {code} takes {stored.nbytes}"
                    )
                return stored, begin, end
        self.refuse(f"tensor {shown(name)} has data_offsets that are no two positions in order")

    def _check_metadata(self, metadata: Any) -> None:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            self.refuse(f"{METADATA} in its header maps something else than text to text")

    def _check_offsets(self, spans: list[tuple[int, int, str]]) -> None:
        """Each tensor begins where the one before it ends, and the last ends with the file."""
        reached, before = 0, None
        for begin, end, name in spans:
            if begin < reached:
                self.refuse(f"tensors {shown(before)} and {shown(name)} overlap")
            if begin > reached:
                self.refuse(f"{begin - reached} bytes before tensor {shown(name)} belong to none")
            reached, before = end, name
        if rest := self.size - self._data - reached:
            self.refuse(f"{rest} bytes at its end belong to no tensor")


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes `tensors` to `path`, durably, with the metadata that transformers asks for.

    In this order as in the library: larger elements first, so that each begins at a multiple of its size; then by name.

    Raises:
      UserError: a tensor of a dtype that the format or `SafetensorsFile` does not have.
      WriteFailed: it could not be written; what is there is not whole.
    """
    header: dict[str, Any] = {METADATA: {"format": "pt"}}
    reached = 0
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in names:
        array = tensors[name]
        end = reached + array.nbytes
        header[name] = {"dtype": code(name, array.dtype), "shape": list(array.shape), "data_offsets": [reached, end]}
        reached = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > LARGEST_HEADER:
        raise UserError(f"{path}: the header of {len(names)} tensors has {len(text)} bytes, more than {LARGEST_HEADER}")
    with writing(path), open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = np.asarray(tensors[name], tensors[name].dtype.newbyteorder("<"), order="C")
            file.write(memoryview(array.reshape(-1).view(np.uint8)))
        file.flush()
        os.fsync(file.fileno())


def code(name: str, dtype: np.dtype) -> str:
    """What the format calls `dtype`.

    Raises:
      UserError: it has no name for it, or `SafetensorsFile` does not read it.
    """
    found = _CODES.get(dtype.newbyteorder("<"))
    if found is None:
        raise UserError(
            f"tensor {shown(name)} is of {dtype}, which is not written; written are {', '.join(map(str, _CODES))}"
        )
    return found
