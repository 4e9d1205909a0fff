"""Name tables: how parameters of a PyTorch checkpoint map to our tree, as data.

A table is a list of rows. It is read in both directions, and strictly: every source tensor is used
once and every parameter is filled once, or nothing is. Both directions are planned from names and
shapes alone; a plan then moves one tensor at a time.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from longlive_jax.convert.source import spec_of
from longlive_jax.errors import InputError

M = TypeVar("M", bound=nnx.Module)

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FP8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))

LINEAR = (1, 0)  # out in -> in out
CONV2D = (2, 3, 1, 0)  # out in h w -> h w in out
CONV3D = (2, 3, 4, 1, 0)  # out in t h w -> t h w in out


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter. In `source`, `{i}` stands for the layer index of a parameter that we keep
    stacked.

    axes: permutation from the PyTorch layout to ours, None where they agree. squeeze: axes of size
    one that the PyTorch tensor has and ours lacks, counted before the permutation. merge: sizes of
    the leading axes that we fold into one, after the permutation.
    """

    source: str
    target: str
    axes: tuple[int, ...] | None = None
    squeeze: tuple[int, ...] = ()
    merge: tuple[int, ...] = ()

    @property
    def stacked(self) -> bool:
        return "{i}" in self.source

    def names(self, shape: Sequence[int]) -> list[str]:
        """The source tensors of a parameter of this shape."""
        return [self.source.format(i=i) for i in range(shape[0])] if self.stacked else [self.source]

    def forward(self, x: np.ndarray) -> np.ndarray:
        x = np.squeeze(x, self.squeeze) if self.squeeze else x
        x = x if self.axes is None else np.transpose(x, self.axes)
        return x.reshape(-1, *x.shape[len(self.merge) :]) if self.merge else x

    def backward(self, x: np.ndarray) -> np.ndarray:
        x = x.reshape(*self.merge, *x.shape[1:]) if self.merge else x
        x = x if self.axes is None else np.transpose(x, np.argsort(self.axes))
        return np.expand_dims(x, self.squeeze) if self.squeeze else x

    def source_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of each source tensor of a parameter of this shape."""
        inner = tuple(shape[1:] if self.stacked else shape)
        return self.backward(np.broadcast_to(np.zeros((), bool), inner)).shape


class NameMismatch(InputError):
    """A checkpoint does not fit the model: names missing, unexpected, or of another shape."""

    def __init__(
        self,
        missing: Iterable[str] = (),
        unexpected: Iterable[str] = (),
        shapes: Iterable[str] = (),
        unfilled: Iterable[str] = (),
    ):
        self.missing, self.unexpected = tuple(missing), tuple(unexpected)
        self.shapes, self.unfilled = tuple(shapes), tuple(unfilled)
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.shapes,
            "not in the table": self.unfilled,
        }
        super().__init__("; ".join(_list(kind, names) for kind, names in kinds.items() if names))


def _list(kind: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{kind}: {', '.join(names[:5])}{more}"


@dataclasses.dataclass(frozen=True)
class Pending:
    """A tensor that is still to be made.

    pieces: makes its parts, consecutive along the first axis (the layers of a stacked parameter,
    or one part that is all of it). Only the part in hand is in memory.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterator[np.ndarray]]

    def array(self) -> np.ndarray:
        """All of it."""
        parts = list(self.pieces())
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def unchanged(tensors: Mapping[str, Any]) -> dict[str, Pending]:
    """Every tensor as it is."""
    return {name: _pending(tensors, name) for name in tensors}


def _pending(tensors: Mapping[str, Any], name: str) -> Pending:
    spec = spec_of(tensors, name)
    return Pending(spec.shape, np.dtype(spec.dtype), lambda: iter([np.asarray(tensors[name])]))


def _leaves(model: nnx.Module | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(model, Mapping):
        return model
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}


def _once(rows: Sequence[Row]) -> None:
    """A table that says anything twice is wrong itself."""
    for names in ([row.source for row in rows], [row.target for row in rows]):
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"the table has more than one row for {twice[0]}")


def plan(
    model: nnx.Module | Mapping[str, Any],
    rows: Sequence[Row],
    tensors: Mapping[str, Any],
    *,
    allow_missing: Sequence[str] = (),
) -> dict[str, Pending]:
    """Parameter path → how to make it of `tensors`. Names and shapes are checked, nothing is read.

    model: abstract or concrete, or its leaves by path. allow_missing: names or patterns (`*`) of
    source tensors that may be absent; what they would hold is zero.

    Raises:
      NameMismatch: a tensor is missing, is not used, or has another shape.
    """
    _once(rows)
    leaves, used, planned = _leaves(model), set(), {}
    missing, shapes = [], []
    for row in rows:
        if row.target not in leaves:
            raise KeyError(f"table row {row.source} names {row.target}, which the model lacks")
        shape = tuple(leaves[row.target].shape)
        names, expected = row.names(shape), row.source_shape(shape)
        found = {name: spec_of(tensors, name) for name in names if name in tensors}
        absent = [name for name in names if name not in found]
        missing += [n for n in absent if not any(fnmatch.fnmatchcase(n, p) for p in allow_missing)]
        shapes += [
            f"{name} {spec.shape} and not {expected}"
            for name, spec in found.items()
            if spec.shape != expected
        ]
        used.update(found)
        dtypes = [np.dtype(s.dtype) for s in found.values()] or [np.dtype(leaves[row.target].dtype)]
        dtype = _common(dtypes)
        planned[row.target] = Pending(
            shape, dtype, functools.partial(_forward, row, tensors, shape, dtype)
        )
    unexpected = sorted(set(tensors) - used)
    unfilled = sorted(set(leaves) - set(planned))
    if missing or unexpected or shapes or unfilled:
        raise NameMismatch(missing, unexpected, shapes, unfilled)
    return planned


def _common(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The type that holds the numbers of all: blocks of one file may differ. Numbers in fp8 are in
    any other type too.
    """
    found = set(dtypes)
    if len(found) > 1:
        found = {kind for kind in found if kind not in _FP8} or {_BFLOAT16}
    try:
        return functools.reduce(np.promote_types, found)
    except TypeError:  # numpy knows no type for bfloat16 and float16
        return np.dtype(np.float32)


def _forward(
    row: Row, tensors: Mapping[str, Any], shape: tuple[int, ...], dtype: np.dtype
) -> Iterator[np.ndarray]:
    for name in row.names(shape):
        if name in tensors:
            part = row.forward(np.asarray(tensors[name])).astype(dtype, copy=False)
        else:
            part = np.zeros(shape[1:] if row.stacked else shape, dtype)
        yield part[None] if row.stacked else part


def fill(model: M, rows: Sequence[Row], tensors: Mapping[str, Any]) -> M:
    """A copy of `model` (abstract or concrete) holding `tensors`. Raises NameMismatch as `plan`."""
    planned = plan(model, rows, tensors)
    graph, state = nnx.split(model)
    flat = {
        path: leaf.replace(jnp.asarray(planned[".".join(map(str, path))].array()))
        for path, leaf in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(flat))


def export_pending(weights: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Pending]:
    """PyTorch name → how to make it of `weights` (path → array); the inverse of `plan`, as lazy.

    Raises:
      NameMismatch: the weights are not those of the table.
    """
    _once(rows)
    targets = [row.target for row in rows]
    missing = [name for name in targets if name not in weights]
    unexpected = sorted(set(weights) - set(targets))
    if missing or unexpected:
        raise NameMismatch(missing, unexpected)
    pending = {}
    for row in rows:
        spec = spec_of(weights, row.target)
        shape = row.source_shape(spec.shape)
        for i, name in enumerate(row.names(spec.shape)):
            pieces = functools.partial(_backward, row, weights, i)
            pending[name] = Pending(shape, np.dtype(spec.dtype), pieces)
    return pending


def _backward(row: Row, weights: Mapping[str, Any], layer: int) -> Iterator[np.ndarray]:
    value = weights[row.target]
    yield row.backward(np.asarray(value[layer] if row.stacked else value))


def export(model: nnx.Module, rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """The tensors of `model` under their PyTorch names and layouts; the inverse of `fill`."""
    pending = export_pending(_leaves(model), rows)
    return {name: part.array() for name, part in pending.items()}
