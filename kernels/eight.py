"""Numbers in eight bits: of kernels, of what they are multiplied with, of keys and values."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}


def eight_bits(x: Float[Array, "*s"], dtype: Any, axis: int) -> tuple[Array, Array]:
    """Values in int8 or e4m3, and the float32 scale that those along `axis` share (of length 1
    there).
    """
    x = x.astype(jnp.float32)
    scales = jnp.abs(x).max(axis, keepdims=True) / LARGEST[jnp.dtype(dtype)]
    values = x / jnp.where(scales > 0, scales, 1.0)
    values = jnp.round(values) if jnp.issubdtype(dtype, jnp.integer) else values
    return values.astype(dtype), scales
