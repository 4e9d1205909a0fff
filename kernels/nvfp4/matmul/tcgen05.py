"""The kernel of mosaic.py. Mosaic takes long to import, so that only calls import it.

A block of four warps makes one tile of the result: one warp loads, one multiplies, and all four
store. Its shared memory is less than half of a core's, so that of two blocks on a core one
multiplies while the other stores.
"""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float8e4m3fn, Float32
from longlive_kernels import jax_versions
from longlive_kernels.nvfp4.matmul.mosaic import Blocks

STORED = 64  # columns that are stored at a time


def product(
    a: Float[Array, "m k"],
    b: Float[Array, "n k"],
    a_scales: Float8e4m3fn[Array, "mt kt 32 16"],
    b_scales: Float8e4m3fn[Array, "nt kt 32 16"],
    unit: Float32[Array, " 1"],
    dtype,
    blocks: Blocks,
) -> Float[Array, "m n"]:
    """unit · a bᵀ of four-bit floats, whose scales lie as tensor cores read them."""
    (m, k), n = a.shape, b.shape[0]
    grid = (pl.cdiv(m, blocks.rows), pl.cdiv(n, blocks.columns))
    kernel = functools.partial(
        _kernel, grid=grid, steps=pl.cdiv(k, blocks.depth), blocks=blocks, dtype=dtype
    )
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((m, n), dtype),
        grid=(grid[0] * grid[1],),
        grid_names=("tile",),
        scratch_types=_scratch(blocks, dtype),
        compiler_params=jax_versions.compiler_params(),
    )(a, b, a_scales, b_scales, unit)


def _scratch(blocks: Blocks, dtype) -> dict:
    def values(rows: int):
        # Rows are swizzled over 8 of them.
        swizzle = plgpu.find_swizzle(blocks.depth * 4)
        transforms = (plgpu.TilingTransform((8, 2 * swizzle)), plgpu.SwizzleTransform(swizzle))
        shape = (blocks.stages, rows, blocks.depth)
        return plgpu.SMEM(shape, jnp.float4_e2m1fn, transforms=transforms)

    def scales(rows: int):
        shape = (blocks.stages, rows // 128, blocks.groups, 32, 16)
        return plgpu.SMEM(shape, jnp.float8_e4m3fn)

    def held(rows: int):
        shape = (rows, blocks.stages * blocks.scales)
        return plgpu.TMEM(shape, jnp.float8_e4m3fn, layout=plgpu.TMEMLayout.SCALES_LAYOUT)

    stored = (plgpu.TilingTransform((8, STORED)), plgpu.SwizzleTransform(2 * STORED))
    return dict(
        a=values(blocks.rows),
        b=values(blocks.columns),
        a_scales=scales(blocks.rows),
        b_scales=scales(blocks.columns),
        a_held=held(blocks.rows),
        b_held=held(blocks.columns),
        total=plgpu.TMEM((blocks.rows, blocks.columns), jnp.float32),
        stored=plgpu.SMEM((blocks.rows, STORED), dtype, transforms=stored),
        loaded=plgpu.Barrier(num_arrivals=4, num_barriers=blocks.stages),
        consumed=plgpu.Barrier(num_barriers=blocks.stages, orders_tensor_core=True),
        done=plgpu.Barrier(orders_tensor_core=True),
    )


def _kernel(*refs, grid: tuple[int, int], steps: int, blocks: Blocks, dtype, **scratch):
    *operands, unit, out = refs
    own = types.SimpleNamespace(**scratch)
    i, j = plgpu.planar_snake(lax.axis_index("tile"), grid, 1, blocks.band)

    @jax_versions.for_each_warp("warp")
    def _():
        warp = lax.axis_index("warp")

        @pl.when(warp == 0)
        def _():
            _load(operands, own, (i, j), steps, blocks)

        @pl.when(warp == 1)
        def _():
            _multiply(own, steps, blocks)
            plgpu.tcgen05_commit_arrive(own.done)

    plgpu.barrier_wait(own.done)
    # What lies beyond the edges of the result is not written.
    rows = pl.ds(i * blocks.rows, blocks.rows)
    for start in range(0, blocks.columns, STORED):
        sums = plgpu.async_load_tmem(own.total.at[:, pl.ds(start, STORED)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        own.stored[...] = (sums * unit[0]).astype(dtype)
        plgpu.commit_smem()
        columns = pl.ds(j * blocks.columns + start, STORED)
        plgpu.copy_smem_to_gmem(own.stored, out.at[rows, columns])
    plgpu.wait_smem_to_gmem(0)


def _load(operands: list, own, tile: tuple[Array, Array], steps: int, blocks: Blocks):
    """What lies beyond the edges of operands is read as zeros."""
    sizes = (blocks.rows, blocks.columns, blocks.rows // 128, blocks.columns // 128)
    targets = (own.a, own.b, own.a_scales, own.b_scales)

    def step(at, _):
        slot = lax.rem(at, jnp.int32(blocks.stages))

        @pl.when(at >= blocks.stages)
        def _():
            plgpu.barrier_wait(own.consumed.at[slot])

        for n, (source, target, size) in enumerate(zip(operands, targets, sizes, strict=True)):
            depth = blocks.depth if n < 2 else blocks.groups
            place = pl.ds(tile[n % 2] * size, size), pl.ds(at * depth, depth)
            plgpu.copy_gmem_to_smem(source.at[place], target.at[slot], own.loaded.at[slot])

    lax.fori_loop(0, steps, step, None)


def _multiply(own, steps: int, blocks: Blocks):
    def step(at, _):
        slot = lax.rem(at, jnp.int32(blocks.stages))
        plgpu.barrier_wait(own.loaded.at[slot])
        # Scales have a place for every stage: a product may still read those of the last.
        columns = pl.ds(slot * blocks.scales, blocks.scales)
        a_held, b_held = own.a_held.at[:, columns], own.b_held.at[:, columns]
        plgpu.async_copy_scales_to_tmem(own.a_scales.at[slot], a_held)
        plgpu.async_copy_scales_to_tmem(own.b_scales.at[slot], b_held)
        plgpu.tcgen05_mma(
            own.total,
            own.a.at[slot],
            jax_versions.transposed(own.b.at[slot]),
            own.consumed.at[slot],
            a_scale=a_held,
            b_scale=b_held,
            accumulate=at > 0,
        )

    lax.fori_loop(0, steps, step, None)
