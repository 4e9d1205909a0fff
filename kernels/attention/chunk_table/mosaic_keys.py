"""Hopper's kernel of the gradients of k and v; see `mosaic.backward`.

Scores are made transposed, keys in rows: so they are what tensor cores take from registers.
"""

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
from longlive_kernels.attention.chunk_table.mosaic import KEYS
from longlive_kernels.attention.chunk_table.mosaic_lists import Lists
from longlive_kernels.attention.tile import GROUPS, ROWS


def of_keys(
    q: BFloat16[Array, "b n a d"],
    k: BFloat16[Array, "b m a d"],
    v: BFloat16[Array, "b m a d"],
    grad: BFloat16[Array, "b n a d"],
    sums: Float32[Array, "b a p"],
    mean: Float32[Array, "b a p"],
    lists: Lists,
) -> tuple[BFloat16[Array, "b m a d"], BFloat16[Array, "b m a d"]]:
    """The gradients of k and v. sums, mean: as `mosaic.backward` makes them."""
    b, _, a, d = k.shape
    return plgpu.kernel(
        functools.partial(_kernel, ragged=lists.ragged[0]),
        out_type=(jax.ShapeDtypeStruct(k.shape, jnp.bfloat16),) * 2,
        grid=(b * a * len(lists.outer),),
        grid_names=("tile",),
        num_threads=GROUPS + 1,
        thread_name="group",
        kernel_name="chunk_table_keys",
        scratch_types=_scratch(d),
        compiler_params=jax_versions.compiler_params(approx_math=True),
    )(q, k, v, grad, sums, mean, *(jnp.asarray(x) for x in lists.arrays))


def _scratch(width: int) -> dict:
    return dict(
        k_tile=block.swizzled(GROUPS, ROWS, width),
        v_tile=block.swizzled(GROUPS, ROWS, width),
        rows_loaded=plgpu.Barrier(num_arrivals=2 * GROUPS),
        q_tile=block.swizzled(KEYS.stages, KEYS.tile, width),
        grad_tile=block.swizzled(KEYS.stages, KEYS.tile, width),
        sums_tile=plgpu.SMEM((KEYS.stages, KEYS.tile), jnp.float32),
        mean_tile=plgpu.SMEM((KEYS.stages, KEYS.tile), jnp.float32),
        **block.barriers("q", KEYS.stages, arrivals=2),
        **block.barriers("grad", KEYS.stages, arrivals=2),
    )


def _kernel(*refs, ragged, **scratch):
    q, k, v, grad, sums, mean, outer, *listed, dk, dv = refs
    own = types.SimpleNamespace(**scratch)
    group = lax.axis_index("group")
    work = mosaic_stream.Work.of(outer, q.shape[2])

    @pl.when(group == GROUPS)
    def _():
        plgpu.set_max_registers(KEYS.registers[0], action="decrease")
        for each in range(GROUPS):
            for source, tile in ((k, own.k_tile), (v, own.v_tile)):
                rows = work.tokens(source, work.start + each * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(rows, tile.at[each], own.rows_loaded)
        mosaic_stream.stream(
            work,
            listed,
            mosaic_stream.Stream.of(
                own,
                "q",
                lambda start, _: work.tokens(q, start, KEYS.tile),
                sums=lambda _, place: work.places(sums, place, KEYS.tile),
            ),
            mosaic_stream.Stream.of(
                own,
                "grad",
                lambda start, _: work.tokens(grad, start, KEYS.tile),
                mean=lambda _, place: work.places(mean, place, KEYS.tile),
            ),
        )

    @pl.when(group < GROUPS)
    def _():
        plgpu.set_max_registers(KEYS.registers[1], action="increase")
        plgpu.barrier_wait(own.rows_loaded)
        totals = _sums(own, work, group)
        for total, tile in zip(totals, (own.k_tile, own.v_tile), strict=True):
            tile.at[group][...] = total.astype(jnp.bfloat16)
        plgpu.commit_smem()
        mosaic_stream.store(own.k_tile.at[group], dk, work, ragged)
        mosaic_stream.store(own.v_tile.at[group], dv, work, ragged)
        plgpu.wait_smem_to_gmem(0)


def _sums(own, work: mosaic_stream.Work, group: Array) -> tuple[Array, Array]:
    """The gradients of k and v, [ROWS d]. Places without a query have sums of inf: no weight."""
    width = own.k_tile.shape[-1]
    shape = (ROWS, KEYS.tile)
    scale = 1 / math.sqrt(width)

    def step(at, totals):
        of_k, of_v = totals
        slot = lax.rem(at, jnp.int32(KEYS.stages))
        plgpu.barrier_wait(own.q_loaded.at[slot])
        scores = block.product(own.k_tile.at[group], own.q_tile.at[slot])
        sums = block.down(block.per_column(own.sums_tile.at[slot]), shape)
        weights = jnp.exp2(scores * (scale * block.LOG2E) - sums)
        plgpu.barrier_wait(own.grad_loaded.at[slot])
        change = block.product(own.v_tile.at[group], own.grad_tile.at[slot])
        of_v = block.added(of_v, weights.astype(jnp.bfloat16), own.grad_tile.at[slot])
        mean = block.down(block.per_column(own.mean_tile.at[slot]), shape)
        plgpu.barrier_arrive(own.grad_consumed.at[slot])
        change = (weights * (change - mean)).astype(jnp.bfloat16)
        of_k = block.added(of_k, change, own.q_tile.at[slot])
        plgpu.barrier_arrive(own.q_consumed.at[slot])
        return of_k, of_v

    totals = block.zeros(ROWS, width), block.zeros(ROWS, width)
    of_k, of_v = lax.fori_loop(0, work.total, step, totals)
    return of_k * scale, of_v
