"""XLA: one scan over the visible pairs of tiles, with an online softmax (arXiv 2112.05682).

Runs wherever XLA does. The program is as long for 384 latent frames as for three, its memory grows
with the number of tokens, and tiles that the table hides are neither read nor computed. What is
small and mostly visible is done at once, as by the reference.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from longlive_kernels.attention.chunk_table import reference, tiles
from longlive_kernels.attention.chunk_table.table import Table
from longlive_kernels.attention.chunk_table.vjp import backward, differentiable

DTYPES = ("bfloat16", "float16", "float32")
VISIT = 2048  # scores that a CPU makes in the time that going to a pair of tiles takes


def unsupported(q: Array, k: Array, v: Array, table: Table) -> str | None:
    """Why a call cannot run here; None if it can."""
    kinds = {x.dtype.name for x in (q, k, v)}
    if len(kinds) > 1 or not kinds <= set(DTYPES):
        return f"takes q, k and v of one type of {DTYPES}, not {tuple(sorted(kinds))}"
    return None


def forward(
    q: Float[Array, "b n a d"], k: Float[Array, "b m a d"], v: Float[Array, "b m a d"], table: Table
) -> tuple[Float[Array, "b n a d"], Float[Array, "b n a"]]:
    """The output, and the logarithm of every row's sum of exponentials: -inf without a key."""
    plan, dtype = tiles.plan(q.shape, k.shape, table), q.dtype
    filled = None if plan.key.filled is None else jnp.asarray(plan.key.filled)
    q, k, v = plan.query.pack(q), plan.key.pack(k), plan.key.pack(v)  # t b a size d

    def visit(state, pair):
        i, j = pair
        highest, total, out = (tiles.at(x, i) for x in state)
        s = tiles.scores(tiles.at(q, i), tiles.at(k, j), tiles.at(filled, j))  # b a n m
        # Finite: a tile has a key that its queries see.
        top = jnp.maximum(highest, s.max(-1))
        fade, weights = jnp.exp(highest - top), jnp.exp(s - top[..., None])
        values = tiles.product("banm,bamd->band", weights.astype(dtype), tiles.at(v, j))
        new = (top, fade * total + weights.sum(-1), fade[..., None] * out + values)
        return tuple(tiles.put(x, y, i) for x, y in zip(state, new, strict=True)), None

    state = (
        tiles.start(-jnp.inf, q.shape[:-1], like=q),
        tiles.start(0.0, q.shape[:-1], like=q),
        tiles.start(0.0, q.shape, like=q),
    )
    (highest, total, out), _ = jax.lax.scan(visit, state, plan.visits)
    out = out / jnp.where(total > 0, total, 1.0)[..., None]
    return plan.query.unpack(out.astype(dtype)), plan.query.unpack(highest + jnp.log(total))


by_tiles = differentiable(forward, backward)


def attend(
    q: Float[Array, "b n a d"], k: Float[Array, "b m a d"], v: Float[Array, "b m a d"], table: Table
) -> Float[Array, "b n a d"]:
    """See `api.chunk_table`."""
    if not at_once(q.shape, k.shape, table):
        return by_tiles(q, k, v, table)
    if table.array.all():
        return unmasked(q, k, v)
    return reference.attend(q, k, v, table)


def unmasked(
    q: Float[Array, "b n a d"], k: Float[Array, "b m a d"], v: Float[Array, "b m a d"]
) -> Float[Array, "b n a d"]:
    """Computes softmax(q kᵀ / √d) v at once, the softmax in float32."""
    # Batch axes in front are faster on CPUs.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # b a n d
    scores = jnp.einsum("band,bamd->banm", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * np.float32(1 / math.sqrt(q.shape[-1])), axis=-1)
    return jnp.swapaxes(jnp.einsum("banm,bamd->band", weights.astype(v.dtype), v), 1, 2)


def at_once(q: tiles.Shape, k: tiles.Shape, table: Table) -> bool:
    """Whether all scores, hidden ones included, are few and sooner made than those of tiles."""
    plan, rows = tiles.plan(q, k, table), q[0] * q[2]
    visited = len(plan.pairs) * (rows * plan.query.size * plan.key.size + VISIT)
    return rows * q[1] * k[1] <= min(visited, tiles.SCORES)
