"""The kernel for Hopper: an online softmax (arXiv 2205.14135, algorithm 1) over listed slots.

A block has 128 queries of one frame and one head. Of its warpgroups one loads, and two, which have
64 queries each, take turns: one multiplies while the other has its softmax (arXiv 2407.08608,
section 3.1).
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array
from longlive_kernels import jax_versions
from longlive_kernels.attention import mosaic_block as block
from longlive_kernels.attention.sink_window import mosaic_load as load
from longlive_kernels.attention.sink_window import mosaic_turn
from longlive_kernels.attention.sink_window.mosaic import WIDTH, Plan
from longlive_kernels.attention.sink_window.mosaic_kernel import Kernel, Work, over
from longlive_kernels.attention.tile import GROUPS, ROWS

NEVER = -1e30  # below every score, and finite
SMALLEST = 1e-30  # scale of queries


def _scratch(plan: Plan) -> dict:
    stages, eight, kind = plan.blocks.stages, plan.eight, plan.multiplies
    made = dict(
        q_tile=block.swizzled(GROUPS, ROWS, WIDTH, dtype=kind),
        q_loaded=plgpu.Barrier(num_arrivals=(1 + eight + plan.turned) * GROUPS),
        turns=plgpu.Barrier(num_arrivals=GROUPS),
        k_tile=block.swizzled(stages, plan.blocks.keys, WIDTH, dtype=kind),
        v_tile=block.swizzled(stages, plan.blocks.keys, WIDTH),
        **block.barriers("k", stages, 1 + eight),
        **block.barriers("v", stages),
        **load.scratch(plan),
    )
    if plan.turned:
        made["q_pairs"] = block.swizzled(GROUPS, ROWS, WIDTH)
    if eight:  # queries have no room for the result
        made["q_scales"] = plgpu.SMEM((GROUPS, 1, ROWS), jnp.float32)
        made["out_tile"] = block.swizzled(GROUPS, ROWS, WIDTH)
    return made


def _body(own, work: Work):
    group, plan = lax.axis_index("group"), work.plan

    @pl.when(group == GROUPS)
    def _():
        plgpu.set_max_registers(plan.blocks.registers[0], action="decrease")
        more = {}
        if plan.eight:
            more["scales"] = own.q_scales
        if plan.turned:
            more["pairs"] = own.q_pairs
        for each in range(GROUPS):
            work.load(own.q_loaded, each, own.q_tile, **more)
        load.stream(own, work)

    @pl.when(group < GROUPS)
    def _():
        plgpu.set_max_registers(plan.blocks.registers[1], action="increase")
        plgpu.barrier_wait(own.q_loaded)
        out = (own.out_tile if plan.eight else own.q_tile).at[group]
        out[...] = _attend(own, group, work).astype(jnp.bfloat16)
        plgpu.commit_smem()
        work.store(out, group)


def _attend(own, group: Array, work: Work):
    """The output of a warpgroup's queries, [ROWS WIDTH]."""
    plan = work.plan
    scale = block.LOG2E / math.sqrt(WIDTH)
    if plan.eight:
        # Never zero: of keys that are not there scores are -inf.
        scale = jnp.maximum(block.per_row(own.q_scales.at[group, 0]) * scale, SMALLEST)
    sums = jnp.int32 if plan.multiplies == jnp.int8 else jnp.float32

    def turn():
        plgpu.barrier_arrive(own.turns)
        plgpu.barrier_wait(own.turns)

    def enter(number):
        if plan.turned:
            plgpu.commit_smem()  # all of the warpgroup have done with the slot before
            tile, pairs = own.q_tile.at[group], own.q_pairs.at[group]
            mosaic_turn.turn(tile, pairs, work.turn(number), plan, block.LAYOUT)

    def products(tile, total):
        plgpu.wgmma(total, own.q_tile.at[group], jax_versions.transposed(tile))
        turn()
        return total[...]

    def step(at, state, *, keys: int):
        """A tile of keys, of which so many are there."""
        out, top, total = state
        shape = (ROWS, plan.multiplied(keys))
        stage = lax.rem(at, jnp.int32(plan.blocks.stages))
        rows = (stage, pl.ds(0, shape[1]))
        plgpu.barrier_wait(own.k_loaded.at[stage])
        scores = pl.run_scoped(
            functools.partial(products, own.k_tile.at[rows]), plgpu.ACC(shape, sums)
        )
        if plan.eight:
            of_keys = block.per_column(own.k_scales.at[stage, 0, pl.ds(0, shape[1])])
            scores = scores.astype(jnp.float32) * block.down(of_keys, shape)
        plgpu.barrier_arrive(own.k_consumed.at[stage])
        if keys < shape[1]:
            scores = block.masked(scores, jnp.int32(keys))
        highest = jnp.maximum(top, scores.max(1) * scale)
        fade = jnp.exp2(top - highest)
        scores *= block.across(scale, shape) if plan.eight else scale
        weights = jnp.exp2(scores - block.across(highest, shape))
        total = total * fade + weights.sum(1)
        out = out * block.across(fade, out.shape)
        weights = weights.astype(jnp.bfloat16)
        # All of it before the turn, which the compiler would not know.
        out, highest, total, weights = lax.optimization_barrier((out, highest, total, weights))
        plgpu.barrier_wait(own.v_loaded.at[stage])
        turn()
        out = block.added(out, weights, own.v_tile.at[rows])
        plgpu.barrier_arrive(own.v_consumed.at[stage])
        return out, highest, total

    state = (block.zeros(ROWS, WIDTH), block.zeros(ROWS) + NEVER, block.zeros(ROWS))
    pl.when(group == 1)(turn)  # is half a step behind
    out, _, total = over(work.slots, step, state, plan, enter)
    pl.when(group == 0)(turn)
    return out * block.across(jnp.where(total > 0, 1.0 / total, 0.0), out.shape)


KERNEL = Kernel(_body, _scratch, rows=ROWS, warpgroups=GROUPS + 1)
