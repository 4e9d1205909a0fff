"""Hopper's kernel of `mosaic.forward`: an online softmax (arXiv 2205.14135, algorithm 1).

The two warpgroups that multiply take turns: one multiplies while the other has its softmax
(arXiv 2407.08608, section 3.1).
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32
from longlive_kernels import jax_versions
from longlive_kernels.attention import mosaic_block as block
from longlive_kernels.attention.chunk_table import mosaic_stream
from longlive_kernels.attention.chunk_table.mosaic import FORWARD
from longlive_kernels.attention.chunk_table.mosaic_lists import Lists
from longlive_kernels.attention.tile import GROUPS, ROWS


def attended(
    q: BFloat16[Array, "b n a d"],
    k: BFloat16[Array, "b m a d"],
    v: BFloat16[Array, "b m a d"],
    lists: Lists,
) -> tuple[BFloat16[Array, "b n a d"], Float32[Array, "b a p"]]:
    """The output, and logarithms to the base of 2 of sums of exponentials, which say nothing in
    places without a query.
    """
    return kernel(_kernel, _scratch(q.shape[3]), GROUPS + 1, (q, k, v), lists)


def kernel(
    body: Callable[..., None],
    scratch: dict[str, Any],
    warpgroups: int,
    qkv: tuple[Array, Array, Array],
    lists: Lists,
) -> tuple[BFloat16[Array, "b n a d"], Float32[Array, "b a p"]]:
    """What `attended` gives, by this or another kernel."""
    b, _, a, _ = qkv[0].shape
    return plgpu.kernel(
        functools.partial(body, ragged=lists.ragged),
        out_type=(
            jax.ShapeDtypeStruct(qkv[0].shape, jnp.bfloat16),
            jax.ShapeDtypeStruct((b, a, lists.places), jnp.float32),
        ),
        grid=(b * a * len(lists.outer),),
        grid_names=("tile",),
        num_threads=warpgroups,
        thread_name="group",
        kernel_name="chunk_table_forward",
        scratch_types=scratch,
        compiler_params=jax_versions.compiler_params(approx_math=True),
    )(*qkv, *(jnp.asarray(x) for x in lists.arrays))


def _scratch(width: int) -> dict:
    return dict(
        q_tile=block.swizzled(GROUPS, ROWS, width),
        sums_tile=plgpu.SMEM((GROUPS, ROWS), jnp.float32),
        q_loaded=plgpu.Barrier(num_arrivals=GROUPS),
        turns=plgpu.Barrier(num_arrivals=GROUPS),
        k_tile=block.swizzled(FORWARD.stages, FORWARD.tile, width),
        v_tile=block.swizzled(FORWARD.stages, FORWARD.tile, width),
        **block.barriers("k", FORWARD.stages),
        **block.barriers("v", FORWARD.stages),
    )


def _kernel(*refs, ragged, **scratch):
    q, k, v, outer, *listed, out, sums = refs
    own = types.SimpleNamespace(**scratch)
    group = lax.axis_index("group")
    work = mosaic_stream.Work.of(outer, q.shape[2])

    @pl.when(group == GROUPS)
    def _():
        plgpu.set_max_registers(FORWARD.registers[0], action="decrease")
        for each in range(GROUPS):
            rows = work.tokens(q, work.start + each * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(rows, own.q_tile.at[each], own.q_loaded)
        mosaic_stream.stream(
            work,
            listed,
            mosaic_stream.Stream.of(own, "k", lambda start, _: work.tokens(k, start, FORWARD.tile)),
            mosaic_stream.Stream.of(own, "v", lambda start, _: work.tokens(v, start, FORWARD.tile)),
        )

    @pl.when(group < GROUPS)
    def _():
        plgpu.set_max_registers(FORWARD.registers[1], action="increase")
        plgpu.barrier_wait(own.q_loaded)
        total, logarithms = _attend(own, work, group, listed, ragged[1])
        own.q_tile.at[group][...] = total.astype(jnp.bfloat16)
        own.sums_tile.at[group][...] = logarithms
        plgpu.commit_smem()
        mosaic_stream.store(own.q_tile.at[group], out, work, ragged[0])
        place = work.places(sums, work.place + group * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(own.sums_tile.at[group], place)
        plgpu.wait_smem_to_gmem(0)


def _attend(own, work: mosaic_stream.Work, group: Array, listed: list, ragged: bool):
    """The output, [ROWS d], and the logarithms, [ROWS]."""
    width = own.q_tile.shape[-1]
    shape = (ROWS, FORWARD.tile)
    scale = block.LOG2E / math.sqrt(width)

    def turn():
        plgpu.barrier_arrive(own.turns)
        plgpu.barrier_wait(own.turns)

    def products(slot, scores):
        keys = jax_versions.transposed(own.k_tile.at[slot])
        plgpu.wgmma(scores, own.q_tile.at[group], keys)
        turn()
        return scores[...]

    def step(at, state, *, whole: bool):
        out, top, total = state
        slot = lax.rem(at, jnp.int32(FORWARD.stages))
        plgpu.barrier_wait(own.k_loaded.at[slot])
        accumulator = plgpu.ACC(shape, jnp.float32)
        scores = pl.run_scoped(functools.partial(products, slot), accumulator)
        plgpu.barrier_arrive(own.k_consumed.at[slot])
        if not whole:
            scores = block.masked(scores, mosaic_stream.filled(listed, work.first + at))
        # Finite: a tile has a key that its queries see.
        highest = jnp.maximum(top, scores.max(1) * scale)
        fade = jnp.exp2(top - highest)
        weights = jnp.exp2(scores * scale - block.across(highest, shape))
        total = total * fade + weights.sum(1)
        out = out * block.across(fade, out.shape)
        weights = weights.astype(jnp.bfloat16)
        # All of it before the turn, which the compiler would not know.
        out, highest, total, weights = lax.optimization_barrier((out, highest, total, weights))
        plgpu.barrier_wait(own.v_loaded.at[slot])
        turn()
        out = block.added(out, weights, own.v_tile.at[slot])
        plgpu.barrier_arrive(own.v_consumed.at[slot])
        return out, highest, total

    state = (block.zeros(ROWS, width), block.zeros(ROWS) - jnp.inf, block.zeros(ROWS))
    pl.when(group == 1)(turn)  # is half a step behind
    state = lax.fori_loop(0, work.whole, functools.partial(step, whole=True), state)
    if ragged:
        step = functools.partial(step, whole=False)
        state = lax.fori_loop(work.whole, work.total, step, state)
    pl.when(group == 0)(turn)
    out, top, total = state
    seen = total > 0
    share = jnp.where(seen, 1.0 / total, 0.0)
    logarithms = jnp.where(seen, top + jnp.log(total) * block.LOG2E, jnp.inf)
    return out * block.across(share, out.shape), logarithms
