"""The kernel for Blackwell: an online softmax (arXiv 2205.14135, algorithm 1) over listed slots.

A block has 256 queries of one frame and one head; see attention/mosaic_tcgen05.py. Of the last
block of a frame, a half without queries is left out.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from longlive_kernels.attention import mosaic_block as block
from longlive_kernels.attention import mosaic_tcgen05 as tcgen05
from longlive_kernels.attention.sink_window import mosaic_load as load
from longlive_kernels.attention.sink_window import mosaic_turn
from longlive_kernels.attention.sink_window.mosaic import WIDTH, Plan
from longlive_kernels.attention.sink_window.mosaic_kernel import Kernel, Scalar, Work, over
from longlive_kernels.attention.tile import GROUPS

SCALE = block.LOG2E / math.sqrt(WIDTH)


def _scratch(plan: Plan) -> dict:
    made = tcgen05.scratch(plan.blocks.keys, WIDTH, plan.blocks.stages) | load.scratch(plan)
    if plan.turned:
        made["turned"] = plgpu.Barrier(num_barriers=GROUPS)
    return made


def _body(own, work: Work):
    group, plan = lax.axis_index("group"), work.plan
    loads, has_softmax = plan.blocks.registers

    @pl.when(group == tcgen05.LOADS)
    def _():
        plgpu.set_max_registers(loads, action="decrease")
        for each in range(GROUPS):
            copy = functools.partial(work.load, own.q_loaded.at[each], each, own.q_tile)
            pl.when(work.holds(each))(copy)
        load.stream(own, work)

    @pl.when(group == tcgen05.ASKS)
    def _():
        plgpu.set_max_registers(tcgen05.ASKING, action="decrease")
        here = [work.holds(each) for each in range(GROUPS)]

        def ready(at, group):
            first = lax.rem(at, jnp.int32(plan.parts)) == 0
            pl.when(first)(lambda: plgpu.barrier_wait(own.turned.at[group]))

        wait = ready if plan.turned else None
        tcgen05.multiply(own, work.slots * plan.parts, here, _sized(plan), wait)

    @pl.when((group < GROUPS) & work.holds(group))
    def _():
        plgpu.set_max_registers(has_softmax, action="increase")
        # Asked anew: what all warpgroups keep is what ptxas spills.
        group = lax.axis_index("group")

        def enter(number):
            """The scores of the slot before are there: its queries have been multiplied."""
            if plan.turned:
                # There is no room for the pairs in shared memory.
                tile, pairs = own.q_tile.at[group], work.queries(work.turning[0], group)
                mosaic_turn.turn(tile, pairs, work.turn(number), plan, plgpu.Layout.TCGEN05)
                plgpu.barrier_arrive(own.turned.at[group])

        def step(at, state, *, keys: int):
            multiplied = plan.multiplied(keys)
            count = jnp.int32(keys) if keys < multiplied else None
            return tcgen05.weigh(own, group, state, SCALE, multiplied, count)

        if plan.turned:
            plgpu.barrier_wait(own.q_loaded.at[group])
        _, total = over(work.slots, step, tcgen05.begun(own, group), plan, enter)
        tcgen05.finish(own, group, total)
        work.store(own.q_tile.at[group], group)


def _sized(plan: Plan):
    """Of the last tile of a slot fewer keys are multiplied, if it is not whole."""
    whole, tail = plan.blocks.keys, plan.multiplied(plan.tail)

    def sized(at: Scalar, product: tcgen05.Product):
        if tail in (0, whole):
            product(whole)
            return
        last = lax.rem(at, jnp.int32(plan.parts)) == plan.parts - 1
        pl.when(last)(lambda: product(tail))
        pl.when(~last)(lambda: product(whole))

    return sized


KERNEL = Kernel(_body, _scratch, rows=tcgen05.ROWS, warpgroups=tcgen05.WARPGROUPS)
