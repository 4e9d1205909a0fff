"""How queries and keys are cut into tiles, and which pairs of tiles the table makes visible.

All tiles of one side have one size, so that one compiled body serves every pair. A tile lies within
a run of equal rows or columns; where a run is no multiple of the size, its last tile is filled up,
with zeros that no query sees. For chunks of one length nothing is filled up.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Shaped
from longlive_kernels.attention.chunk_table.table import Span, Table

Shape = tuple[int, int, int, int]

# Most scores in a pair of tiles, batch and heads included: 64 MiB in float32. Long pieces would run
# up to 1.5 times faster on a CPU at 2^20, but in many more, smaller steps than suit a GPU.
SCORES = 2**24
OVERHEAD = 128  # what entering a tile costs, in tokens
SMALLEST = 16  # tokens that a tile may always have


@dataclasses.dataclass(frozen=True)
class Side:
    """The tiles of queries or of keys. spans: the tokens of each, at most `size`; together `n`."""

    spans: tuple[Span, ...]
    size: int
    n: int

    @functools.cached_property
    def filled(self) -> Bool[np.ndarray, "t size"] | None:
        """Where tiles hold tokens; None if everywhere."""
        lengths = np.array([stop - start for start, stop in self.spans])
        filled = np.arange(self.size) < lengths[:, None]
        return None if filled.all() else filled

    @functools.cached_property
    def _source(self) -> Int[np.ndarray, " m"]:
        """The token in every place of every tile; `n`, which there is none of, in empty ones."""
        first = np.array([start for start, _ in self.spans])
        tokens = first[:, None] + np.arange(self.size)
        return np.where(self.filled, tokens, self.n).astype(np.int32).ravel()

    def pack(self, x: Shaped[Array, "b n a *d"]) -> Shaped[Array, "t b a size *d"]:
        """Tiles first, and heads in front of tokens, which is faster on CPUs."""
        if self.filled is not None:
            x = jnp.take(x, self._source, axis=1, mode="fill", fill_value=0)
        return rearrange(x, "b (t n) a ... -> t b a n ...", n=self.size)

    def unpack(self, x: Shaped[Array, "t b a size *d"]) -> Shaped[Array, "b n a *d"]:
        x = rearrange(x, "t b a n ... -> b (t n) a ...")
        if self.filled is None:
            return x
        return jnp.take(x, np.flatnonzero(self.filled).astype(np.int32), axis=1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel visits. pairs: query tile, key tile, queries in order."""

    query: Side
    key: Side
    pairs: tuple[tuple[int, int], ...]

    @property
    def visits(self) -> tuple[Int[Array, " p"], Int[Array, " p"]]:
        """The pairs, to scan over."""
        query, key = np.array(self.pairs, np.int32).reshape(-1, 2).T
        # Where they are constants, XLA for GPUs works out the place of every slice of every pass
        # while it compiles: 38 s instead of 3 s for the gradient of 235,200 pairs.
        return jax.lax.optimization_barrier((jnp.asarray(query), jnp.asarray(key)))

    @property
    def tiles(self) -> list[tuple[Span, Span]]:
        """The pairs, as tokens of queries and tokens of keys."""
        return [(self.query.spans[i], self.key.spans[j]) for i, j in self.pairs]


def plan(q: Shape, k: Shape, table: Table) -> Plan:
    """The tiles of a call, of the shapes of its operands: b n a d and b m a d."""
    tokens = (q[1] // table.shape[0], k[1] // table.shape[1])
    return _plan(table, tokens, max(math.isqrt(SCORES // (q[0] * q[2])), SMALLEST))


@functools.lru_cache(maxsize=64)
def _plan(table: Table, tokens: tuple[int, int], limit: int) -> Plan:
    query, key = (
        _cut([(start * count, stop * count) for start, stop in runs], limit)
        for runs, count in zip((table.query_runs, table.key_runs), tokens, strict=True)
    )
    rows, columns = (
        [start // count for start, _ in side.spans]
        for side, count in zip((query, key), tokens, strict=True)
    )
    pairs = np.argwhere(table.array[np.ix_(rows, columns)])
    return Plan(query, key, tuple((int(i), int(j)) for i, j in pairs))


def _cut(runs: list[Span], limit: int) -> Side:
    size = _size([stop - start for start, stop in runs], limit)
    spans = [(at, min(at + size, stop)) for start, stop in runs for at in range(start, stop, size)]
    return Side(tuple(spans), size, runs[-1][1])


def _size(lengths: list[int], limit: int) -> int:
    """The cheapest size of tiles, at most `limit`: places in tiles, an overhead for every tile, and
    a sixteenth of all tokens if any is to be moved to fill tiles up.
    """
    length, count = np.unique(lengths, return_counts=True)
    sizes = np.arange(1, min(limit, length[-1]) + 1)
    tiles = -(-length[:, None] // sizes)
    moved = (tiles * sizes != length[:, None]).any(0) * sum(lengths) / 16
    cost = (count[:, None] * tiles * (sizes + OVERHEAD)).sum(0) + moved
    return int(sizes[np.argmin(cost)])


def scores(
    q: Float[Array, "b a n d"], k: Float[Array, "b a m d"], filled: Bool[Array, " m"] | None
) -> Float[Array, "b a n m"]:
    """q kᵀ / √d of a pair of tiles in float32, -inf for keys that are not there."""
    s = product("band,bamd->banm", q, k) * np.float32(1 / math.sqrt(q.shape[-1]))
    return s if filled is None else jnp.where(filled, s, -jnp.inf)


product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def at(tiles: Array | None, i: Int[Array, ""]) -> Array | None:
    """One tile; of nothing, nothing."""
    return None if tiles is None else jax.lax.dynamic_index_in_dim(tiles, i, keepdims=False)


def put(tiles: Array, tile: Array, i: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_update_index_in_dim(tiles, tile, i, 0)


def start(value: float, shape: tuple[int, ...], like: Array) -> Float[Array, ...]:
    """What a scan begins with: float32, and varying over the mesh axes that `like` varies over, as
    `jax.shard_map` asks for.
    """
    return jnp.full(shape, _varying(jnp.float32(value), like))


def alike(*arrays: Array) -> list[Array]:
    """The same, each varying over all mesh axes that any of them varies over: gradients of what the
    devices of `jax.shard_map` share are then summed over them.
    """
    return [functools.reduce(_varying, arrays, x) for x in arrays]


def _varying(x: Array, like: Array) -> Array:
    """x itself. Which axes an array varies over can be read off no public attribute, so a choice
    that is never taken says it; compilers drop it.
    """
    first = jax.lax.stop_gradient(like[(0,) * like.ndim])
    return jnp.where(False, first.astype(x.dtype), x)
