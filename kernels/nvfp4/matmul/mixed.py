"""The kernel of wgmma.py. Mosaic takes long to import, so that only calls import it.

A block makes one tile of the result, transposed: weights are what tensor cores take from registers,
where they are unpacked. Of three warpgroups one loads, and two multiply 64 weight rows each. A
value times its scale has six significant bits, so that bfloat16 holds it exactly.
"""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32, UInt8
from longlive_kernels import jax_versions
from longlive_kernels.nvfp4.format import BLOCK
from longlive_kernels.nvfp4.matmul.wgmma import BLOCKS, DEPTH, HALF, MULTIPLIERS, ROWS

# Twice the magnitudes of e2m1, four bits each, the first lowest: 0 1 2 3 4 6 8 12.
DOUBLED = 0xC8643210 - 2**32


def product(
    x: BFloat16[Array, "m k"],
    w: UInt8[Array, "n half"],
    scales: BFloat16[Array, "blocks n"],
    unit: Float32[Array, " 1"],
    rows: int,
) -> BFloat16[Array, "m n"]:
    """unit · x wᵀ of twice the values of `wgmma.py:interleaved` weights; `rows` of x to a tile."""
    (m, k), n = x.shape, w.shape[0]
    grid = (m // rows, n // (MULTIPLIERS * ROWS))
    return plgpu.kernel(
        functools.partial(_kernel, grid=grid, steps=k // DEPTH, rows=rows),
        out_type=jax.ShapeDtypeStruct((m, n), jnp.bfloat16),
        grid=(grid[0] * grid[1],),
        grid_names=("tile",),
        num_threads=MULTIPLIERS + 1,
        thread_name="group",
        scratch_types=_scratch(rows, BLOCKS.stages),
        compiler_params=jax_versions.compiler_params(),
    )(x, w, scales, unit)


def doubled(codes: Int32[Array, "r c"]) -> BFloat16[Array, "r c"]:
    """Twice the values of e2m1 codes."""
    table = jnp.full(codes.shape, DOUBLED, jnp.int32)
    whole = lax.shift_right_logical(table, (codes & 7) * 4) & 15
    # The bits of 128 + whole: GPUs convert integers at a fraction of the rate of sums.
    bits = (whole | 0x4300).astype(jnp.int16)
    size = lax.bitcast_convert_type(bits, jnp.bfloat16) - jnp.bfloat16(128)
    return jnp.where(codes < 8, size, -size)


def _scratch(rows: int, stages: int) -> dict:
    swizzled = (plgpu.TilingTransform((8, HALF)), plgpu.SwizzleTransform(2 * HALF))
    made = MULTIPLIERS * ROWS
    return dict(
        x_tile=plgpu.SMEM((stages, rows, DEPTH), jnp.bfloat16, transforms=swizzled),
        w_tile=plgpu.SMEM((stages, made, DEPTH // 2), jnp.uint8),
        scale_tile=plgpu.SMEM((stages, DEPTH // BLOCK, made), jnp.bfloat16),
        out_tile=plgpu.SMEM((MULTIPLIERS, rows, ROWS), jnp.bfloat16, transforms=swizzled),
        loaded=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        consumed=plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=stages),
    )


def _kernel(*refs, grid: tuple[int, int], steps: int, rows: int, **scratch):
    *operands, unit, out = refs
    own = types.SimpleNamespace(**scratch)
    group = lax.axis_index("group")
    i, j = plgpu.planar_snake(lax.axis_index("tile"), grid, 1, BLOCKS.band)
    made = MULTIPLIERS * ROWS

    @pl.when(group == MULTIPLIERS)
    def _():
        plgpu.set_max_registers(BLOCKS.registers[0], action="decrease")
        _load(operands, own, (pl.ds(i * rows, rows), pl.ds(j * made, made)), steps)

    @pl.when(group < MULTIPLIERS)
    def _():
        plgpu.set_max_registers(BLOCKS.registers[1], action="increase")
        multiply = functools.partial(_multiply, own=own, group=group, steps=steps)
        sums = pl.run_scoped(multiply, plgpu.ACC((ROWS, rows), jnp.float32))
        scaled = (sums * unit[0]).astype(jnp.bfloat16)
        jax_versions.transposed(own.out_tile.at[group])[...] = plgpu.layout_cast(
            scaled, plgpu.Layout.WGMMA_TRANSPOSED
        )
        plgpu.commit_smem()
        columns = pl.ds(j * made + group * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(own.out_tile.at[group], out.at[pl.ds(i * rows, rows), columns])
        plgpu.wait_smem_to_gmem(0)


def _load(operands: list, own, places: tuple, steps: int):
    x, w, scales = operands
    rows, made = places

    def wait(at, _):
        plgpu.barrier_wait(own.consumed.at[lax.rem(at, jnp.int32(BLOCKS.stages))])

    def step(at, _):
        slot = lax.rem(at, jnp.int32(BLOCKS.stages))
        pl.when(at >= BLOCKS.stages)(lambda: wait(at, None))

        def columns(each: int):
            return pl.ds(at * (DEPTH // each), DEPTH // each)

        for source, target in (
            (x.at[rows, columns(1)], own.x_tile),
            (w.at[made, columns(2)], own.w_tile),
            (scales.at[columns(BLOCK), made], own.scale_tile),
        ):
            plgpu.copy_gmem_to_smem(source, target.at[slot], own.loaded.at[slot])

    lax.fori_loop(0, steps, step, None)
    lax.fori_loop(max(steps - BLOCKS.stages, 0), steps, wait, None)


def _multiply(total, *, own, group: Array, steps: int):
    """The sums, [ROWS rows]."""
    layout = plgpu.Layout.WGMMA
    mine = pl.ds(group * ROWS, ROWS)
    place = plgpu.broadcasted_iota(jnp.int32, (ROWS, HALF), 1, layout=layout)

    def spread(slot, first: int):
        """The scales of four blocks, [ROWS HALF]. Threads know their columns as they are compiled,
        so that nothing is left of the comparisons.
        """
        chosen = None
        for i in range(HALF // BLOCK):
            at = own.scale_tile.at[slot, first + i, mine]
            each = jax_versions.load(at, layout=layout.reduce(1), optimized=False)
            each = lax.broadcast_in_dim(each, (ROWS, HALF), (0,))
            chosen = each if i == 0 else jnp.where(place < i * BLOCK, chosen, each)
        return chosen

    def step(at, _):
        slot = lax.rem(at, jnp.int32(BLOCKS.stages))
        plgpu.barrier_wait(own.loaded.at[slot])
        codes = jax_versions.load(own.w_tile.at[slot, mine], layout=layout, optimized=False)
        codes = codes.astype(jnp.int32)
        for half in range(2):
            weights = doubled((codes >> (4 * half)) & 15)
            weights = weights * spread(slot, half * (HALF // BLOCK))
            columns = own.x_tile.at[slot, :, pl.ds(half * HALF, HALF)]
            plgpu.wgmma(total, weights, jax_versions.transposed(columns))
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(own.consumed.at[slot])

    lax.fori_loop(0, steps, step, None)
    return total[...]
