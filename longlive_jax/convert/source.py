"""Checkpoints as they lie on disk: names, shapes and types at once, the numbers when asked for.

A safetensors file is its own table of contents, read here; `.pt` and `.pth` go through
`torch.load(mmap=True, weights_only=True)`. Either way a tensor is mapped into memory when it is
asked for, and let go with the array.
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import functools
import itertools
import math
import os
import pathlib
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import ml_dtypes
import numpy as np

from longlive_jax import documents, listing
from longlive_jax.convert import pickles
from longlive_jax.convert.finite import checked
from longlive_jax.errors import InputError

Fact = str | int | float

# Names of types in safetensors (`safetensors/src/tensor.rs:Dtype`).
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
}
_FROM_TORCH = {  # types that PyTorch does not hand to numpy itself
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
    "float4_e2m1fn_x2": np.dtype(np.uint8),  # two to a byte, as they are
}
_SAFETENSORS, _TORCH = (".safetensors",), (".pt", ".pth", ".bin", ".ckpt")
# Names of shards in a folder, those that are taken first in front. Others in .bin are the states of
# optimisers, or of a training.
_SHARDS = {
    ".safetensors": ("*.safetensors",),
    ".bin": (
        *("diffusion_pytorch_model*.bin", "pytorch_model*.bin", "model*.bin"),
        "adapter_model*.bin",
    ),
}
_INDEX = ".index.json"
_LARGEST_HEADER = 100 << 20
_MOST_AXES = 16
_MOST_ENTRIES, _DEEPEST = 200_000, 16  # of nested dicts and lists, which may repeat each other
_NUMBERED = re.compile(r"(.+)-(\d+)-of-(\d+)\.(safetensors|bin)")
ENGINE = (
    "holds TransformerEngine's runtime form;"
    " convert the merged bf16 file or the packed FourOverSix one"
)
_GGUF = '"{path}" is a GGUF file, which is not read: convert one in safetensors'
_ENGINE_ONLY = ("_io.BytesIO", "transformer_engine")  # the state that its modules pickle
# What `torch.load` has been seen to raise on files that are cut short or something else.
_BROKEN = (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError)
_BROKEN += (AssertionError, OverflowError)


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor: what it is, and how to get it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


# The bare Mapping: type checkers that look inside a Mapping[str, np.ndarray] would read a tensor.
class Tensors(Mapping):
    """Name → np.ndarray, read anew each time and never kept. Types are as stored: bfloat16, float8
    and packed bytes included.
    """

    def __init__(self, stored: Mapping[str, Stored]):
        self.stored = dict(stored)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.stored[name].read()

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def spec(self, name: str) -> jax.ShapeDtypeStruct:
        """Shape and type of a tensor, without reading it."""
        stored = self.stored[name]
        return jax.ShapeDtypeStruct(stored.shape, stored.dtype)

    def renamed(self, names: Mapping[str, str]) -> Tensors:
        """The tensors under new names, and only these: new name → old name."""
        return Tensors({new: self.stored[old] for new, old in names.items()})


@runtime_checkable
class HasSpecs(Protocol):
    """A mapping that knows the shapes and types of tensors that it has yet to make."""

    def spec(self, name: str) -> jax.ShapeDtypeStruct: ...


def spec_of(tensors: Mapping[str, Any], name: str) -> jax.ShapeDtypeStruct:
    """Shape and type of one of `tensors`, unread; of a plain dict's arrays (or specs) too."""
    if isinstance(tensors, HasSpecs):
        return tensors.spec(name)
    return jax.ShapeDtypeStruct(tensors[name].shape, tensors[name].dtype)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a file or a folder of shards holds.

    groups: the dicts of tensors in it ("generator", "generator_ema", …; names inside are joined by
    dots); "" where it is one dict of tensors. facts: its other scalars, and safetensors metadata.
    """

    groups: Mapping[str, Tensors]
    facts: Mapping[str, Fact]


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """A `.safetensors`, `.pt`, `.pth` or `.bin` file, an index of shards, or a folder of shards.

    A folder is what its one `*.safetensors.index.json` lists, or without one all of its shards; of
    a folder without safetensors, the same in `.bin`.

    Raises:
      InputError: it is not there, is no checkpoint, is cut short, lacks a shard, holds more than
        data, or needs PyTorch, which is not installed.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise InputError(f'there is no "{path}"')
    if path.is_dir():
        return _folder(path)
    _check_ordinary(path)
    if path.name.endswith(_INDEX):
        return Checkpoint({"": indexed(path)}, {})
    suffix = path.suffix.lower()
    if suffix in _SAFETENSORS:
        tensors, facts = _safetensors(path)
        return Checkpoint({"": tensors}, facts)
    if suffix in _TORCH:
        return _grouped(path, _torch(path))
    if suffix == ".gguf":
        raise InputError(_GGUF.format(path=path))
    kinds = ", ".join((*_SAFETENSORS, *_TORCH))
    raise InputError(f'"{path}" is no checkpoint: its name should end in one of {kinds}')


def _check_ordinary(path: pathlib.Path) -> None:
    """Reading a named pipe would wait for whoever writes to it."""
    if not path.is_file():
        raise InputError(f'"{path}" is no ordinary file')


def _mapped(path: pathlib.Path, start: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return np.zeros(shape, dtype)
    raw = np.asarray(np.memmap(path, np.uint8, "r", start, (size,)))
    if start % dtype.itemsize:  # headers of old files are not padded
        raw = raw.copy()
    return raw.view(dtype).reshape(shape)


def _safetensors(path: pathlib.Path) -> tuple[Tensors, dict[str, Fact]]:
    header, start = _header(path)
    facts = header.pop("__metadata__", {})
    size, stored = path.stat().st_size, {}
    places = []
    for name, entry in header.items():
        kind, shape, begin, end = _entry(path, name, entry)
        if end - begin != math.prod(shape) * DTYPES[kind].itemsize:
            raise InputError(f'"{path}" is broken: its header gives {name} a wrong place')
        if start + end > size:
            raise InputError(
                f'"{path}" is cut short: it has {size} bytes, and {name} ends at {start + end}'
            )
        read = functools.partial(_mapped, path, start + begin, shape, DTYPES[kind])
        stored[name] = _checked(Stored(shape, DTYPES[kind], read), name, path)
        if end > begin:
            places.append((begin, end, name))
    places.sort()
    for (_, end, name), (begin, _, other) in itertools.pairwise(places):
        if begin < end:
            raise InputError(f'"{path}" is broken: {name} and {other} lie in the same place')
    return Tensors(stored), {str(k): str(v) for k, v in facts.items()}


def _checked(stored: Stored, name: str, path: pathlib.Path) -> Stored:
    """The same tensor, which is found to be finite whenever it is read."""
    return dataclasses.replace(stored, read=lambda: checked(stored.read(), name, path))


def _entry(path: pathlib.Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape and place of a tensor, as a header gives them: no more than that."""
    fields = entry if isinstance(entry, dict) else {}
    kind, shape, place = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    whole = isinstance(shape, list) and isinstance(place, list) and len(place) == 2
    if not (whole and isinstance(kind, str) and all(map(_is_length, (*shape, *place)))):
        raise InputError(f'"{path}" is no safetensors file: its header is wrong')
    if kind not in DTYPES:
        raise InputError(f'"{path}" holds {name} as {kind}, a type that is not known here')
    if len(shape) > _MOST_AXES:
        raise InputError(f'"{path}" is broken: {name} has {len(shape)} axes')
    return kind, tuple(shape), *place


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
    """The JSON in front of a safetensors file, and where the data begin."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            there = os.fstat(file.fileno()).st_size - 8
            text = file.read(length) if length <= min(there, _LARGEST_HEADER) else b""
    except OSError as error:
        raise InputError(f'"{path}" cannot be read: {error.strerror}') from error
    if head == b"version ":
        raise InputError(f'"{path}" only points to its contents: fetch them with git lfs pull')
    if head.startswith(b"GGUF"):
        raise InputError(_GGUF.format(path=path))
    if len(head) < 8 or there < length <= _LARGEST_HEADER:
        raise InputError(f'"{path}" is cut short: its header has {length} bytes')
    try:
        header = documents.parse(text.decode("utf-8"), "the header")
    except UnicodeDecodeError as error:
        raise InputError(f'"{path}" is no safetensors file: it is not in UTF-8') from error
    except InputError as error:
        raise InputError(f'"{path}" is no safetensors file: {error}') from error
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise InputError(f'"{path}" is no safetensors file: its header is wrong')
    return header, 8 + length


def checkpoints(folder: pathlib.Path) -> dict[pathlib.Path, Callable[[], Checkpoint]]:
    """The checkpoints side by side in a folder, each with what opens it, by the file to call it by.

    An index is one with its shards, and so are numbered shards without one. A file in PyTorch's
    format is left out where one of the same name is there in safetensors.

    Raises:
      OSError: the folder cannot be read.
    """
    found: dict[pathlib.Path, Callable[[], Checkpoint]] = {}
    names = [path.name for path in listing.shown(folder) if path.is_file()]
    covered: set[str] = set()
    for name in names:
        if name.endswith(_INDEX):
            found[folder / name] = functools.partial(open_checkpoint, folder / name)
            covered |= _listed_shards(folder / name)
    shards: dict[tuple[str, ...], list[pathlib.Path]] = {}
    for name in names:
        parts = _NUMBERED.fullmatch(name)
        if parts is not None and name not in covered:
            stem, _, count, kind = parts.groups()
            shards.setdefault((stem, count, kind), []).append(folder / name)
            covered.add(name)
    for paths in shards.values():
        found[paths[0]] = functools.partial(_joined, folder, paths)
    for name in names:
        path = folder / name
        twin = path.with_suffix(_SAFETENSORS[0])
        if path.suffix.lower() in _TORCH and twin.name in names or name in covered:
            continue
        kinds = _SHARDS.get(path.suffix.lower(), ())
        if path.suffix.lower() in (".pt", ".pth", ".ckpt") or _named(name, kinds):
            found[path] = functools.partial(open_checkpoint, path)
    return found


def _named(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _folder(folder: pathlib.Path) -> Checkpoint:
    for kind, patterns in _SHARDS.items():
        indexes = listing.shown(folder, f"*{kind}{_INDEX}")
        if len(indexes) > 1:
            names = " and ".join(path.name for path in indexes)
            raise InputError(f'"{folder}" holds more than one checkpoint: {names}')
        if indexes:
            return Checkpoint({"": indexed(indexes[0])}, {})
        if files := [path for path in listing.shown(folder) if _named(path.name, patterns)]:
            return _joined(folder, files)
    raise InputError(f'"{folder}" holds no safetensors files')


def _joined(folder: pathlib.Path, files: Sequence[pathlib.Path]) -> Checkpoint:
    """The tensors of all these files as one checkpoint."""
    _complete(folder, [path.name for path in files])
    stored: dict[str, Stored] = {}
    facts: dict[str, Fact] = {}
    for path in files:
        tensors, metadata = _shard(path)
        if twice := sorted(stored.keys() & tensors.stored.keys()):
            raise InputError(f'"{path}" repeats {twice[0]} from another file of its folder')
        stored |= tensors.stored
        facts |= metadata
    return Checkpoint({"": Tensors(stored)}, facts)


def _shard(path: pathlib.Path) -> tuple[Tensors, Mapping[str, Fact]]:
    _check_ordinary(path)
    if path.suffix.lower() not in _TORCH:
        return _safetensors(path)
    checkpoint = _grouped(path, _torch(path))
    if set(checkpoint.groups) != {""}:
        raise InputError(f'"{path}" is no shard: it holds {", ".join(sorted(checkpoint.groups))}')
    return checkpoint.groups[""], checkpoint.facts


def _complete(folder: pathlib.Path, names: list[str]) -> None:
    for name in names:
        if parts := _NUMBERED.fullmatch(name):
            stem, number, count, kind = parts.groups()
            shards = (f"{stem}-{i:0{len(number)}}-of-{count}" for i in range(1, int(count) + 1))
            for shard in shards:
                if f"{shard}.{kind}" not in names:
                    raise InputError(f'"{folder}" lacks the shard {shard}.{kind}')


def _weight_map(index: pathlib.Path) -> dict[str, list[str]]:
    """The names of tensors in each shard that an index lists."""
    try:
        places = documents.read(index)["weight_map"]
        shards = collections.defaultdict(list)
        for name, shard in places.items():
            shards[pathlib.PurePath(shard).name].append(name)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'"{index}" is no index of shards') from error
    return shards


def _listed_shards(index: pathlib.Path) -> set[str]:
    """The same, none where it is no index: that is said when it is opened."""
    try:
        return set(_weight_map(index))
    except InputError:
        return set()


def indexed(index: pathlib.Path) -> Tensors:
    """The tensors of the shards that an index file lists. Raises InputError as `open_checkpoint`
    does.
    """
    stored = {}
    for shard, names in sorted(_weight_map(index).items()):
        if not (index.parent / shard).exists():
            raise InputError(f'"{index.parent}" lacks the shard {shard}')
        tensors, _ = _shard(index.parent / shard)
        if different := sorted(set(names) ^ set(tensors)):
            raise InputError(f'"{index}" and its shard {shard} disagree about {different[0]}')
        stored |= tensors.stored
    return Tensors(stored)


def _torch(path: pathlib.Path) -> Any:
    """The contents of a PyTorch file. The code that a pickle may hold is not run."""
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f'"{path}" needs PyTorch to be read: pip install "longlive-jax[torch]"'
        ) from error
    try:
        with path.open("rb") as file:
            head = file.read(8)
        # Files from before PyTorch 1.6 are one pickle, which cannot be mapped.
        mmap = head.startswith(b"PK")
        pickles.check(path)
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except InputError:
        raise
    except (pickle.UnpicklingError, *_BROKEN) as error:
        if head == b"version ":
            raise InputError(
                f'"{path}" only points to its contents: fetch them with git lfs pull'
            ) from error
        if found := re.search(r"GLOBAL (\S+)|(TorchScript)", str(error)):
            what = found[1] or found[2]
            advice = (
                f"it {ENGINE}" if what.startswith(_ENGINE_ONLY) else "save its state dict alone"
            )
            raise InputError(
                f'"{path}" holds more than tensors and numbers ({what}): nothing of it was run,'
                f" {advice}"
            ) from error
        raise InputError(f'"{path}" is cut short, or no PyTorch checkpoint') from error


def _from_torch(tensor: Any) -> Stored:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _FROM_TORCH:
        plain = tensor.detach().numpy()
        return Stored(plain.shape, plain.dtype, lambda: plain)
    import torch

    dtype = _FROM_TORCH[name]
    bits = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    array = tensor.detach().view(bits).numpy().view(dtype)
    return Stored(array.shape, dtype, lambda: array)


def _grouped(path: pathlib.Path, content: Any) -> Checkpoint:
    if not isinstance(content, Mapping):
        raise InputError(f'"{path}" holds no dict of tensors but a {type(content).__name__}')
    groups: dict[str, Tensors] = {}
    bare: dict[str, Stored] = {}
    facts: dict[str, Fact] = {}
    budget = itertools.count()
    for key, value in content.items():
        found = dict(_leaves(value, str(key), path, budget))
        tensors = {name: x for name, x in found.items() if isinstance(x, Stored)}
        facts |= {name: x for name, x in found.items() if not isinstance(x, Stored)}
        if str(key) in tensors:
            bare |= tensors
        elif tensors:
            inner = len(str(key)) + 1
            groups[str(key)] = Tensors({name[inner:]: x for name, x in tensors.items()})
    if groups:  # numbers beside dicts of tensors: counts of steps
        numbers = {name: x for name, x in bare.items() if x.shape == ()}
        facts |= {name: x.read().item() for name, x in numbers.items()}
        bare = {name: x for name, x in bare.items() if name not in numbers}
    if bare:
        groups[""] = Tensors(bare)
    if not groups:
        raise InputError(f'"{path}" holds no tensors')
    return Checkpoint(groups, facts)


def _leaves(
    value: Any, name: str, path: pathlib.Path, budget: Iterator[int], depth: int = 0
) -> Iterator[tuple[str, Stored | Fact]]:
    """The tensors and scalars of nested dicts and lists, under dotted names.

    Args:
      value: A tensor, a scalar, or a dict or list of them; others are left out.
      name: Its own name.
      path: The file, for what is said of it.
      budget: Counts what is looked at. A few lists within each other can stand for any number.
      depth: How many dicts and lists it is in.
    """
    import torch

    if next(budget) > _MOST_ENTRIES or depth > _DEEPEST:
        raise InputError(f'"{path}" is no checkpoint: it has too many parts, or too deep ones')
    if isinstance(value, torch.Tensor):
        yield name, _checked(_from_torch(value), name, path)
    elif isinstance(value, str | int | float):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, part in items:
            yield from _leaves(part, f"{name}.{key}", path, budget, depth + 1)
