"""The pickle in an archive of torch.save, read as data: tensors by name, and nothing is ever called.

`pickletools.genops` takes a pickle apart without running it. What a state dict of tensors needs is understood here, by a stack
machine of two dozen opcodes; a global is a name in a table, and to "call" one is to check its arguments and note what they say.

Refused by name: every other opcode and global (`posix.system`, `builtins.eval`, NumPy's scalars, whole modules), protocols
other than 2, attributes but the `_metadata` of an OrderedDict, numbers of more than 64 bits, more than 300,000 opcodes. A
value lives in a list, so depth costs no recursion; only text and integers are keys, since the hash of a tuple recurses.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from zoo.errors import shown

MOST_OPCODES = 300_000  # a tensor takes about thirty; each makes at most an empty dict, so that all take 30 MB at most
_T = TypeVar("_T")


@dataclass(frozen=True)
class Storage:
    """A run of bytes in the archive: the member `data/<key>`, of `length` elements, or bytes where `dtype` is None."""

    key: str
    dtype: np.dtype | None
    length: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage, its offset and strides in elements; as the pickle says it, that is unchecked but for types."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Global:
    """A name that the pickle asks for; it stays a name."""

    name: str


STORAGES: dict[str, np.dtype | None] = {
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("<i1"),
    "torch.ByteStorage": np.dtype("<u1"),
    "torch.BoolStorage": np.dtype(np.bool_),
    "torch.storage.UntypedStorage": None,
}
# Of tensors on an UntypedStorage, which have no storage type of their own.
DTYPES = {f"torch.uint{8 * size}": np.dtype(f"<u{size}") for size in (2, 4, 8)}


def parse(data: bytes) -> dict[str, Tensor]:
    """The tensors that a pickled state dict names, in its order.

    Raises:
      ValueError: it is no pickle, asks for what a state dict does not need, or is something else than a dict of tensors by
        name; the message says what.
    """
    machine = _Machine()
    for position, opcode, argument in _opcodes(data):
        try:
            machine.step(opcode, argument)
        except ValueError as error:
            raise ValueError(f"its pickle is refused at byte {position}: {error}") from None
    return _state_dict(machine.result())


def _opcodes(data: bytes) -> Iterator[tuple[int, str, Any]]:
    """(position, opcode, argument); whether an opcode is known is asked before its argument is taken apart."""
    stream = io.BytesIO(data)
    opcodes = pickletools.genops(stream)
    for count in range(MOST_OPCODES):
        position = stream.tell()
        name = _NAMES.get(data[position : position + 1])
        if name is not None and name not in _KNOWN:
            raise ValueError(
                f"its pickle is refused at byte {position}: the opcode {name}, which a state dict of tensors does not need"
            )
        # genops decodes escapes in a global's name, which Python's unpickler does not.
        if name == "GLOBAL" and b"\\" in data[position : data.find(b"\n", data.find(b"\n", position) + 1)]:
            raise ValueError(f"its pickle is refused at byte {position}: a global with a backslash in its name")
        try:
            _, argument, _ = next(opcodes)
        except ValueError as error:
            raise ValueError(f"its pickle is damaged: {str(error)[:200]}") from error
        if name == "PROTO" and (count > 0 or argument != 2):
            raise ValueError(f"its pickle is of protocol {argument}; torch.save writes 2")
        yield position, name, argument
        if name == "STOP":
            if rest := len(data) - stream.tell():
                raise ValueError(f"{rest} bytes follow the end of its pickle")
            return
    raise ValueError(f"its pickle has more than {MOST_OPCODES} opcodes")


class _Machine:
    """The stack, the stacks below its marks, and the memo."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any) -> None:
        """Does what the opcode says, or raises ValueError."""
        if opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode])
        elif opcode in _ARGUMENTS:
            if type(argument) is int and not -(1 << 63) <= argument < 1 << 63:
                raise ValueError("a number of more than 64 bits")
            self._stack.append(argument)
        else:
            _STEPS[opcode](self, argument)

    def result(self) -> Any:
        """What is left when the pickle ends."""
        if len(self._stack) != 1 or self._below:
            raise ValueError("its pickle does not end with one value")
        return self._stack[0]

    def _pop(self, kind: type[_T] | None = None) -> _T | Any:
        if not self._stack:
            raise ValueError("an opcode takes a value where there is none")
        value = self._stack.pop()
        if kind is not None and not isinstance(value, kind):
            raise ValueError(f"{_what(value)} in place of {_named(kind)}")
        return value

    def _top(self, kind: type[_T]) -> _T:
        value = self._pop(kind)
        self._stack.append(value)
        return value

    def _mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        if not self._below:
            raise ValueError("an opcode looks for a mark where there is none")
        values, self._stack = self._stack, self._below.pop()
        return values

    def _tuple(self, _: Any) -> None:
        values = self._since_mark()
        self._stack.append(tuple(values))

    def _tuple_of(self, length: int) -> None:
        values = [self._pop() for _ in range(length)]
        self._stack.append(tuple(reversed(values)))

    def _set_items(self, _: Any) -> None:
        values = self._since_mark()
        into = self._top(dict)
        if len(values) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int):
                raise ValueError(f"{_what(key)} as a key")
            if key in into:
                raise ValueError(f"the key {shown(key)} twice")
            into[key] = value

    def _set_item(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._below.append(self._stack)
        self._stack = [key, value]
        self._set_items(None)

    def _append(self, _: Any) -> None:
        value = self._pop()
        self._top(list).append(value)

    def _append_all(self, _: Any) -> None:
        values = self._since_mark()
        self._top(list).extend(values)

    def _put(self, index: int) -> None:
        value = self._pop()
        self._stack.append(value)
        self._memo[index] = value

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise ValueError(f"the memo has no entry {index}")
        self._stack.append(self._memo[index])

    def _global(self, argument: str) -> None:
        name = argument.replace(" ", ".", 1)  # genops joins module and name so
        if name not in STORAGES and name not in DTYPES and name not in _CALLS:
            raise ValueError(
                f"the global {shown(name)}, which a state dict of tensors does not need; nothing of it was run"
            )
        self._stack.append(Global(name))

    def _persistent(self, _: Any) -> None:
        match self._pop(tuple):
            case ("storage", Global(kind), str(key), str(), int(length)) if (
                kind in STORAGES and re.fullmatch("[0-9]{1,20}", key) and type(length) is int and length >= 0
            ):
                self._stack.append(Storage(key, STORAGES[kind], length))
            case _:
                raise ValueError("a persistent id that is no storage of tensors")

    def _reduce(self, _: Any) -> None:
        arguments = self._pop(tuple)
        name = self._pop(Global).name
        if name not in _CALLS:
            raise ValueError(f"a call of {name}")
        value = _CALLS[name](arguments)
        if value is None:
            raise ValueError(f"a call of {name} with other arguments than torch.save writes")
        self._stack.append(value)

    def _build(self, _: Any) -> None:
        """The attributes of a value: of an OrderedDict torch saves `_metadata`, the versions of its modules. It is dropped."""
        state = self._pop(dict)
        self._top(OrderedDict)
        if set(state) != {"_metadata"} or not isinstance(state["_metadata"], dict):
            raise ValueError("BUILD, which sets attributes, with something else than _metadata")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_ARGUMENTS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, _: None,
    "STOP": lambda machine, _: None,
    "EMPTY_DICT": lambda machine, _: machine._stack.append({}),
    "EMPTY_LIST": lambda machine, _: machine._stack.append([]),
    "MARK": _Machine._mark,
    "TUPLE": _Machine._tuple,
    "TUPLE1": lambda machine, _: machine._tuple_of(1),
    "TUPLE2": lambda machine, _: machine._tuple_of(2),
    "TUPLE3": lambda machine, _: machine._tuple_of(3),
    "SETITEM": _Machine._set_item,
    "SETITEMS": _Machine._set_items,
    "APPEND": _Machine._append,
    "APPENDS": _Machine._append_all,
    "BINPUT": _Machine._put,
    "LONG_BINPUT": _Machine._put,
    "BINGET": _Machine._get,
    "LONG_BINGET": _Machine._get,
    "GLOBAL": _Machine._global,
    "BINPERSID": _Machine._persistent,
    "REDUCE": _Machine._reduce,
    "BUILD": _Machine._build,
}
_KNOWN = {*_CONSTANTS, *_ARGUMENTS, *_STEPS}
_NAMES = {opcode.code.encode("latin-1"): opcode.name for opcode in pickletools.opcodes}


def _ordered_dict(arguments: tuple[Any, ...]) -> OrderedDict[Any, Any] | None:
    return OrderedDict() if len(arguments) == 0 else None


def _tensor(arguments: tuple[Any, ...]) -> Tensor | None:
    """(storage, offset, shape, strides, requires_grad, hooks[, metadata]); none of the last three changes a value unless
    the metadata says that the tensor is conjugate or negated."""
    match arguments:
        case (Storage() as storage, offset, shape, strides, bool(), hooks, *metadata) if (
            storage.dtype is not None and _is_empty(hooks) and len(metadata) < 2 and all(map(_is_empty, metadata))
        ):
            return _view(storage, storage.dtype, offset, shape, strides)
    return None


def _tensor_of_dtype(arguments: tuple[Any, ...]) -> Tensor | None:
    """(storage, offset, shape, strides, requires_grad, hooks, dtype[, metadata]), on an UntypedStorage."""
    match arguments:
        case (Storage(dtype=None) as storage, offset, shape, strides, bool(), hooks, Global(name), *metadata) if (
            name in DTYPES and _is_empty(hooks) and len(metadata) < 2 and all(map(_is_empty, metadata))
        ):
            return _view(storage, DTYPES[name], offset, shape, strides)
    return None


def _parameter(arguments: tuple[Any, ...]) -> Tensor | None:
    """(tensor, requires_grad, hooks)."""
    match arguments:
        case (Tensor() as tensor, bool(), hooks) if _is_empty(hooks):
            return tensor
    return None


_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
}


def _view(storage: Storage, dtype: np.dtype, offset: Any, shape: Any, strides: Any) -> Tensor | None:
    if type(offset) is not int or not _is_integers(shape) or not _is_integers(strides):
        return None
    return Tensor(storage, dtype, offset, shape, strides)


def _is_integers(value: Any) -> bool:
    return type(value) is tuple and all(type(size) is int for size in value)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and not value)


def _state_dict(value: Any) -> dict[str, Tensor]:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"it holds {_what(value)}; a state dict, which maps names to tensors, is read")
    for key, entry in value.items():
        if isinstance(entry, dict) and any(type(inner) is Tensor for inner in entry.values()):
            raise ValueError(
                f"its tensors are nested under the key {shown(key)}; save what is there as a state dict of its own"
            )
    for key, entry in value.items():
        if type(key) is not str or type(entry) is not Tensor:
            raise ValueError(
                f"it maps {shown(key)} to {_what(entry)}; a state dict maps names to tensors and nothing else"
            )
    return value


def _what(value: Any) -> str:
    """A value in words; a value itself may be nested too deep to be shown."""
    if value is None:
        return "None"
    if type(value) is Global:
        return f"the global {value.name}"
    return _named(type(value)) + (f" of {len(value)}" if isinstance(value, dict | list | tuple) else "")


def _named(kind: type) -> str:
    name = kind.__name__ if kind is OrderedDict else kind.__name__.lower()
    return f"{'an' if name[0] in 'aeiouO' else 'a'} {name}"
