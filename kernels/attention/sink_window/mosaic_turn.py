"""Keys that are turned as they are read, in the kernels of mosaic.py: queries are turned in their
place, the other way, once for each slot, as q · (R k) = (R⁻¹ q) · k. Keys are multiplied as they
lie.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array
from longlive_kernels import jax_versions
from longlive_kernels.attention import mosaic_block as block
from longlive_kernels.attention.sink_window.mosaic import HALF, Plan

Ref = Any  # of Mosaic, to arrays or parts of them


def turn(tile: Ref, pairs: Ref, turns: Ref, plan: Plan, layout: Any):
    """Queries of a warpgroup, which nothing multiplies meanwhile, as a slot's keys are multiplied
    with. tile: of queries. pairs, turns: of `mosaic.pairs` and `turns`. layout: in registers.
    """

    def angles(i: int) -> Array:
        each = jax_versions.load(turns.at[i], layout=layout.reduce(0), optimized=False)
        return plgpu.layout_cast(block.down(each, (tile.shape[0], HALF)), layout)

    def half(i: int) -> Array:
        channels = pairs.at[:, pl.ds(i * HALF, HALF)]
        return jax_versions.load(channels, layout=layout, optimized=False).astype(jnp.float32)

    (cos, sin), (this, other) = ([get(i) for i in range(2)] for get in (angles, half))
    tile.at[:, pl.ds(0, HALF)][...] = (this * cos + other * sin).astype(jnp.bfloat16)
    if plan.halves:
        tile.at[:, pl.ds(HALF, HALF)][...] = (other * cos - this * sin).astype(jnp.bfloat16)
    plgpu.commit_smem()
