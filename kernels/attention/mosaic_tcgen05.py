"""What kernels for Blackwell (sm_100) share: how a block is divided, and of attention forwards its
products, and the softmax of a tile.

A block of that has two tiles of 128 queries. Of its four warpgroups one loads, one asks the tensor
cores for products, and two have the softmax of a tile each: one tile is multiplied while the other
has its softmax (arXiv 2407.08608, section 3.1). Scores and the sums of values lie in the memory of
the tensor cores, which they fill, so that weights lie where their scores were. Mosaic takes long to
import, so that only calls import this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float32, Int32
from longlive_kernels import jax_versions
from longlive_kernels.attention import mosaic_block as block
from longlive_kernels.attention.tile import GROUPS

Scalar = Int32[Array, ""]
Ref = Any  # of Mosaic, to arrays or parts of them
State = tuple[Float32[Array, " r"], Float32[Array, " r"]]
Product = Callable[[int], None]

ROWS = 128  # of a tile: as many as tensor cores have rows of memory
LOADS, ASKS = GROUPS, GROUPS + 1  # the warpgroup that does so
WARPGROUPS = GROUPS + 2
ASKING = 24  # registers of a thread that asks for products
PART = 32  # columns that are read and written at a time
STORED = 64  # columns that are stored at a time
LAYOUT = plgpu.Layout.TCGEN05_TMEM_NATIVE  # a thread has a row
NEVER = -1e30  # below every score, and finite


def scratch(keys: int, width: int, stages: int) -> dict[str, Any]:
    """keys: of a tile. width: of a head. stages: tiles that are loaded ahead."""
    scores = plgpu.TMEM((ROWS, GROUPS * keys), jnp.float32)
    weights = plgpu.TMEM((ROWS, 2 * GROUPS * keys), jnp.bfloat16, packed=True)
    return dict(
        q_tile=block.swizzled(GROUPS, ROWS, width),
        q_loaded=plgpu.Barrier(num_barriers=GROUPS),
        k_tile=block.swizzled(stages, keys, width),
        v_tile=block.swizzled(stages, keys, width),
        **block.barriers("k", stages, tensor_cores=True),
        **block.barriers("v", stages, tensor_cores=True),
        scores=plgpu.RefUnion(scores, weights),
        sums=plgpu.TMEM((ROWS, GROUPS * width), jnp.float32),
        scored=plgpu.Barrier(num_barriers=GROUPS, orders_tensor_core=True),
        weighted=plgpu.Barrier(num_barriers=GROUPS, orders_tensor_core=True),
    )


def multiply(
    own: Any,
    total: Scalar,
    here: list[Bool[Array, ""]],
    sized: Callable[[Scalar, Product], None],
    ready: Callable[[Scalar, int], None] | None = None,
):
    """All products of a block with so many tiles of keys. here: whether a warpgroup has queries.
    sized: calls a product of a tile with the number of its keys that are multiplied. ready: waits
    for a warpgroup's queries to be as a tile is multiplied with; None: they are as they are loaded.

    Tensor cores do what one thread asks for in its order: the scores of a tile come after the
    product that reads the weights in their place, and tell of it as they are done.
    """
    stages = jnp.int32(own.k_tile.shape[0])

    def scores(at: Scalar, group: int, keys: int):
        tile = own.k_tile.at[lax.rem(at, stages), pl.ds(0, keys)]
        target = _scores(own, group, 0, keys)
        tile = jax_versions.transposed(tile)
        plgpu.tcgen05_mma(target, own.q_tile.at[group], tile, accumulate=False)

    def values(at: Scalar, group: int, keys: int):
        tile = own.v_tile.at[lax.rem(at, stages), pl.ds(0, keys)]
        width = own.v_tile.shape[2]
        plgpu.tcgen05_mma(_sums(own, group, 0, width), _weights(own, group, 0, keys), tile)

    def step(at, _):
        """The scores of a tile, and the values of the one before."""
        some, before = at < total, at - 1
        k_stage, v_stage = lax.rem(at, stages), lax.rem(before, stages)
        pl.when(some)(lambda: plgpu.barrier_wait(own.k_loaded.at[k_stage]))
        pl.when(at > 0)(lambda: plgpu.barrier_wait(own.v_loaded.at[v_stage]))

        def both(group: int):
            @pl.when(at > 0)
            def _():
                plgpu.barrier_wait(own.weighted.at[group])
                sized(before, functools.partial(values, before, group))

            @pl.when(some)
            def _():
                if ready is not None:
                    ready(at, group)
                sized(at, functools.partial(scores, at, group))

            plgpu.tcgen05_commit_arrive(own.scored.at[group])

        for group in range(GROUPS):
            pl.when(here[group])(functools.partial(both, group))
        pl.when(some)(lambda: plgpu.tcgen05_commit_arrive(own.k_consumed.at[k_stage]))
        pl.when(at > 0)(lambda: plgpu.tcgen05_commit_arrive(own.v_consumed.at[v_stage]))

    for group in range(GROUPS if ready is None else 0):
        pl.when(here[group])(lambda group=group: plgpu.barrier_wait(own.q_loaded.at[group]))
    lax.fori_loop(0, total + 1, step, None)


def begun(own: Any, group: Scalar) -> State:
    """Of a tile that has seen no key: the largest score and the sum of exponentials of each row."""
    for start in range(0, own.q_tile.shape[2], PART):
        zeros = block.zeros(ROWS, PART, layout=LAYOUT)
        plgpu.async_store_tmem(_sums(own, group, start, PART), zeros)
    plgpu.commit_tmem()
    none = block.zeros(ROWS, layout=LAYOUT)
    return none + NEVER, none


def weigh(
    own: Any, group: Scalar, state: State, scale: float, keys: int, count: Scalar | None = None
) -> State:
    """The weights of a tile, once it has scores, and what was summed before made less by as much.
    scale: of scores, to exponents of 2. keys: that are multiplied. count: of them, that are there.
    """
    top, total = state
    shape, starts = (ROWS, PART), range(0, keys, PART)
    plgpu.barrier_wait(own.scored.at[group])
    parts = [load(_scores(own, group, start, PART)) for start in starts]
    plgpu.wait_load_tmem()  # weights come where they were
    if count is not None:
        cut = zip(parts, starts, strict=True)
        parts = [block.masked(x, count - start, layout=LAYOUT) for x, start in cut]
    highest = jnp.maximum(top, functools.reduce(jnp.maximum, parts).max(1) * scale)
    fade = jnp.exp2(top - highest)
    less = block.across(highest, shape)
    parts = [jnp.exp2(x * scale - less) for x in parts]
    total = total * fade + functools.reduce(jnp.add, parts).sum(1)
    for x, start in zip(parts, starts, strict=True):
        plgpu.async_store_tmem(_weights(own, group, start, PART), x.astype(jnp.bfloat16))
    _scale(own, group, fade)
    plgpu.barrier_arrive(own.weighted.at[group])
    return highest, total


def finish(own: Any, group: Scalar, total: Float32[Array, " r"]):
    """Leaves the output in place of the queries; zeros of rows without a key."""
    plgpu.barrier_wait(own.scored.at[group])
    _scale(own, group, jnp.where(total > 0, 1.0 / total, 0.0))
    # In this layout it is written to shared memory without conflicts.
    for start in range(0, own.q_tile.shape[2], STORED):
        sums = _sums(own, group, start, STORED)
        out = plgpu.async_load_tmem(sums, layout=plgpu.Layout.TCGEN05).astype(jnp.bfloat16)
        own.q_tile.at[group, :, pl.ds(start, STORED)][...] = out
    plgpu.commit_smem()


def _scale(own: Any, group: Scalar, factor: Float32[Array, " r"]):
    parts = [_sums(own, group, start, PART) for start in range(0, own.q_tile.shape[2], PART)]
    scaled = [load(x) * block.across(factor, (ROWS, PART)) for x in parts]
    plgpu.wait_load_tmem()
    for x, value in zip(parts, scaled, strict=True):
        plgpu.async_store_tmem(x, value)
    plgpu.commit_tmem()


def load(x: Ref) -> Float32[Array, "r c"]:
    return plgpu.async_load_tmem(x, layout=LAYOUT)


def _sums(own: Any, group: Scalar | int, start: int, size: int) -> Ref:
    width = own.q_tile.shape[2]
    return own.sums.at[:, pl.ds(group * width + start, size)]


def _scores(own: Any, group: Scalar | int, start: int, size: int) -> Ref:
    scores, _ = own.scores
    return scores.at[:, pl.ds(group * own.k_tile.shape[1] + start, size)]


def _weights(own: Any, group: Scalar | int, start: int, size: int) -> Ref:
    """Two of them have the column of one score."""
    _, weights = own.scores
    return weights.at[:, pl.ds(2 * group * own.k_tile.shape[1] + start, size)]
