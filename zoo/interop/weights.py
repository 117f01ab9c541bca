"""A directory of weights in the Hugging Face layout: one file or shards with an index, read one tensor at a time, and written.

Nothing in such a directory is code to us, and nothing is believed: sizes are checked before memory is taken, an index names
files of its own directory alone, and a pickle is read as data (`zoo.interop.torch_archive`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from zoo.atomic import sync_directory, write_atomically
from zoo.errors import UserError, shown, writing
from zoo.interop.json_files import read_json
from zoo.interop.safetensors_file import METADATA, SafetensorsFile, code, write_safetensors
from zoo.interop.torch_archive import TorchArchive
from zoo.interop.weight_file import Stored, WeightFile

SAFETENSORS = "model.safetensors"
INDEX = ".index.json"
SHARDS = "model-*-of-*.safetensors"
PARTS = ".model*.part"
# In the order in which they are looked for, each followed by the index of its shards.
READERS: dict[str, Callable[[Path], WeightFile]] = {SAFETENSORS: SafetensorsFile, "pytorch_model.bin": TorchArchive}
LOOKED_FOR = tuple(name for file in READERS for name in (file, file + INDEX))
MAX_SHARD_BYTES = 5 * 10**9


class Weights:
    """The tensors of a directory by name, in one file or several; use it as a context manager, or `close` it.

    Only names, shapes and dtypes are in memory. Tied tensors may share their bytes on disk: each is read as its own array.

    Attributes:
      directory: where they are.
    """

    def __init__(self, directory: Path, files: Sequence[WeightFile]):
        self.directory = directory
        self._files = tuple(files)
        self._file_of = {name: file for file in files for name in file.tensors}

    def names(self) -> tuple[str, ...]:
        """All names, file after file in their order there."""
        return tuple(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored(name).shape

    def dtype(self, name: str) -> np.dtype:
        """NumPy's, or `ml_dtypes.bfloat16`."""
        return self._stored(name).dtype

    def read(self, name: str) -> np.ndarray:
        """The tensor as a contiguous, writable array that shares its memory with no other.

        Raises:
          UserError: no tensor has this name, or the file is damaged or was changed meanwhile.
        """
        self._stored(name)
        return self._file_of[name].read(name)

    @property
    def nbytes(self) -> int:
        """Of all tensors, as if none shared its bytes with another."""
        return sum(stored.nbytes for file in self._files for stored in file.tensors.values())

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stored(self, name: str) -> Stored:
        if name not in self._file_of:
            raise UserError(f"{self.directory} has no tensor {shown(name)} among its {len(self)}")
        return self._file_of[name].tensors[name]


def open_weights(directory: Path) -> Weights:
    """The weights of a Hugging Face directory.

    Looked for, in this order: `model.safetensors`, `model.safetensors.index.json` with its shards, `pytorch_model.bin`,
    `pytorch_model.bin.index.json` with its shards. All headers are read and checked now, and no tensor.

    Raises:
      UserError: none of these is there; a file is refused by its reader; the index is larger than 8 MiB, no JSON, or has a
        key twice; it names a file outside the directory, or one that is missing; a shard lacks a tensor that the index
        places in it, or holds one that it does not.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory; weights are read from one that holds {' or '.join(LOOKED_FOR)}")
    for name, reader in READERS.items():
        if (directory / name).exists():
            return Weights(directory, [reader(directory / name)])
        if (directory / (name + INDEX)).exists():
            return Weights(directory, _open_shards(directory / (name + INDEX), reader))
    there = sorted(path.name for path in directory.iterdir())
    listed = ", ".join(map(shown, there[:20])) + (f" and {len(there) - 20} more" if len(there) > 20 else "")
    raise UserError(f"{directory} holds no weights: looked for {', '.join(LOOKED_FOR)}; there is {listed or 'nothing'}")


def _open_shards(index: Path, reader: Callable[[Path], WeightFile]) -> list[WeightFile]:
    weight_map = _weight_map(index)
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        shards.setdefault(shard, set()).add(tensor)
    for shard in shards:
        _check_shard_name(index, shard)
    with contextlib.ExitStack() as opened:
        files = []
        for shard, placed in shards.items():
            files.append(file := reader(index.parent / shard))
            opened.callback(file.close)
            if missing := placed - file.tensors.keys():
                raise UserError(f"{index} places in {shown(shard)} what is not there: {_listed(missing)}")
            for tensor in file.tensors.keys() - placed:
                said = f"places it in {shown(weight_map[tensor])}" if tensor in weight_map else "does not name it"
                raise UserError(f"{index}: {shown(shard)} holds the tensor {shown(tensor)}, and the index {said}")
        opened.pop_all()
    return files


def _weight_map(index: Path) -> dict[str, str]:
    value = read_json(index, dict)
    match value:
        case {"weight_map": dict(found)} if found and all(isinstance(shard, str) for shard in found.values()):
            return found
    raise UserError(f"{index} has no weight_map from the names of tensors to those of files")


def _check_shard_name(index: Path, shard: str) -> None:
    """A file beside the index, by a plain name: that name is somebody else's text, and must lead nowhere else."""
    if not re.fullmatch(r"[\w-][\w.+ -]*", shard):
        raise UserError(
            f"{index} names the file {shown(shard)}; a shard is a file of the same directory, by its plain name"
        )
    if not (index.parent / shard).is_file():
        raise UserError(f"{index} names the file {shown(shard)}, which is not there")


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(map(shown, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def write_weights(
    directory: Path,
    tensors: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes `model.safetensors`, or shards and `model.safetensors.index.json`, as transformers reads them.

    Of an iterable no more than one shard is held in memory. A tensor larger than `max_shard_bytes` has a shard of its own.
    Files have other names until all are whole, and the index comes last: a failed or killed write leaves nothing that
    `open_weights` takes for weights.

    Raises:
      UserError: `directory` is none, or holds weights already; there are no tensors; a name comes twice or is none that the
        format takes; a dtype that it does not have.
      WriteFailed: a file could not be written.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory; make it before weights are written to it")
    if there := sorted(path.name for pattern in (*LOOKED_FOR, SHARDS) for path in directory.glob(pattern)):
        raise UserError(f"{directory} holds weights already ({_listed(there)}); remove them, or name another directory")
    with _nothing_left(directory):
        parts = []
        for shard in _shards(tensors, max_shard_bytes):
            part = directory / f".model-{len(parts) + 1:05d}.safetensors.part"
            write_safetensors(part, shard)
            parts.append((part, list(shard), sum(array.nbytes for array in shard.values())))
        if not parts:
            raise UserError(f"there are no tensors to write to {directory}")
        _name(directory, parts)


@contextlib.contextmanager
def _nothing_left(directory: Path) -> Iterator[None]:
    """Removes what an earlier, killed write has left unfinished, and all that the `with` block has written if it fails."""

    def remove(*patterns: str) -> None:
        for path in itertools.chain.from_iterable(map(directory.glob, patterns)):
            path.unlink()

    with writing(directory):
        remove(PARTS)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            remove(PARTS, SHARDS, SAFETENSORS)
        raise


def _shards(
    tensors: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]], max_shard_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    seen: set[str] = set()
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if name in seen or name == METADATA:
            raise UserError(
                f"tensor {shown(name)} " + ("comes twice" if name in seen else "has a name of the format's own")
            )
        seen.add(name)
        code(name, array.dtype)
        if shard and size + array.nbytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    if shard:
        yield shard


def _name(directory: Path, parts: list[tuple[Path, list[str], int]]) -> None:
    """Gives complete files their names: one is `model.safetensors`, several are shards, followed by their index."""
    if len(parts) == 1:
        _rename(parts[0][0], directory / SAFETENSORS)
        return
    weight_map: dict[str, str] = {}
    for number, (part, names, _) in enumerate(parts, start=1):
        shard = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        _rename(part, directory / shard)
        weight_map.update(dict.fromkeys(names, shard))
    index = {
        "metadata": {"total_size": sum(size for _, _, size in parts)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_atomically(directory / (SAFETENSORS + INDEX), (json.dumps(index, indent=2) + "\n").encode("utf-8"))


def _rename(part: Path, path: Path) -> None:
    with writing(path):
        os.replace(part, path)
        sync_directory(path.parent)
