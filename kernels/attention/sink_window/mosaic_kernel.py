"""What the kernels of mosaic.py share: the work of a block, and how they are called.

mosaic_wgmma.py is for Hopper, mosaic_tcgen05.py for Blackwell. Mosaic takes long to import, so that
only calls import these.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Bool, Int32
from longlive_kernels import jax_versions
from longlive_kernels.attention.sink_window.mosaic import WIDTH, Plan
from longlive_kernels.attention.tile import GROUPS

Scalar = Int32[Array, ""]
Ref = Any  # of Mosaic, to arrays or parts of them
Parts = tuple[Any, ...]  # numbers, and their scales if there are any
Sources = list[tuple[Parts, Parts]]


@dataclasses.dataclass(frozen=True)
class Work:
    """A block's query frame of all rows, head, and tile of queries. rows: of a warpgroup. asked:
    queries. sources: keys and values of each. turning: what `mosaic.pairs` and `turns` return, if
    queries are turned. out: the result.
    """

    frame: Scalar
    head: Scalar
    tile: Scalar
    rows: int
    plan: Plan
    asked: Parts
    lists: Ref
    sources: Sources
    turning: Parts | None
    out: Ref

    @property
    def slots(self) -> Scalar:
        """How many the queries see, of all sources."""
        return sum(self.lists[self.frame, 1 + n] for n in range(len(self.plan.lists)))

    def turn(self, number: Scalar) -> Ref:
        """Cosine and sine of the slot that the queries see as that number, of all sources."""
        turns, lengths = self.turning[1], self.plan.lists
        column, row = 1 + len(lengths) + number, jnp.int32(0)
        if len(lengths) > 1:
            stored = self.lists[self.frame, 1]
            fresh = number >= stored
            column = jnp.where(fresh, column + lengths[0] - stored, column)
            row = jnp.where(fresh, jnp.int32(turns.shape[0] // sum(lengths) * lengths[0]), row)
        return turns.at[row + self.lists[self.frame, column]]

    def holds(self, group: Scalar | int) -> Bool[Array, ""]:
        """Whether a warpgroup has queries."""
        return self.first(group) < self.plan.tokens

    def first(self, group: Scalar | int) -> Scalar:
        return (self.tile * GROUPS + group) * self.rows

    def queries(self, x: Ref, group: Scalar | int) -> Ref:
        """The rows of a warpgroup. What lies beyond the frame is read as zeros, and not written."""
        rows = pl.ds(self.first(group), self.rows)
        return x.at[self.frame, rows, pl.ds(self.head * WIDTH, WIDTH)]

    def scales(self, x: Ref, group: Scalar | int) -> Ref:
        """Of those queries."""
        return x.at[self.frame, self.head, :, pl.ds(self.first(group), self.rows)]

    def load(
        self, loaded: Ref, group: int, q: Ref, scales: Ref | None = None, pairs: Ref | None = None
    ):
        """The queries of a warpgroup, and those of their scales and of `mosaic.pairs` that there is
        room for.
        """
        wanted = [(self.queries(self.asked[0], group), q)]
        if scales is not None:
            wanted.append((self.scales(self.asked[1], group), scales))
        if pairs is not None:
            wanted.append((self.queries(self.turning[0], group), pairs))
        for source, tile in wanted:
            plgpu.copy_gmem_to_smem(source, tile.at[group], loaded)

    def store(self, tile: Ref, group: Scalar):
        plgpu.copy_smem_to_gmem(tile, self.queries(self.out, group))
        plgpu.wait_smem_to_gmem(0)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """body: what a block does, of its scratch and its work. rows: of queries, of one of `GROUPS`
    warpgroups; warpgroups: all there are.
    """

    body: Callable[[Any, Work], None]
    scratch: Callable[[Plan], dict[str, Any]]
    rows: int
    warpgroups: int

    def __call__(
        self,
        q: Parts,
        lists: Int32[Array, "bf columns"],
        sources: Sources,
        plan: Plan,
        turning: Parts | None,
    ) -> BFloat16[Array, "bf s ad"]:
        """q: bf s ad. sources: keys and values of the table, and of fresh frames. turning: see
        `Work`.
        """
        tiles = pl.cdiv(plan.tokens, GROUPS * self.rows)
        given, tree = jax.tree.flatten((q, lists, sources, turning))

        def block(*refs, **scratch):
            *refs, out = refs
            place = _place(q[0].shape[0], tiles)
            work = Work(*place, self.rows, plan, *tree.unflatten(refs), out)
            self.body(types.SimpleNamespace(**scratch), work)

        return plgpu.kernel(
            block,
            out_type=jax.ShapeDtypeStruct(q[0].shape, jnp.bfloat16),
            grid=(plan.heads * q[0].shape[0] * tiles,),
            grid_names=("block",),
            num_threads=self.warpgroups,
            thread_name="group",
            kernel_name=f"sink_window_{plan.kind}",
            scratch_types=self.scratch(plan),
            # Nothing is reduced over more than a warp.
            compiler_params=jax_versions.compiler_params(
                approx_math=True, reduction_scratch_bytes=0
            ),
        )(*given)


def over(
    slots: Scalar, step: Callable, state: Any, plan: Plan, enter: Callable[[Scalar], None]
) -> Any:
    """enter(number) for each of so many slots, and step(at, state, keys=…) for every tile of it;
    keys: of the tile, that are there.
    """

    def slot(number, state):
        enter(number)
        first, whole = number * plan.parts, plan.tokens // plan.blocks.keys
        each = functools.partial(step, keys=plan.blocks.keys)
        state = lax.fori_loop(first, first + whole, each, state)
        return step(first + whole, state, keys=plan.tail) if plan.tail else state

    return lax.fori_loop(0, slots, slot, state)


def _place(frames: int, tiles: int) -> tuple[Scalar, Scalar, Scalar]:
    """Blocks that run together have one head, so that they share what they load."""
    at = lax.axis_index("block")
    rest = lax.div(at, jnp.int32(tiles))
    tile, frame = lax.rem(at, jnp.int32(tiles)), lax.rem(rest, jnp.int32(frames))
    return frame, lax.div(rest, jnp.int32(frames)), tile
