"""The meaning: the whole window, a dense mask, and everything in float32."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from longlive_kernels.attention.sink_window.call import Call


def unsupported(call: Call) -> str | None:
    """Why a call cannot run here; None if it can."""
    return None


def attend(call: Call) -> Float[Array, "b n a d"]:
    """softmax(q kᵀ / √d) v over the tokens of visible slots; zero where there is none."""
    dtype, call = call.q.dtype, call.by_frame().rounded(jnp.float32)
    q = call.q.astype(jnp.float32)
    k, v = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in call.windows(jnp.float32))
    mask = jnp.repeat(jnp.repeat(call.visible, call.tokens, 1), call.tokens, 2)[:, None]
    scores = jnp.einsum("bnad,bmad->banm", q, k) * jnp.float32(1 / math.sqrt(call.width))
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.float32(-1e30)), axis=-1)
    weights = jnp.where(mask, weights, jnp.float32(0))  # of rows without a key
    return jnp.einsum("banm,bmad->bnad", weights, v).astype(dtype)
