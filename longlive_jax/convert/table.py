"""Name tables: how parameters of a PyTorch checkpoint map to our tree, as data.

A table is a list of rows. It is read in both directions, and strictly: every source tensor is used
once and every
parameter is filled once, or nothing is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

M = TypeVar("M", bound=nnx.Module)

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

    def forward(self, x: np.ndarray) -> np.ndarray:
        x = np.squeeze(x, self.squeeze) if self.squeeze else x
        x = x if self.axes is None else np.transpose(x, self.axes)
        return x.reshape(-1, *x.shape[len(self.merge) :]) if self.merge else x

    def backward(self, x: np.ndarray) -> np.ndarray:
        x = x.reshape(*self.merge, *x.shape[1:]) if self.merge else x
        x = x if self.axes is None else np.transpose(x, np.argsort(self.axes))
        return np.expand_dims(x, self.squeeze) if self.squeeze else x


class NameMismatch(ValueError):
    """A checkpoint does not fit the model: names missing, unexpected, or of another shape."""


def _leaves(model: nnx.Module) -> dict[str, nnx.Param]:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): leaf for path, leaf in flat}


def _complain(kind: str, names: Iterable[str]) -> str:
    names = sorted(names)
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{kind}: {shown}"


def fill(model: M, rows: Sequence[Row], tensors: Mapping[str, np.ndarray]) -> M:
    """A copy of `model` (abstract or concrete) holding `tensors`. Raises NameMismatch and changes
    nothing else.
    """
    leaves, used, problems, values = _leaves(model), set(), [], {}
    for row in rows:
        if row.target not in leaves:
            raise KeyError(f"table row {row.source} names {row.target}, which the model lacks")
        shape = leaves[row.target].get_value().shape
        names = (
            [row.source.format(i=i) for i in range(shape[0])]
            if "{i}" in row.source
            else [row.source]
        )
        missing = [name for name in names if name not in tensors]
        if missing:
            problems.append(_complain("missing", missing))
            continue
        used.update(names)
        parts = [row.forward(np.asarray(tensors[name])) for name in names]
        value = np.stack(parts) if "{i}" in row.source else parts[0]
        if value.shape != shape:
            problems.append(f"{row.source} has shape {value.shape}, expected {shape}")
        values[row.target] = value
    if unexpected := set(tensors) - used:
        problems.append(_complain("unexpected", unexpected))
    if unfilled := set(leaves) - {row.target for row in rows}:
        problems.append(_complain("not in the table", unfilled))
    if problems:
        raise NameMismatch("; ".join(problems))
    graph, state = nnx.split(model)
    flat = {
        path: leaf.replace(jnp.asarray(values[".".join(map(str, path))]))
        for path, leaf in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(flat))


def export(model: nnx.Module, rows: Iterable[Row]) -> dict[str, np.ndarray]:
    """The tensors of `model` under their PyTorch names and layouts; the inverse of `fill`."""
    leaves, tensors = _leaves(model), {}
    for row in rows:
        value = np.asarray(leaves[row.target][...])
        if "{i}" in row.source:
            tensors |= {row.source.format(i=i): row.backward(part) for i, part in enumerate(value)}
        else:
            tensors[row.source] = row.backward(value)
    return tensors
