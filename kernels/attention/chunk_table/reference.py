"""The meaning: a dense mask, and everything in float32."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from longlive_kernels.attention.chunk_table.table import Table


def unsupported(q: Array, k: Array, v: Array, table: Table) -> str | None:
    """Why a call cannot run here; None if it can."""
    return None


def attend(
    q: Float[Array, "b n a d"], k: Float[Array, "b m a d"], v: Float[Array, "b m a d"], table: Table
) -> Float[Array, "b n a d"]:
    """softmax(q kᵀ / √d) v over the visible keys; zero where there is none."""
    mask = jnp.asarray(table.array)
    for axis, x in enumerate((q, k)):
        mask = jnp.repeat(mask, x.shape[1] // table.shape[axis], axis)  # n m
    dtype = q.dtype
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.einsum("bnad,bmad->banm", q, k) * jnp.float32(1 / math.sqrt(q.shape[-1]))
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.float32(-1e30)), axis=-1)
    weights = jnp.where(mask, weights, jnp.float32(0))  # of rows without a key
    return jnp.einsum("banm,bmad->bnad", weights, v).astype(dtype)
