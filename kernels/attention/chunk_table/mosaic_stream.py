"""The tile of a block, its list, and how the tiles of lists come and go.

Mosaic takes long to import, so that only calls import this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32
from longlive_kernels.attention.tile import SLAB

Scalar = Int32[Array, ""]
Ref = Any  # of Mosaic, to arrays or parts of them
Source = Callable[[Scalar, Scalar], Ref]


@dataclasses.dataclass(frozen=True)
class Work:
    """A tile of a block and its list; see `mosaic_lists.Lists.outer`."""

    batch: Scalar
    head: Scalar
    start: Scalar
    count: Scalar
    place: Scalar
    first: Scalar
    whole: Scalar
    total: Scalar

    @classmethod
    def of(cls, outer: Ref, heads: int) -> Work:
        """Blocks that run together have one head, so that they share what they load."""
        index, tiles = lax.axis_index("tile"), jnp.int32(outer.shape[0])
        tile, row = lax.rem(index, tiles), lax.div(index, tiles)
        batch, head = lax.div(row, jnp.int32(heads)), lax.rem(row, jnp.int32(heads))
        return cls(batch, head, *(outer[tile, column] for column in range(outer.shape[1])))

    def tokens(self, x: Ref, start: Scalar, size: int) -> Ref:
        """Of one head of b n a d. What lies beyond the end is read as zeros."""
        return x.at[self.batch, pl.ds(start, size), self.head]

    def places(self, x: Ref, start: Scalar, size: int) -> Ref:
        """Of one head of b a p."""
        return x.at[self.batch, self.head, pl.ds(start, size)]


@dataclasses.dataclass(frozen=True)
class Stream:
    """What is loaded of every listed tile, and given back, at once. parts: where it is, of a tile's
    first token and its first place, and the stages it is loaded to.
    """

    parts: tuple[tuple[Source, Ref], ...]
    loaded: Ref
    consumed: Ref

    @classmethod
    def of(cls, own: Any, name: str, source: Source, **more: Source) -> Stream:
        """To `own.<name>_tile`, with `barriers` of that name."""
        parts = [(made, getattr(own, f"{x}_tile")) for x, made in ({name: source} | more).items()]
        return cls(tuple(parts), *(getattr(own, f"{name}_{x}") for x in ("loaded", "consumed")))


def stream(work: Work, listed: list[Ref], *streams: Stream):
    """Loads the tiles of a list, one after the other, each where one was that is done with.
    listed: `inner` and `entries` of `mosaic_lists.Lists`.
    """
    inner, entries = listed
    stages = jnp.int32(streams[0].parts[0][1].shape[0])

    def wait(at, _):
        for each in streams:
            plgpu.barrier_wait(each.consumed.at[lax.rem(at, stages)])

    def step(at, _):
        tile, slot = entries[work.first + at], lax.rem(at, stages)
        start, place = inner[tile, 0], inner[tile, 1]
        for each in streams:
            pl.when(at >= stages)(lambda each=each: plgpu.barrier_wait(each.consumed.at[slot]))
            for source, target in each.parts:
                plgpu.copy_gmem_to_smem(source(start, place), target.at[slot], each.loaded.at[slot])

    lax.fori_loop(0, work.total, step, None)
    lax.fori_loop(jnp.maximum(work.total - stages, 0), work.total, wait, None)


def filled(listed: list[Ref], entry: Scalar) -> Scalar:
    """How many places of a listed tile hold tokens."""
    inner, entries = listed
    return inner[entries[entry], 2]


def store(tile: Ref, target: Ref, work: Work, ragged: bool, first: Scalar | None = None):
    """This warpgroup's rows, but none beyond the run's end, which are another tile's. first: of
    them in the block's tile; None: every warpgroup has as many.
    """
    size = tile.shape[0]
    first = lax.axis_index("group") * size if first is None else first
    left = work.count - first

    def copy(at: int, size: int):
        rows = work.tokens(target, work.start + first + at, size)
        plgpu.copy_smem_to_gmem(tile.at[pl.ds(at, size)], rows)

    if not ragged:
        copy(0, size)
        return
    pl.when(left >= size)(lambda: copy(0, size))

    @pl.when(left < size)
    def _():
        for at in range(0, size, SLAB):
            pl.when(at < left)(lambda at=at: copy(at, SLAB))
