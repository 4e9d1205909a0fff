"""Which tiles a kernel of mosaic.py visits: for every tile of one side, a list of the other's.

Tiles that the table empties are in no list. Frames of one run see the same, so that their tiles
share a list: a table of 768 frames of 880 tokens has 129,360 entries instead of 7.1 million.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Int32
from longlive_kernels.attention.chunk_table.table import Span, Table

PLACES = 128  # numbers of one per query lie in pieces of so many, one after the other


@dataclasses.dataclass(frozen=True, eq=False)
class Lists:
    """What a kernel reads.

    outer: of every tile that has a list, those with the longest list first: its first token, how
    many of its places hold tokens, its first place, where its list begins, how many entries of it
    are whole tiles, and how many entries it has. inner: of every tile that is listed, its first
    token, its first place, and how many of its places hold tokens. entries: all lists, one after
    the other; in each, whole tiles come first.
    """

    outer: Int32[np.ndarray, "t 6"]
    inner: Int32[np.ndarray, "u 3"]
    entries: Int32[np.ndarray, " e"]
    ragged: tuple[bool, bool]  # whether outer and inner tiles reach beyond a run's end

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.outer, self.inner, self.entries

    @property
    def places(self) -> int:
        """Of all of `outer`."""
        ends = self.outer[:, 2] + -(-self.outer[:, 1] // PLACES) * PLACES
        return int(ends.max())

    def visited(self, tile: int) -> Int32[np.ndarray, " v"]:
        """The list of one of `outer`."""
        first, total = self.outer[tile, 3], self.outer[tile, 5]
        return self.entries[first : first + total]


def over_keys(table: Table, tokens: tuple[int, int], queries: int, keys: int) -> Lists:
    """For every tile of `queries` tokens, the tiles of `keys` tokens that it sees. tokens: of a
    frame of queries and of keys.
    """
    return _lists(table, tokens, (queries, keys), False)


def over_queries(table: Table, tokens: tuple[int, int], queries: int, keys: int) -> Lists:
    """For every tile of `keys` tokens, the tiles of `queries` tokens that see it."""
    return _lists(table, tokens, (queries, keys), True)


def places(table: Table, tokens: int) -> Int32[np.ndarray, " p"]:
    """The query in every place; one past the last, which there is none of, in empty ones."""
    tiles = _cut(table.query_runs, tokens, PLACES)
    order = tiles[:, 0, None] + np.arange(PLACES)
    filled = np.arange(PLACES) < tiles[:, 1, None]
    return np.where(filled, order, table.shape[0] * tokens).astype(np.int32).ravel()


@functools.lru_cache(maxsize=64)
def _lists(
    table: Table, tokens: tuple[int, int], sizes: tuple[int, int], transposed: bool
) -> Lists:
    runs = table.query_runs, table.key_runs
    sides = [_cut(*side) for side in zip(runs, tokens, sizes, strict=True)]
    visible = table.array[np.ix_(*([start for start, _ in side] for side in runs))]
    if transposed:
        visible, sides, sizes = visible.T, sides[::-1], sizes[::-1]
    outer, inner = sides
    whole = inner[:, 1] == sizes[1]
    lists = [_listed(row[inner[:, 3]], whole) for row in visible]
    lengths = np.array([len(entries) for entries in lists])
    firsts = np.cumsum(lengths) - lengths
    wholes = np.array([whole[entries].sum() for entries in lists])
    columns = [x[outer[:, 3], None] for x in (firsts, wholes, lengths)]
    outer = np.concatenate([outer[:, :3], *columns], 1).astype(np.int32)
    outer = outer[np.argsort(-outer[:, 5], kind="stable")]
    entries = np.concatenate([*lists, np.zeros(1, np.int32)])  # never empty
    ragged = (bool((outer[:, 1] < sizes[0]).any()), not whole.all())
    return Lists(outer, inner[:, [0, 2, 1]], entries.astype(np.int32), ragged)


def _listed(seen: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.concatenate([np.flatnonzero(seen & whole), np.flatnonzero(seen & ~whole)])


def _cut(runs: tuple[Span, ...], tokens: int, size: int) -> Int32[np.ndarray, "t 4"]:
    """Of every tile: its first token, how many of its places hold tokens, its first place, its run.

    Tiles begin where runs do. Every run begins at a multiple of `PLACES` places.
    """
    tiles, place = [], 0
    for run, (start, stop) in enumerate(runs):
        start, stop = start * tokens, stop * tokens
        tiles += [
            (at, min(size, stop - at), place + at - start, run) for at in range(start, stop, size)
        ]
        place += -(-(stop - start) // PLACES) * PLACES
    return np.array(tiles, np.int32)
