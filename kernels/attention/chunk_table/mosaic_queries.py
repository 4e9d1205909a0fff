"""Hopper's kernel of the gradient of q; see `mosaic.backward`."""

from __future__ import annotations

import functools
import math
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32
from longlive_kernels import jax_versions
from longlive_kernels.attention import mosaic_block as block
from longlive_kernels.attention.chunk_table import mosaic_stream
from longlive_kernels.attention.chunk_table.mosaic import QUERIES
from longlive_kernels.attention.chunk_table.mosaic_lists import Lists
from longlive_kernels.attention.tile import GROUPS, ROWS


def of_queries(
    q: BFloat16[Array, "b n a d"],
    k: BFloat16[Array, "b m a d"],
    v: BFloat16[Array, "b m a d"],
    grad: BFloat16[Array, "b n a d"],
    sums: Float32[Array, "b a p"],
    mean: Float32[Array, "b a p"],
    lists: Lists,
) -> BFloat16[Array, "b n a d"]:
    """The gradient of q. sums, mean: as `mosaic.backward` makes them."""
    b, _, a, d = q.shape
    return plgpu.kernel(
        functools.partial(_kernel, ragged=lists.ragged),
        out_type=jax.ShapeDtypeStruct(q.shape, jnp.bfloat16),
        grid=(b * a * len(lists.outer),),
        grid_names=("tile",),
        num_threads=GROUPS + 1,
        thread_name="group",
        kernel_name="chunk_table_queries",
        scratch_types=_scratch(d),
        compiler_params=jax_versions.compiler_params(approx_math=True),
    )(q, k, v, grad, sums, mean, *(jnp.asarray(x) for x in lists.arrays))


def _scratch(width: int) -> dict:
    return dict(
        q_tile=block.swizzled(GROUPS, ROWS, width),
        grad_tile=block.swizzled(GROUPS, ROWS, width),
        sums_tile=plgpu.SMEM((GROUPS, ROWS), jnp.float32),
        mean_tile=plgpu.SMEM((GROUPS, ROWS), jnp.float32),
        rows_loaded=plgpu.Barrier(num_arrivals=4 * GROUPS),
        k_tile=block.swizzled(QUERIES.stages, QUERIES.tile, width),
        v_tile=block.swizzled(QUERIES.stages, QUERIES.tile, width),
        **block.barriers("k", QUERIES.stages),
        **block.barriers("v", QUERIES.stages),
    )


def _kernel(*refs, ragged, **scratch):
    q, k, v, grad, sums, mean, outer, *listed, out = refs
    own = types.SimpleNamespace(**scratch)
    group = lax.axis_index("group")
    work = mosaic_stream.Work.of(outer, q.shape[2])

    @pl.when(group == GROUPS)
    def _():
        plgpu.set_max_registers(QUERIES.registers[0], action="decrease")
        for each in range(GROUPS):
            start, place = work.start + each * ROWS, work.place + each * ROWS
            for source, tile in (
                (work.tokens(q, start, ROWS), own.q_tile),
                (work.tokens(grad, start, ROWS), own.grad_tile),
                (work.places(sums, place, ROWS), own.sums_tile),
                (work.places(mean, place, ROWS), own.mean_tile),
            ):
                plgpu.copy_gmem_to_smem(source, tile.at[each], own.rows_loaded)
        mosaic_stream.stream(
            work,
            listed,
            mosaic_stream.Stream.of(own, "k", lambda start, _: work.tokens(k, start, QUERIES.tile)),
            mosaic_stream.Stream.of(own, "v", lambda start, _: work.tokens(v, start, QUERIES.tile)),
        )

    @pl.when(group < GROUPS)
    def _():
        plgpu.set_max_registers(QUERIES.registers[1], action="increase")
        plgpu.barrier_wait(own.rows_loaded)
        total = _sum(own, work, group, listed, ragged[1])
        own.q_tile.at[group][...] = total.astype(jnp.bfloat16)
        plgpu.commit_smem()
        mosaic_stream.store(own.q_tile.at[group], out, work, ragged[0])
        plgpu.wait_smem_to_gmem(0)


def _sum(own, work: mosaic_stream.Work, group: Array, listed: list, ragged: bool) -> Array:
    """The gradient, [ROWS d]."""
    width = own.q_tile.shape[-1]
    shape = (ROWS, QUERIES.tile)
    scale = 1 / math.sqrt(width)
    sums = block.per_row(own.sums_tile.at[group])
    mean = block.per_row(own.mean_tile.at[group])

    def step(at, total, *, whole: bool):
        slot = lax.rem(at, jnp.int32(QUERIES.stages))
        plgpu.barrier_wait(own.k_loaded.at[slot])
        scores = block.product(own.q_tile.at[group], own.k_tile.at[slot])
        if not whole:
            scores = block.masked(scores, mosaic_stream.filled(listed, work.first + at))
        weights = jnp.exp2(scores * (scale * block.LOG2E) - block.across(sums, shape))
        plgpu.barrier_wait(own.v_loaded.at[slot])
        change = block.product(own.grad_tile.at[group], own.v_tile.at[slot])
        plgpu.barrier_arrive(own.v_consumed.at[slot])
        change = weights * (change - block.across(mean, shape))
        total = block.added(total, change.astype(jnp.bfloat16), own.k_tile.at[slot])
        plgpu.barrier_arrive(own.k_consumed.at[slot])
        return total

    total = block.zeros(ROWS, width)
    total = lax.fori_loop(0, work.whole, functools.partial(step, whole=True), total)
    if ragged:
        total = lax.fori_loop(work.whole, work.total, functools.partial(step, whole=False), total)
    return total * scale
