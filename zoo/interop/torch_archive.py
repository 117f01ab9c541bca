"""`pytorch_model.bin`, the zip archive that torch.save writes since torch 1.6, read without torch and without running its pickle.

NAME/data.pkl        a pickled dict of tensors, each a view of a storage (`zoo.interop.state_dict_pickle`)
NAME/data/KEY        the bytes of a storage, stored as they are
NAME/byteorder       "little"; missing before torch 2.1
others               versions and an id, which are not read
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from zoo.errors import UserError, shown
from zoo.interop.state_dict_pickle import Storage, Tensor, parse
from zoo.interop.weight_file import LARGEST_HEADER, Stored, WeightFile

_ZIP = b"PK\x03\x04"
_LOCAL = struct.Struct(
    "<4s22xHH"
)  # of a member: signature, what the archive's directory says better, lengths of name and extra
_PICKLE = b"\x80"
LATEST_VERSION = 10  # that torch 2.13 reads
_CHUNK = 1 << 20
# Bits of a member in the directory: encrypted, strongly encrypted, and bytes that patch those of another file.
_ENCRYPTED, _PATCH = 0x41, 0x20


class _Member(NamedTuple):
    begin: int
    size: int
    crc: int


class TorchArchive(WeightFile):
    """The tensors of one archive, non-contiguous and tied ones included.

    Refused: whatever `state_dict_pickle.parse` refuses; the bare pickle that torch wrote before 1.6 and TorchScript; an
    archive whose directory or pickle is longer than 8 MiB; a member that is compressed, encrypted, damaged, outside the
    archive's folder, or there twice; members with more bytes than the file; a storage of another size than the pickle says,
    or of two dtypes; a tensor that reaches beyond its storage, or has more elements than it (`expand`), so that no array is
    larger than the file.

    Raises:
      UserError: one of these, or the file cannot be read; says which file and what is wrong.
    """

    def _open(self) -> None:
        start = self.bytes_at(0, min(self.size, len(_ZIP))).tobytes()
        if start.startswith(_PICKLE):
            self.refuse(
                "it is a bare pickle, as torch wrote before 1.6; load it with torch.load(..., weights_only=True) and save "
                "it again, with a torch of today or as safetensors"
            )
        if start != _ZIP:
            self.refuse("it is no archive of torch.save")
        self._members = self._directory()
        self._whole: set[str] = set()
        self._check_byte_order()
        self._check_version()
        pickled = self._contents("data.pkl")
        try:
            self._views = parse(pickled)
        except ValueError as error:
            self.refuse(str(error))
        self._check_storages()
        self.tensors = {name: self._checked(name, view) for name, view in self._views.items()}

    def read(self, name: str) -> np.ndarray:
        stored, view = self.tensors[name], self._views[name]
        member = self._member(view)
        self._check_content(f"data/{view.storage.key}")
        if stored.nbytes == 0:
            return np.empty(stored.shape, stored.dtype)
        step = stored.dtype.itemsize
        data = self.bytes_at(member.begin + view.offset * step, (_reach(view) + 1) * step)
        if stored.dtype == np.bool_ and data.max() > 1:
            self.refuse(f"tensor {shown(name)} has booleans that are neither 0 nor 1")
        # The stride of an axis of length 1 is never used, and may be larger than any in NumPy.
        strides = [step * stride if size > 1 else 0 for size, stride in zip(view.shape, view.strides, strict=True)]
        return np.asarray(np.lib.stride_tricks.as_strided(data.view(stored.dtype), stored.shape, strides), order="C")

    def _directory(self) -> dict[str, _Member]:
        """The archive's members by their names within its folder."""
        try:
            listed = zipfile.ZipFile(_Bounded(self)).infolist()
        except UserError:
            raise
        except (zipfile.BadZipFile, NotImplementedError, OSError, OverflowError, ValueError, struct.error) as error:
            self.refuse(f"it is cut short, or no zip archive: {error}")
        names = [info.orig_filename for info in listed]
        folders = [name.removesuffix("/data.pkl") for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(folders) != 1:
            self.refuse("it is no archive of torch.save: it has no data.pkl in one folder")
        members: dict[str, _Member] = {}
        for info, name in zip(listed, names, strict=True):
            folder, _, inner = name.partition("/")
            if (
                not re.fullmatch("[ -~]+", name)
                or "\\" in name
                or folder != folders[0]
                or {"", "..", "."} & set(inner.split("/"))
            ):
                self.refuse(f"its member {shown(name)} is no file in the folder {shown(folders[0])}")
            if inner in members:
                self.refuse(f"its member {shown(name)} is there twice")
            if inner == "constants.pkl" or inner.startswith("code/"):
                self.refuse("it is TorchScript, a program; save the state dict of the model")
            members[inner] = self._located(info, name)
        if (total := sum(member.size for member in members.values())) > self.size:
            self.refuse(f"its members have {total} bytes together, and the file has {self.size}")
        return members

    def _located(self, info: zipfile.ZipInfo, name: str) -> _Member:
        """Where a member's bytes are, by the header before them, which must be that of this member."""
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            self.refuse(f"its member {shown(name)} is compressed; torch.save stores the bytes as they are")
        if info.flag_bits & _ENCRYPTED:
            self.refuse(f"its member {shown(name)} is encrypted")
        if info.flag_bits & _PATCH:
            self.refuse(f"its member {shown(name)} is a patch to another file")
        signature, name_length, extra_length = _LOCAL.unpack(self.bytes_at(info.header_offset, _LOCAL.size).tobytes())
        begin = info.header_offset + _LOCAL.size
        if signature != _ZIP or self.bytes_at(begin, name_length).tobytes() != name.encode("ascii"):
            self.refuse(f"it is damaged: its member {shown(name)} is not where the archive's directory says")
        begin += name_length + extra_length
        if begin + info.file_size > self.size:
            self.refuse(f"it is cut short: its member {shown(name)} ends beyond the file")
        return _Member(begin, info.file_size, info.CRC)

    def _contents(self, inner: str) -> bytes:
        member = self._members[inner]
        if member.size > LARGEST_HEADER:
            self.refuse(f"its {inner} has {member.size} bytes, more than {LARGEST_HEADER}")
        self._check_content(inner)
        return self.bytes_at(member.begin, member.size).tobytes()

    def _check_content(self, inner: str) -> None:
        """Compares a member with its checksum, once: many tensors may be views of one storage."""
        if inner in self._whole:
            return
        member, crc = self._members[inner], 0
        for begin in range(member.begin, member.begin + member.size, _CHUNK):
            crc = zlib.crc32(self.bytes_at(begin, min(_CHUNK, member.begin + member.size - begin)), crc)
        if crc != member.crc:
            self.refuse(f"it is damaged: {inner} does not have its checksum")
        self._whole.add(inner)

    def _check_byte_order(self) -> None:
        if "byteorder" in self._members and (order := self._contents("byteorder")) != b"little":
            self.refuse(f"its byte order is {shown(order.decode('latin-1'))}; little is read")

    def _check_version(self) -> None:
        version = self._contents("version") if "version" in self._members else b""
        if not re.fullmatch(rb"[0-9]{1,3}\n?", version) or not 1 <= int(version) <= LATEST_VERSION:
            self.refuse(f"its version is {shown(version[:20].decode('latin-1'))}; 1 to {LATEST_VERSION} are read")

    def _member(self, view: Tensor) -> _Member:
        return self._members[f"data/{view.storage.key}"]

    def _check_storages(self) -> None:
        """One dtype each: torch gives all views of a storage the first that it meets, and saves none of two."""
        storages: dict[str, Storage] = {}
        for name, view in self._views.items():
            if storages.setdefault(view.storage.key, view.storage) != view.storage:
                self.refuse(
                    f"tensor {shown(name)} gives its storage data/{view.storage.key} another dtype than one before it"
                )

    def _checked(self, name: str, view: Tensor) -> Stored:
        """What the pickle says of a tensor, where the archive has it."""
        storage = view.storage
        inner = f"data/{storage.key}"
        if inner not in self._members:
            self.refuse(f"tensor {shown(name)} is in the storage {inner}, which is not there")
        size = storage.length * (1 if storage.dtype is None else storage.dtype.itemsize)
        if self._member(view).size != size:
            self.refuse(f"its storage {inner} has {self._member(view).size} bytes, and the pickle says {size}")
        shape = self.check_shape(name, view.shape, view.dtype)
        if len(view.strides) != len(shape) or view.offset < 0 or any(stride < 0 for stride in view.strides):
            self.refuse(f"tensor {shown(name)} has strides or an offset that no tensor has")
        stored = Stored(shape, view.dtype)
        if stored.nbytes > 0 and (view.offset + _reach(view) + 1) * view.dtype.itemsize > size:
            self.refuse(f"tensor {shown(name)} reaches beyond the {size} bytes of its storage {inner}")
        if stored.nbytes > size:
            self.refuse(
                f"tensor {shown(name)} has {math.prod(shape)} elements, more than its storage {inner}: an expanded tensor; "
                "save its .contiguous()"
            )
        return stored


def _reach(view: Tensor) -> int:
    """How many elements behind its first a tensor's last is in the storage."""
    return sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))


class _Bounded:
    """What `zipfile` reads the directory of an archive through: no more at once than a header may have."""

    def __init__(self, file: WeightFile):
        self._file = file
        self._position = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        position = (0, self._position, self._file.size)[whence] + offset
        if position < 0:
            raise OSError("a position before the beginning")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def read(self, count: int = -1) -> bytes:
        there = max(self._file.size - self._position, 0)
        count = there if count < 0 else min(count, there)
        if count > LARGEST_HEADER:
            self._file.refuse(f"the archive's directory has {count} bytes, more than {LARGEST_HEADER}")
        data = self._file.bytes_at(self._position, count).tobytes()
        self._position += count
        return data
