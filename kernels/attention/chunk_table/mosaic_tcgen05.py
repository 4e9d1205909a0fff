"""Blackwell's kernel of `mosaic.forward`: an online softmax (arXiv 2205.14135, algorithm 1).

A block has 256 queries of one head; see attention/mosaic_tcgen05.py.
"""

from __future__ import annotations

import functools
import math
import types

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32
from longlive_kernels.attention import mosaic_block as block
from longlive_kernels.attention import mosaic_tcgen05 as tcgen05
from longlive_kernels.attention.chunk_table import mosaic_stream
from longlive_kernels.attention.chunk_table.mosaic import BLACKWELL
from longlive_kernels.attention.chunk_table.mosaic_forward import kernel
from longlive_kernels.attention.chunk_table.mosaic_lists import Lists
from longlive_kernels.attention.mosaic_tcgen05 import ROWS
from longlive_kernels.attention.tile import GROUPS


def attended(
    q: BFloat16[Array, "b n a d"],
    k: BFloat16[Array, "b m a d"],
    v: BFloat16[Array, "b m a d"],
    lists: Lists,
) -> tuple[BFloat16[Array, "b n a d"], Float32[Array, "b a p"]]:
    """As `mosaic_forward.attended`, by lists of tiles of 256 queries."""
    scratch = tcgen05.scratch(BLACKWELL.tile, q.shape[3], BLACKWELL.stages)
    scratch |= dict(sums_tile=plgpu.SMEM((GROUPS, ROWS), jnp.float32))
    return kernel(_kernel, scratch, tcgen05.WARPGROUPS, (q, k, v), lists)


def _kernel(*refs, ragged, **scratch):
    q, k, v, outer, *listed, out, sums = refs
    own = types.SimpleNamespace(**scratch)
    group = lax.axis_index("group")
    work = mosaic_stream.Work.of(outer, q.shape[2])
    loads, has_softmax = BLACKWELL.registers

    def holds(each):
        """Whether a warpgroup has queries."""
        return each * ROWS < work.count

    def load(each: int):
        rows = work.tokens(q, work.start + each * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(rows, own.q_tile.at[each], own.q_loaded.at[each])

    @pl.when(group == tcgen05.LOADS)
    def _():
        plgpu.set_max_registers(loads, action="decrease")
        for each in range(GROUPS):
            pl.when(holds(each))(functools.partial(load, each))
        mosaic_stream.stream(
            work,
            listed,
            mosaic_stream.Stream.of(
                own, "k", lambda start, _: work.tokens(k, start, BLACKWELL.tile)
            ),
            mosaic_stream.Stream.of(
                own, "v", lambda start, _: work.tokens(v, start, BLACKWELL.tile)
            ),
        )

    @pl.when(group == tcgen05.ASKS)
    def _():
        plgpu.set_max_registers(tcgen05.ASKING, action="decrease")
        here = [holds(each) for each in range(GROUPS)]
        tcgen05.multiply(own, work.total, here, lambda _, product: product(BLACKWELL.tile))

    @pl.when((group < GROUPS) & holds(group))
    def _():
        plgpu.set_max_registers(has_softmax, action="increase")
        # Asked anew, here and in every step: what all warpgroups keep is what ptxas spills.
        group = lax.axis_index("group")
        _attend(own, work, group, listed, ragged[1])
        mosaic_stream.store(own.q_tile.at[group], out, work, ragged[0])
        place = work.places(sums, work.place + group * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(own.sums_tile.at[group], place)
        plgpu.wait_smem_to_gmem(0)


def _attend(own, work: mosaic_stream.Work, group: Array, listed: list, ragged: bool):
    """Leaves the output in place of the queries, and the logarithms beside it."""
    scale = block.LOG2E / math.sqrt(own.q_tile.shape[-1])

    def step(at, state, *, whole: bool):
        count = None if whole else mosaic_stream.filled(listed, work.first + at)
        return tcgen05.weigh(own, lax.axis_index("group"), state, scale, BLACKWELL.tile, count)

    state = tcgen05.begun(own, group)
    state = lax.fori_loop(0, work.whole, functools.partial(step, whole=True), state)
    if ragged:
        step = functools.partial(step, whole=False)
        state = lax.fori_loop(work.whole, work.total, step, state)
    top, total = state
    logarithms = top + jnp.log(total) * block.LOG2E
    own.sums_tile.at[group][...] = jnp.where(total > 0, logarithms, jnp.inf)
    tcgen05.finish(own, group, total)
