"""Weights as a flat dict, path to array: what optimisers, checkpoints and files hold.

A path is the attribute path joined by dots ("blocks.self_attn.q.kernel"). Files are safetensors,
written and read one tensor at a time.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax import interrupts, output
from longlive_jax.convert import source, table
from longlive_jax.convert.source import Tensors
from longlive_jax.convert.table import Pending, Row
from longlive_jax.errors import InputError

M = TypeVar("M", bound=nnx.Module)
Weights = Mapping[str, jax.Array]
# Where a parameter goes, of its path and shape.
Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]

_NAMES = {dtype: name for name, dtype in source.DTYPES.items()}
_FULL = (errno.ENOSPC, errno.EDQUOT)


def flatten(model: nnx.Module) -> dict[str, Any]:
    """The parameters of `model`; of an abstract one, their shapes and types."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}


def unflatten(model: M, weights: Mapping[str, Any]) -> M:
    """A module like `model` (abstract or concrete) that holds `weights`."""
    graph, state = nnx.split(model)
    paths = nnx.to_flat_state(state)
    flat = {path: leaf.replace(weights[".".join(map(str, path))]) for path, leaf in paths}
    return nnx.merge(graph, nnx.from_flat_state(flat))


def arrays(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of flat weights by name: a kernel that is several is "path.field" for each."""
    found = {}
    for path, leaf in flat.items():
        for keys, x in jax.tree.flatten_with_path(leaf)[0]:
            found[path + jax.tree_util.keystr(keys)] = x
    return found


def save(
    path: str | os.PathLike, weights: Mapping[str, jax.Array | np.ndarray], dtype=None
) -> None:
    """Writes one safetensors file, whole or not at all; `dtype` casts on the way."""
    path = pathlib.Path(path)
    with _whole(path.parent) as new:
        _write_file(new(path.name), table.unchanged(weights), dtype, {})


def load(path: str | os.PathLike, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Reads a checkpoint of one group of tensors and casts it to `dtype`."""
    (tensors,) = source.open_checkpoint(path).groups.values()
    return {name: _to_device(tensors[name], dtype) for name in tensors}


def write(
    folder: str | os.PathLike,
    part: str,
    pending: Mapping[str, Pending],
    *,
    dtype=None,
    shard_bytes: int = 4 << 30,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a part of a model: `part.safetensors`, or numbered shards and their index.

    Tensors are made and written one piece at a time. Files appear when all is written, in the place
    of what the part was before; on any error what was there stays as it was.

    dtype: floating tensors are cast to it; None keeps their types. shard_bytes: a shard holds no
    more, or one tensor. metadata: strings for the header of each file.

    Raises:
      InputError: the disk is full, or the folder cannot be made.
    """
    folder, metadata = pathlib.Path(folder), metadata or {}
    sizes = {name: _size(entry, dtype) for name, entry in pending.items()}
    shards = _shards(sizes, shard_bytes)
    count = len(shards)
    names = [f"{part}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else [f"{part}.safetensors"]
    index = f"{part}.safetensors.index.json"
    with _whole(folder, sum(sizes.values())) as new:
        for name, shard in zip(names, shards, strict=True):
            _write_file(new(name), {key: pending[key] for key in shard}, dtype, metadata)
        if count > 1:
            places = {key: n for n, shard in zip(names, shards, strict=True) for key in shard}
            listing = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
            new(index).write_text(json.dumps(listing, indent=1) + "\n", "utf-8")
    kept = {*names, *([index] if count > 1 else [])}
    for path in _files(folder, part):
        if path.name not in kept:
            path.unlink()


def read(folder: str | os.PathLike, part: str) -> Tensors:
    """A part of a model, lazily.

    Raises:
      InputError: it is not there, or broken.
    """
    folder = pathlib.Path(folder)
    index = folder / f"{part}.safetensors.index.json"
    if index.exists():
        return source.indexed(index)
    return source.open_checkpoint(folder / f"{part}.safetensors").groups[""]


def exists(folder: str | os.PathLike, part: str) -> bool:
    """Whether a folder has a part of a model."""
    return bool(_files(pathlib.Path(folder), part))


def place(abstract: M, tensors: Tensors, *, dtype, sharding: Sharding | None = None) -> M:
    """A module like `abstract` that holds `tensors`, each put from its file on its devices, one
    after the other.

    dtype: of all parameters, except what a kernel in fewer bits is made of. sharding: of each; None
    is the default device.

    Raises:
      NameMismatch: the tensors are not the module's parameters.
    """
    flat = flatten(abstract)
    shapes = arrays(flat)
    table.plan(shapes, [Row(path, path) for path in shapes], tensors)
    put = {}
    for path, leaf in shapes.items():
        interrupts.stop.check()
        put[path] = _to_device(
            tensors[path],
            dtype if path in flat else leaf.dtype,
            sharding and sharding(path, leaf.shape),
        )
    return unflatten(abstract, filled(flat, put))


def filled(flat: Mapping[str, Any], put: Mapping[str, Any]) -> dict[str, Any]:
    """The flat weights whose `arrays` these are; of `flat` only the shape is seen."""

    def array(path: str, leaf: Any) -> Any:
        return jax.tree.map_with_path(lambda keys, _: put[path + jax.tree_util.keystr(keys)], leaf)

    return {path: array(path, leaf) for path, leaf in flat.items()}


def _to_device(x: np.ndarray, dtype, sharding: jax.sharding.Sharding | None = None) -> jax.Array:
    # The cast copies: an array on a CPU may otherwise stay a window on the file.
    if sharding is None:
        value = jnp.asarray(x.astype(dtype))
    else:
        value = jax.make_array_from_callback(x.shape, sharding, lambda i: x[i].astype(dtype))
    # Transfers run ahead, each with its copy on the host.
    return jax.block_until_ready(value)


def _files(folder: pathlib.Path, part: str) -> list[pathlib.Path]:
    single = [f"{part}.safetensors", f"{part}.safetensors.index.json"]
    found = [folder / name for name in single if (folder / name).exists()]
    return found + sorted(folder.glob(f"{part}-?????-of-?????.safetensors"))


def _cast(dtype: np.dtype, wanted) -> np.dtype:
    floating = jnp.issubdtype(dtype, jnp.floating)
    return np.dtype(dtype if wanted is None or not floating else wanted)


def _size(entry: Pending, dtype) -> int:
    return math.prod(entry.shape) * _cast(entry.dtype, dtype).itemsize


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut where a shard would exceed the limit."""
    shards, room = [[]], limit
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


@contextlib.contextmanager
def _whole(folder: pathlib.Path, size: int = 0) -> Iterator[Callable[[str], pathlib.Path]]:
    """Gives paths to write to, which get the names asked for when all went well, and vanish when
    not. Folders made for them vanish too.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    parts: list[output.Part] = []

    def new(name: str) -> pathlib.Path:
        parts.append(output.Part(folder / name))
        return parts[-1].path

    with contextlib.ExitStack() as undo:
        for path in reversed(made):
            undo.callback(_remove_folder, path)
        undo.callback(lambda: [part.discard() for part in parts])
        try:
            _make_folder(folder)
            if shutil.disk_usage(folder).free < size:
                raise OSError(errno.ENOSPC, "no space left")
            yield new
            with interrupts.hold:
                for part in parts:
                    part.finish()
                    part.discard()  # gives its lock back
        except OSError as error:
            if error.errno not in _FULL:
                raise
            need = f" for {size / 1e9:.1f} GB" if size else ""
            raise InputError(f'no space left in "{folder}"{need}: nothing was written') from error
        undo.pop_all()


def _make_folder(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise InputError(f'cannot write to "{folder}": {error.strerror}') from error


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to fill, which gets its name when all went well, and vanishes when not."""
    with output.writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = output.Part(folder, folder=True)
    try:
        with output.writing(folder):
            yield part.path
            with interrupts.hold:
                part.finish()
    except InputError as error:
        # What is said of the hidden folder is said of the one that was asked for.
        raise InputError(str(error).replace(str(part.path), str(folder))) from error
    finally:
        part.discard()


def _remove_folder(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError):  # somebody else put something there
        path.rmdir()


def _write_file(
    path: pathlib.Path, pending: Mapping[str, Pending], dtype, metadata: Mapping[str, str]
) -> None:
    """One safetensors file: the length of the header, the header, the data without gaps."""
    # Wide types first, so that every tensor is aligned.
    order = sorted(pending, key=lambda name: -_cast(pending[name].dtype, dtype).itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        begin, end = end, end + _size(pending[name], dtype)
        kind = _NAMES[_cast(pending[name].dtype, dtype)]
        shape = list(pending[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        _put(file, len(text).to_bytes(8, "little") + text)
        for name in order:
            _write_tensor(file, name, pending[name], dtype)


def _write_tensor(file: BinaryIO, name: str, entry: Pending, dtype) -> None:
    written = 0
    for piece in entry.pieces():
        interrupts.stop.check()
        data = np.ascontiguousarray(piece, _cast(entry.dtype, dtype)).reshape(-1).view(np.uint8)
        _put(file, data)
        written += data.nbytes
    if written != _size(entry, dtype):
        raise ValueError(f"{name} has {written} bytes, not those of {tuple(entry.shape)}")


def _put(file: BinaryIO, data: bytes | np.ndarray) -> None:
    """The one place where weights meet the disk."""
    file.write(memoryview(data))
