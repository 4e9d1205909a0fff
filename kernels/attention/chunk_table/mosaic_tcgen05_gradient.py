"""The kernels of the gradient for Blackwell (arXiv 2205.14135, algorithm 4); see `mosaic.backward`.

A block sums the gradients of 128 tokens of one side, and goes through tiles of the other. Of its
four warpgroups one loads, one asks the tensor cores for products, and two make weights, of every
other tile each: of one tile weights are multiplied while those of the next are made. Gradients of q
have queries in rows; those of k and v have keys in rows, and scores that are transposed. What is
summed, and the products of two tiles, fill the memory of the tensor cores; weights lie where their
scores were.
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
from longlive_kernels.attention import mosaic_tcgen05 as tcgen05
from longlive_kernels.attention.chunk_table import mosaic_stream
from longlive_kernels.attention.chunk_table.mosaic import GRADIENT
from longlive_kernels.attention.chunk_table.mosaic_lists import Lists
from longlive_kernels.attention.mosaic_tcgen05 import LAYOUT, PART, ROWS, STORED, Ref, Scalar
from longlive_kernels.attention.tile import GROUPS

Sums = Float32[Array, "b a p"]
Queries = BFloat16[Array, "b n a d"]
Keys = BFloat16[Array, "b m a d"]


def of_queries(
    q: Queries, k: Keys, v: Keys, grad: Queries, sums: Sums, mean: Sums, lists: Lists
) -> Queries:
    """As `mosaic_queries.of_queries`."""
    (dq,) = _gradients((q, grad), (k, v), sums, mean, lists, columns=False)
    return dq


def of_keys(
    q: Queries, k: Keys, v: Keys, grad: Queries, sums: Sums, mean: Sums, lists: Lists
) -> tuple[Keys, Keys]:
    """As `mosaic_keys.of_keys`."""
    return _gradients((k, v), (q, grad), sums, mean, lists, columns=True)


def _gradients(
    rows: tuple[Array, Array],
    listed: tuple[Array, Array],
    sums: Sums,
    mean: Sums,
    lists: Lists,
    *,
    columns: bool,
) -> tuple[Array, ...]:
    """Of the first of `rows`, or of both. Scores are products of the first of `rows` and of
    `listed`, their changes those of the others. columns: queries are listed, which `sums` and
    `mean` are of.
    """
    b, _, a, width = rows[0].shape
    return plgpu.kernel(
        functools.partial(_kernel, ragged=lists.ragged, columns=columns),
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in rows[: 1 + columns]),
        grid=(b * a * len(lists.outer),),
        grid_names=("tile",),
        num_threads=tcgen05.WARPGROUPS,
        thread_name="group",
        kernel_name="chunk_table_keys" if columns else "chunk_table_queries",
        scratch_types=_scratch(width, columns),
        compiler_params=jax_versions.compiler_params(approx_math=True),
    )(*rows, *listed, sums, mean, *(jnp.asarray(x) for x in lists.arrays))


def _scratch(width: int, columns: bool) -> dict:
    stages, tile = GRADIENT.stages, GRADIENT.tile
    scores = plgpu.TMEM((ROWS, GROUPS * 2 * tile), jnp.float32)
    weights = plgpu.TMEM((ROWS, GROUPS * 4 * tile), jnp.bfloat16, packed=True)
    each = (stages, tile) if columns else (ROWS,)
    return dict(
        rows_tile=block.swizzled(2, ROWS, width),
        rows_loaded=plgpu.Barrier(num_arrivals=2 if columns else 4),
        sums_tile=plgpu.SMEM(each, jnp.float32),
        mean_tile=plgpu.SMEM(each, jnp.float32),
        score_tile=block.swizzled(stages, tile, width),
        change_tile=block.swizzled(stages, tile, width),
        **block.barriers("score", stages, arrivals=1 + columns, tensor_cores=True),
        **block.barriers("change", stages, arrivals=1 + columns, tensor_cores=True),
        scores=plgpu.RefUnion(scores, weights),
        totals=plgpu.TMEM((ROWS, 2 * width), jnp.float32),
        begun=plgpu.Barrier(num_arrivals=GROUPS, orders_tensor_core=True),
        scored=plgpu.Barrier(num_barriers=GROUPS, orders_tensor_core=True),
        weighted=plgpu.Barrier(num_barriers=GROUPS, orders_tensor_core=True),
        summed=plgpu.Barrier(orders_tensor_core=True),
    )


def _kernel(*refs, ragged, columns, **scratch):
    *given, sums, mean, outer, inner, entries = refs[:9]
    own, outs = types.SimpleNamespace(**scratch), refs[9:]
    group, listed = lax.axis_index("group"), [inner, entries]
    work = mosaic_stream.Work.of(outer, given[0].shape[2])
    loads, has_weights = GRADIENT.registers

    @pl.when(group == tcgen05.LOADS)
    def _():
        plgpu.set_max_registers(loads, action="decrease")
        for each in range(2):
            rows = work.tokens(given[each], work.start, ROWS)
            plgpu.copy_gmem_to_smem(rows, own.rows_tile.at[each], own.rows_loaded)
        more = {}
        for name, x, of in (("sums", sums, "score"), ("mean", mean, "change")):
            if columns:
                more[of] = {name: lambda _, place, x=x: work.places(x, place, GRADIENT.tile)}
            else:
                tile, rows = getattr(own, f"{name}_tile"), work.places(x, work.place, ROWS)
                plgpu.copy_gmem_to_smem(rows, tile, own.rows_loaded)
        sources = {
            name: lambda start, _, x=x: work.tokens(x, start, GRADIENT.tile)
            for name, x in zip(("score", "change"), given[2:], strict=True)
        }
        parts = (mosaic_stream.Stream.of(own, n, s, **more.get(n, {})) for n, s in sources.items())
        mosaic_stream.stream(work, listed, *parts)

    @pl.when(group == tcgen05.ASKS)
    def _():
        plgpu.set_max_registers(tcgen05.ASKING, action="decrease")
        plgpu.barrier_wait(own.rows_loaded)
        plgpu.barrier_wait(own.begun)
        _multiply(own, work.total, columns)

    @pl.when(group < GROUPS)
    def _():
        plgpu.set_max_registers(has_weights, action="increase")
        group = lax.axis_index("group")
        _begin(own, group)
        cut = listed if ragged[1] and not columns else None
        _weigh(own, group, work, columns, cut)
        plgpu.barrier_wait(own.summed)
        for each, out in enumerate(outs):
            store = functools.partial(_store, own, each, out, work, ragged[0])
            pl.when(group == each)(store)


def _multiply(own, total: Scalar, columns: bool):
    """All products of a block. Tensor cores do what one thread asks for in its order: the scores of
    a tile come after the products that read the weights in their place.
    """
    stages = jnp.int32(GRADIENT.stages)

    def products(at):
        stage, half = lax.rem(at, stages), lax.rem(at, jnp.int32(GROUPS))
        for i, name in enumerate(("score", "change")):
            plgpu.barrier_wait(getattr(own, f"{name}_loaded").at[stage])
            tile = jax_versions.transposed(getattr(own, f"{name}_tile").at[stage])
            target = _scores(own, half, i, 0, GRADIENT.tile)
            plgpu.tcgen05_mma(target, own.rows_tile.at[i], tile, accumulate=False)
        plgpu.tcgen05_commit_arrive(own.scored.at[half])

    def sums(at):
        stage, half = lax.rem(at, stages), lax.rem(at, jnp.int32(GROUPS))
        plgpu.barrier_wait(own.weighted.at[half])
        # Changes times keys or queries; and weights times what the output's gradient is.
        pairs = [(1, own.score_tile), (0, own.change_tile)][: 1 + columns]
        for each, (i, tiles) in enumerate(pairs):
            left = _weights(own, half, i, 0, GRADIENT.tile)
            plgpu.tcgen05_mma(_total(own, each), left, tiles.at[stage])
        for name in ("score", "change"):
            plgpu.tcgen05_commit_arrive(getattr(own, f"{name}_consumed").at[stage])

    def step(at, _):
        pl.when(at < total)(lambda: products(at))
        pl.when(at > 0)(lambda: sums(at - 1))

    lax.fori_loop(0, total + 1, step, None)
    plgpu.tcgen05_commit_arrive(own.summed)


def _begin(own, group: Scalar):
    """One of the sums is zero."""
    width = own.rows_tile.shape[2]
    for start in range(0, width, PART):
        zeros = block.zeros(ROWS, PART, layout=LAYOUT)
        plgpu.async_store_tmem(own.totals.at[:, pl.ds(group * width + start, PART)], zeros)
    plgpu.commit_tmem()
    plgpu.barrier_arrive(own.begun)


def _weigh(own, group: Scalar, work: mosaic_stream.Work, columns: bool, listed: list | None):
    """The weights of every other tile, and how they change. listed: where keys are not there."""
    scale, stages = block.LOG2E / math.sqrt(own.rows_tile.shape[2]), jnp.int32(GRADIENT.stages)
    starts = range(0, GRADIENT.tile, PART)
    if not columns:
        plgpu.barrier_wait(own.rows_loaded)

    def of(tile: Ref, stage: Scalar, start: int) -> Array:
        """Numbers of queries, for the scores of a part."""
        if not columns:
            each = jax_versions.load(tile, layout=LAYOUT.reduce(1), optimized=False)
            return block.across(each, (ROWS, PART))
        part = tile.at[stage, pl.ds(start, PART)]
        each = jax_versions.load(part, layout=LAYOUT.reduce(0), optimized=False)
        return plgpu.layout_cast(block.down(each, (ROWS, PART)), LAYOUT)

    def step(number, _):
        at = GROUPS * number + group
        stage = lax.rem(at, stages)
        if columns:
            plgpu.barrier_wait(own.score_loaded.at[stage])
            plgpu.barrier_wait(own.change_loaded.at[stage])
        plgpu.barrier_wait(own.scored.at[group])
        parts = [
            [tcgen05.load(_scores(own, group, i, start, PART)) for i in range(2)]
            for start in starts
        ]
        plgpu.wait_load_tmem()  # weights come where they were
        for start, (scores, change) in zip(starts, parts, strict=True):
            if listed is not None:
                there = mosaic_stream.filled(listed, work.first + at) - start
                scores = block.masked(scores, there, layout=LAYOUT)
            weights = jnp.exp2(scores * scale - of(own.sums_tile, stage, start))
            change = weights * (change - of(own.mean_tile, stage, start))
            for i, x in enumerate((weights, change)):
                if i or columns:
                    target = _weights(own, group, i, start, PART)
                    plgpu.async_store_tmem(target, x.astype(jnp.bfloat16))
        plgpu.commit_tmem()
        plgpu.barrier_arrive(own.weighted.at[group])

    count = lax.div(work.total + GROUPS - 1 - group, jnp.int32(GROUPS))
    lax.fori_loop(0, count, step, None)


def _store(own, each: int, out: Ref, work: mosaic_stream.Work, ragged: bool):
    """One of the sums, to where it is kept, by way of what was multiplied."""
    width, tile = own.rows_tile.shape[2], own.rows_tile.at[each]
    factor = 1.0 if each else 1 / math.sqrt(width)
    for start in range(0, width, STORED):
        part = own.totals.at[:, pl.ds(each * width + start, STORED)]
        total = plgpu.async_load_tmem(part, layout=plgpu.Layout.TCGEN05) * factor
        tile.at[:, pl.ds(start, STORED)][...] = total.astype(jnp.bfloat16)
    plgpu.commit_smem()
    mosaic_stream.store(tile, out, work, ragged, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _scores(own, half: Scalar, i: int, start: int, size: int) -> Ref:
    """Of one of two tiles; i: its scores, or what changes them."""
    scores, _ = own.scores
    return scores.at[:, pl.ds((2 * half + i) * GRADIENT.tile + start, size)]


def _weights(own, half: Scalar, i: int, start: int, size: int) -> Ref:
    """Two of them have the column of one score."""
    _, weights = own.scores
    return weights.at[:, pl.ds(2 * (2 * half + i) * GRADIENT.tile + start, size)]


def _total(own, each: int) -> Ref:
    width = own.rows_tile.shape[2]
    return own.totals.at[:, pl.ds(each * width, width)]
