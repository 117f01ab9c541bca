"""One file of weights: what every reader offers, and what each of them checks before it takes memory."""

from __future__ import annotations

import abc
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from zoo.errors import UserError, shown

# Python's own values are larger than the text or opcodes they are read from; this bounds both. BERT-large has 50 kB.
LARGEST_HEADER = 8 << 20
MOST_DIMENSIONS = 32
_POINTER = b"version https://git-lfs"


class Stored(NamedTuple):
    """What a file says of one tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFile(abc.ABC):
    """Tensors by name in one file, which stays open until `close`; only a header is held in memory.

    Attributes:
      path: the file.
      size: its bytes when it was opened.
      tensors: what it says of each of its tensors, in its own order.
    """

    tensors: Mapping[str, Stored]

    def __init__(self, path: Path):
        self.path = path
        try:
            # A pipe would wait for its writer; a folder or a device has no size.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{path} could not be read: {error.strerror}") from error
        try:
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                self.refuse("it is no file")
            self.size = status.st_size
            if self.size == 0:
                self.refuse("it is empty")
            if self.bytes_at(0, min(self.size, len(_POINTER))).tobytes() == _POINTER:
                self.refuse("it is a pointer of Git LFS in place of the weights; fetch them with `git lfs pull`")
            self._open()
        except BaseException:
            self.close()
            raise

    @abc.abstractmethod
    def _open(self) -> None:
        """Sets `tensors` from the header, or refuses."""

    @abc.abstractmethod
    def read(self, name: str) -> np.ndarray:
        """One of `tensors` as an array of its own."""

    def close(self) -> None:
        """Closes the file; a second time it does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def refuse(self, why: str) -> NoReturn:
        """Raises the UserError that names this file."""
        raise UserError(f"{self.path} is refused: {why}")

    def bytes_at(self, offset: int, count: int) -> np.ndarray:
        """uint8 [count] from `offset` on. Read and not mapped: a mapped file that somebody cuts short ends the process."""
        if self._descriptor < 0:
            raise ValueError(f"{self.path} is closed")
        if offset < 0 or count < 0 or offset + count > self.size:
            self.refuse(f"{count} bytes at {offset} are asked for, and it has {self.size}")
        data = np.empty(count, np.uint8)
        view, done = memoryview(data), 0
        while done < count:
            try:
                read = os.preadv(self._descriptor, [view[done : done + (1 << 30)]], offset + done)
            except OSError as error:
                raise UserError(f"{self.path} could not be read: {error.strerror}") from error
            if read == 0:
                self.refuse(f"it was cut short after it was opened: it had {self.size} bytes")
            done += read
        return data

    def check_shape(self, name: str, shape: Any, dtype: np.dtype) -> tuple[int, ...]:
        """`shape` as a tuple, where it is one that an array of `dtype` can have."""
        if (
            not isinstance(shape, list | tuple)
            or len(shape) > MOST_DIMENSIONS
            or any(type(size) is not int or size < 0 for size in shape)
            # An axis of length 0 makes the array small and its strides no smaller.
            or math.prod(size or 1 for size in shape) * dtype.itemsize >= 1 << 63
        ):
            self.refuse(f"tensor {shown(name)} has a shape that no array has")
        return tuple(shape)
