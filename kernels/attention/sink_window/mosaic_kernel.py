"""The kernel of mosaic.py: an online softmax (arXiv 2205.14135, algorithm 1) over listed slots.

A block has 128 queries of one frame and one head. Of its warpgroups one loads, and two, which have
64 queries each, take turns: one multiplies while the other has its softmax (arXiv 2407.08608,
section 3.1). Mosaic takes long to import, so that only calls import this.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Int32
from longlive_kernels.attention import mosaic_block as block
from longlive_kernels.attention.sink_window import mosaic_load as load
from longlive_kernels.attention.sink_window.mosaic import DEPTH, WIDTH, Plan
from longlive_kernels.attention.tile import GROUPS, ROWS, TILE

Scalar = Int32[Array, ""]
Ref = Any  # of Mosaic, to arrays or parts of them
NEVER = -1e30  # below every score, and finite


@dataclasses.dataclass(frozen=True)
class Work:
    """A block's query frame of all rows, head, and tile of queries."""

    frame: Scalar
    head: Scalar
    tile: Scalar

    @classmethod
    def of(cls, frames: int, tiles: int) -> Work:
        """Blocks that run together have one head, so that they share what they load."""
        at = lax.axis_index("block")
        rest = lax.div(at, jnp.int32(tiles))
        tile, frame = lax.rem(at, jnp.int32(tiles)), lax.rem(rest, jnp.int32(frames))
        return cls(frame, lax.div(rest, jnp.int32(frames)), tile)

    def queries(self, x: Ref, group: Scalar | int) -> Ref:
        """The rows of a warpgroup. What lies beyond the frame is read as zeros, and not written."""
        rows = pl.ds(self.tile * TILE + group * ROWS, ROWS)
        return x.at[self.frame, rows, pl.ds(self.head * WIDTH, WIDTH)]


def attended(
    q: BFloat16[Array, "bf s ad"],
    lists: Int32[Array, "bf columns"],
    sources: list[tuple[Array, ...]],
    plan: Plan,
) -> BFloat16[Array, "bf s ad"]:
    """sources: of keys and of values: the table, with its scales if there are any; fresh frames."""
    tiles = pl.cdiv(plan.tokens, TILE)
    sizes = tuple(map(len, sources))
    return plgpu.kernel(
        functools.partial(_kernel, plan=plan, sizes=sizes),
        out_type=jax.ShapeDtypeStruct(q.shape, jnp.bfloat16),
        grid=(plan.heads * q.shape[0] * tiles,),
        grid_names=("block",),
        num_threads=GROUPS + 1,
        thread_name="group",
        kernel_name=f"sink_window_{plan.kind}",
        scratch_types=_scratch(plan),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, lists, *(x for source in sources for x in source))


def _scratch(plan: Plan) -> dict:
    stages = plan.blocks.stages
    return dict(
        q_tile=block.swizzled(GROUPS, ROWS, WIDTH),
        q_loaded=plgpu.Barrier(num_arrivals=GROUPS),
        turns=plgpu.Barrier(num_arrivals=GROUPS),
        k_tile=block.swizzled(stages, plan.blocks.keys, WIDTH),
        v_tile=block.swizzled(stages, plan.blocks.keys, WIDTH),
        **block.barriers("k", stages),
        **block.barriers("v", stages),
        **load.scratch(plan),
    )


def _kernel(*refs, plan: Plan, sizes: tuple[int, ...], **scratch):
    q, lists, *given, out = refs
    own, group = types.SimpleNamespace(**scratch), lax.axis_index("group")
    work = Work.of(q.shape[0], pl.cdiv(plan.tokens, TILE))

    @pl.when(group == GROUPS)
    def _():
        plgpu.set_max_registers(plan.blocks.registers[0], action="decrease")
        for each in range(GROUPS):
            plgpu.copy_gmem_to_smem(work.queries(q, each), own.q_tile.at[each], own.q_loaded)
        load.stream(own, work, lists, [tuple(given[: sizes[0]]), tuple(given[sizes[0] :])], plan)

    @pl.when(group < GROUPS)
    def _():
        plgpu.set_max_registers(plan.blocks.registers[1], action="increase")
        plgpu.barrier_wait(own.q_loaded)
        slots = sum(lists[work.frame, 1 + n] for n in range(len(plan.lists)))
        own.q_tile.at[group][...] = _attend(own, group, slots, plan).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own.q_tile.at[group], work.queries(out, group))
        plgpu.wait_smem_to_gmem(0)


def _attend(own, group: Array, slots: Scalar, plan: Plan):
    """The output of a warpgroup's queries over so many slots, [ROWS WIDTH]."""
    scale = block.LOG2E / math.sqrt(WIDTH)

    def turn():
        plgpu.barrier_arrive(own.turns)
        plgpu.barrier_wait(own.turns)

    def products(tile, total):
        plgpu.wgmma(total, own.q_tile.at[group], plgpu.transpose_ref(tile, (1, 0)))
        turn()
        return total[...]

    def step(at, state, *, keys: int):
        """A tile of keys, of which so many are there."""
        out, top, total = state
        shape = (ROWS, keys + -keys % DEPTH)
        stage = lax.rem(at, jnp.int32(plan.blocks.stages))
        rows = (stage, pl.ds(0, shape[1]))
        plgpu.barrier_wait(own.k_loaded.at[stage])
        scores = pl.run_scoped(
            functools.partial(products, own.k_tile.at[rows]), plgpu.ACC(shape, jnp.float32)
        )
        plgpu.barrier_arrive(own.k_consumed.at[stage])
        if keys < shape[1]:
            scores = block.masked(scores, jnp.int32(keys))
        highest = jnp.maximum(top, scores.max(1) * scale)
        fade = jnp.exp2(top - highest)
        weights = jnp.exp2(scores * scale - block.across(highest, shape))
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

    def slot(number, state):
        first, whole = number * plan.parts, plan.tokens // plan.blocks.keys
        each = functools.partial(step, keys=plan.blocks.keys)
        state = lax.fori_loop(first, first + whole, each, state)
        return step(first + whole, state, keys=plan.tail) if plan.tail else state

    state = (block.zeros(ROWS, WIDTH), block.zeros(ROWS) + NEVER, block.zeros(ROWS))
    pl.when(group == 1)(turn)  # is half a step behind
    out, _, total = lax.fori_loop(0, slots, slot, state)
    pl.when(group == 0)(turn)
    return out * block.across(jnp.where(total > 0, 1.0 / total, 0.0), out.shape)
