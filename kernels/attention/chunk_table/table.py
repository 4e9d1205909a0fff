"""Which latent frame may attend which, as a value."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool

Rows = tuple[tuple[bool, ...], ...]
Span = tuple[int, int]  # first, and one past the last


@dataclasses.dataclass(frozen=True)
class Table:
    """Bool [frames_q frames_k], rows query, columns key; made by `Table.of`.

    bits: the table packed eight to a byte. Bytes remember their hash: 768 rows of tuples would be
    hashed anew, for milliseconds, at every call of a jitted function.
    """

    shape: tuple[int, int]
    bits: bytes

    @classmethod
    def of(cls, rows: Table | Rows | Bool[np.ndarray, "fq fk"]) -> Table:
        if isinstance(rows, Table):
            return rows
        array = np.array(rows, bool)
        if array.ndim != 2 or not array.size:
            raise ValueError(f"a table has rows and columns, not the shape {array.shape}")
        return cls(array.shape, np.packbits(array).tobytes())

    @functools.cached_property
    def array(self) -> Bool[np.ndarray, "fq fk"]:
        """Not to be written to."""
        bits = np.frombuffer(self.bits, np.uint8)
        array = np.unpackbits(bits, count=self.shape[0] * self.shape[1]).reshape(self.shape)
        return array.view(bool)

    @functools.cached_property
    def query_runs(self) -> tuple[Span, ...]:
        """The maximal runs of frames that see the same keys."""
        return _runs(self.array)

    @functools.cached_property
    def key_runs(self) -> tuple[Span, ...]:
        """The maximal runs of frames that are seen by the same queries."""
        return _runs(self.array.T)

    @functools.cached_property
    def tiles(self) -> tuple[tuple[Span, Span], ...]:
        """The visible rectangles that these runs make: frames of queries, frames of keys."""
        return tuple(
            (q, k) for q in self.query_runs for k in self.key_runs if self.array[q[0], k[0]]
        )


def _runs(rows: np.ndarray) -> tuple[Span, ...]:
    ends = np.flatnonzero((rows[1:] != rows[:-1]).any(1)) + 1
    starts = [0, *ends.tolist()]
    return tuple(zip(starts, [*starts[1:], len(rows)], strict=True))
