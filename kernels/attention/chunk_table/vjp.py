"""The gradient: every visible tile of weights is made again from q, k and the saved logarithms of
its rows' sums (arXiv 2205.14135, algorithm 4).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from longlive_kernels.attention.chunk_table import tiles
from longlive_kernels.attention.chunk_table.table import Table

Heads = Float[Array, "b n a d"]
Keys = Float[Array, "b m a d"]
Sums = Float[Array, "b n a"]


def differentiable(
    forward: Callable[[Heads, Keys, Keys, Table], tuple[Heads, Array]],
    backward: Callable[..., tuple[Heads, Keys, Keys]],
) -> Callable[[Heads, Keys, Keys, Table], Heads]:
    """The output of `forward`, with a gradient. It gives its rows' logarithms of sums too, as its
    `backward` takes them.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
    def attend(q, k, v, table):
        return forward(q, k, v, table)[0]

    def save(q, k, v, table):
        out, sums = forward(q, k, v, table)
        return out, (q, k, v, out, sums)

    attend.defvjp(save, backward)
    return lambda q, k, v, table: attend(*tiles.alike(q, k, v), table)


def backward(
    table: Table, saved: tuple[Heads, Keys, Keys, Heads, Sums], grad: Heads
) -> tuple[Heads, Keys, Keys]:
    """Of q, k and v. One scan over the same pairs of tiles as forwards; sums in float32."""
    q, k, v, out, sums = saved
    plan, dtype = tiles.plan(q.shape, k.shape, table), q.dtype
    filled = None if plan.key.filled is None else jnp.asarray(plan.key.filled)
    scale = np.float32(1 / math.sqrt(q.shape[-1]))
    # What is subtracted from the gradient of a row's weights, for the softmax.
    mean = tiles.product("bnad,bnad->bna", grad, out)
    q, grad, sums, mean = (plan.query.pack(x) for x in (q, grad, sums, mean))
    k, v = plan.key.pack(k), plan.key.pack(v)  # t b a size d

    def visit(state, pair):
        i, j = pair
        q_i, grad_i, sums_i, mean_i = (tiles.at(x, i) for x in (q, grad, sums, mean))
        k_j, v_j = tiles.at(k, j), tiles.at(v, j)
        s = tiles.scores(q_i, k_j, tiles.at(filled, j))
        weights = jnp.exp(s - sums_i[..., None])  # b a n m
        ds = tiles.product("band,bamd->banm", grad_i, v_j) - mean_i[..., None]
        ds = (weights * ds * scale).astype(dtype)
        new = (
            tiles.product("banm,bamd->band", ds, k_j),
            tiles.product("banm,band->bamd", ds, q_i),
            tiles.product("banm,band->bamd", weights.astype(dtype), grad_i),
        )
        return tuple(
            tiles.put(x, tiles.at(x, at) + y, at)
            for x, y, at in zip(state, new, (i, j, j), strict=True)
        ), None

    state = tuple(tiles.start(0.0, x.shape, like=q) for x in (q, k, v))
    (dq, dk, dv), _ = jax.lax.scan(visit, state, plan.visits)
    dq, dk, dv = (x.astype(dtype) for x in (dq, dk, dv))
    return plan.query.unpack(dq), plan.key.unpack(dk), plan.key.unpack(dv)
