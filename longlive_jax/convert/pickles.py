"""Pickles of PyTorch files, read through before PyTorch does: what they name and what they claim.

`torch.load(weights_only=True)` runs no code, yet takes memory by what a file claims before it looks
at what the file has. Here the operations of a pickle are gone through without making a tensor: only
those that state dicts are made of are known, storages are held against the bytes that are there,
and tensors against their storages.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import os
import pathlib
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from longlive_jax.errors import InputError

LARGEST = 32 << 20  # bytes of a pickle: a hundred thousand tensors take 20 MB
MOST = 4_000_000  # operations
MOST_AXES = 16
MOST_BITS = 128  # of a number; that in front of old files has 77

_ITEMSIZE = {
    **dict.fromkeys(("Double", "Long"), 8),
    **dict.fromkeys(("Float", "Int"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Char", "Byte", "Bool"), 1),
}
STORAGES = {f"torch.{name}Storage": size for name, size in _ITEMSIZE.items()}
STORAGES |= {f"torch.cuda.{name}Storage": size for name, size in _ITEMSIZE.items()}
STORAGES["torch.storage.UntypedStorage"] = 1
_DTYPES = {
    **dict.fromkeys(("float64", "int64", "uint64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("uint8", "int8", "bool", "float4_e2m1fn_x2"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"), 1),
}
_PLAIN = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.device", "torch.Size")
_REBUILD = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_REBUILD_TYPED = "torch._utils._rebuild_tensor_v3"
_AS_IT_IS = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
)
_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"


@dataclasses.dataclass(frozen=True)
class _Name:
    """A class or function that a pickle names. It is never looked up."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    nbytes: int
    itemsize: int


@dataclasses.dataclass(frozen=True)
class _Opaque:
    """The result of a call that does not matter here."""


Claim = Callable[[str, int], None]  # key of a storage, its bytes


def check(path: pathlib.Path) -> None:
    """Goes through the pickles of a `.pt` file without making anything of them.

    Raises:
      InputError: it claims more than the file has, or its parts are compressed.
      pickle.UnpicklingError: it is broken, or names what state dicts do not hold ("GLOBAL name").
    """
    with path.open("rb") as file:
        if file.read(4) == b"PK\x03\x04":
            _check_zip(path, file)
        else:
            file.seek(0)
            _check_legacy(path, file)


def _check_zip(path: pathlib.Path, file: BinaryIO) -> None:
    size = os.fstat(file.fileno()).st_size
    try:
        with zipfile.ZipFile(file) as archive:
            parts = {part.filename: part for part in archive.infolist()}
            for part in parts.values():
                if part.compress_type != zipfile.ZIP_STORED:
                    raise InputError(f'"{path}" is compressed, which PyTorch cannot map: unpack it')
                if part.file_size != part.compress_size or part.file_size > size:
                    raise InputError(f'"{path}" is cut short: {part.filename} is not all there')
            pickles = [name for name in parts if name.split("/", 1)[-1] == "data.pkl"]
            if len(pickles) != 1:
                raise pickle.UnpicklingError("no pickle, or several")
            root = pickles[0].removesuffix("data.pkl")
            if f"{root}constants.pkl" in parts:
                raise pickle.UnpicklingError("TorchScript")
            if parts[pickles[0]].file_size > LARGEST:
                raise _too_large(path)
            data = archive.read(pickles[0])
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise pickle.UnpicklingError(str(error)) from error

    def claim(key: str, nbytes: int) -> None:
        part = parts.get(f"{root}data/{key}")
        if part is None or part.file_size < nbytes:
            raise InputError(f'"{path}" is damaged: it claims {nbytes} bytes that are not there')

    _Machine(path, claim).run(io.BytesIO(data))


def _check_legacy(path: pathlib.Path, file: BinaryIO) -> None:
    """Check a file of PyTorch before 1.6: five pickles, the fourth is the object, then numbers."""
    size = os.fstat(file.fileno()).st_size
    data = io.BytesIO(file.read(min(size, LARGEST)))
    claimed: dict[str, int] = {}

    def claim(key: str, nbytes: int) -> None:
        claimed[key] = max(nbytes, claimed.get(key, 0))
        if sum(claimed.values()) > size:
            raise InputError(f'"{path}" is cut short: it claims {nbytes} bytes that are not there')

    for _ in range(5):
        _Machine(path, claim).run(data)


def _too_large(path: pathlib.Path) -> InputError:
    return InputError(f'"{path}" is no checkpoint: its pickle has more than {LARGEST >> 20} MB')


class _Machine:
    """Runs the operations of one pickle on stand-ins."""

    def __init__(self, path: pathlib.Path, claim: Claim):
        self.path, self.claim = path, claim
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0  # bytes

    def run(self, data: io.BytesIO) -> None:
        """Run all operations, up to the pickle's end."""
        try:
            for count, (op, argument, _) in enumerate(pickletools.genops(data)):
                if count > MOST:
                    raise InputError(f'"{self.path}" is no checkpoint: it has too many parts')
                if op.name == "STOP":
                    return
                if (does := _OPERATIONS.get(op.name)) is None:
                    raise pickle.UnpicklingError(f"no operation of a state dict: {op.name}")
                does(self, argument)
        except InputError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise pickle.UnpicklingError(str(error)) from error

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def constant(self, value: Any) -> None:
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise ValueError(f"a number of {value.bit_length()} bits")
        self.push(value)

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def marked(self) -> list[Any]:
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def top(self, kind: type | tuple[type, ...]) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise TypeError(f"a {type(self.stack[-1]).__name__} in a wrong place")
        return self.stack[-1]

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("nothing is left")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def put(self, index: Any) -> None:
        self.memo[int(index)] = self.stack[-1]

    def get(self, index: Any) -> None:
        self.push(self.memo[int(index)])

    def append(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.top(dict)
        if len(values) % 2:
            raise ValueError("a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | int | float | bool | None):
                raise TypeError(f"a {type(key).__name__} as a key")
            target[key] = value

    def name(self, argument: str) -> None:
        self.push(_Name(".".join(argument.split(" "))))

    def build(self, _: Any) -> None:
        """State of an object: `_metadata` of a state dict, or what tensors carry beside numbers."""
        self.stack.pop()
        self.top((dict, _Opaque))

    def storage(self, _: Any) -> None:
        kind, of, key, _, count = self.stack.pop()[:5]
        if kind != "storage" or not isinstance(of, _Name):
            raise TypeError("no storage")
        if of.name not in STORAGES:
            raise pickle.UnpicklingError(f"GLOBAL {of.name}")
        nbytes = _length(count) * STORAGES[of.name]
        self.claim(str(key), nbytes)
        self.push(_Storage(nbytes, STORAGES[of.name]))

    def reduce(self, _: Any) -> None:
        arguments = self.stack.pop()
        named = self.stack.pop()
        if not isinstance(named, _Name) or not isinstance(arguments, tuple):
            raise TypeError("nothing that is called")
        self.push(self.called(named.name, arguments))

    def new(self, _: Any) -> None:
        """An object of a class, of which a state dict holds none."""
        self.stack.pop()
        raise pickle.UnpicklingError(f"GLOBAL {self.top(_Name).name}")

    def called(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name == "collections.OrderedDict":
            if arguments:
                raise TypeError("an OrderedDict that begins with entries")
            return collections.OrderedDict()
        if name in _REBUILD or name == _REBUILD_TYPED:
            dtype = arguments[6] if name == _REBUILD_TYPED else None
            self.check_tensor(*arguments[:4], dtype)
        elif name == _FROM_TYPE:
            made, _, inner = arguments[:3]
            return self.called(made.name, inner)
        elif name == "_codecs.encode":  # bytes
            self.copied += len(arguments[0])
            if self.copied > LARGEST:
                raise _too_large(self.path)
        elif name not in (*_AS_IT_IS, *_PLAIN):
            raise pickle.UnpicklingError(f"GLOBAL {name}")
        return _Opaque()

    def check_tensor(
        self, storage: _Storage, offset: int, shape: Any, strides: Any, dtype: _Name | None
    ) -> None:
        itemsize = storage.itemsize
        if dtype is not None:
            kind = dtype.name.removeprefix("torch.")
            if kind not in _DTYPES:
                raise InputError(f'"{self.path}" holds {kind}, a type that is not known here')
            itemsize = _DTYPES[kind]
        sizes = [_length(n) for n in (*shape, *strides, offset)]
        if len(shape) != len(strides) or len(shape) > MOST_AXES:
            raise ValueError("a shape without strides")
        if not math.prod(shape):
            return
        last = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + sizes[-1]
        most = max(last + 1, math.prod(shape))  # strides of 0 repeat what is there
        if most * itemsize > storage.nbytes:
            there = f"{storage.nbytes} bytes"
            raise InputError(
                f'"{self.path}" is damaged: a tensor of shape {list(shape)} claims more than its'
                f" {there}"
            )


def _length(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError("no length")
    return value


def _popped(machine: _Machine, count: int) -> list[Any]:
    found = machine.stack[-count:]
    del machine.stack[-count:]
    return found


_CONSTANTS = "BININT BININT1 BININT2 BINFLOAT LONG1 BINUNICODE SHORT_BINSTRING"
_OPERATIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(_CONSTANTS.split(), _Machine.constant),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "PROTO": lambda machine, _: None,
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "MARK": _Machine.mark,
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.marked())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.append(_popped(machine, 1)),
    "APPENDS": lambda machine, _: machine.append(machine.marked()),
    "SETITEM": lambda machine, _: machine.set_items(_popped(machine, 2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.marked()),
    "GLOBAL": _Machine.name,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
}
