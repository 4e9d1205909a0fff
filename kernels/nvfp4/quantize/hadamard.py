"""What is quantised: a matrix or its transpose, rotated or not."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float
from longlive_kernels.nvfp4.format import BLOCK


def oriented(
    x: Float[Array, "*s r c"], transpose: bool, signs: Float[Array, " 16"] | None
) -> Float[Array, "*s r2 c2"]:
    """x or its transpose, then rotated where there are signs; of the type of x."""
    x = x.mT if transpose else x
    return x if signs is None else rotate(x, signs)


def rotate(x: Float[Array, "*s c"], signs: Float[Array, " 16"]) -> Float[Array, "*s c"]:
    """Every 16 numbers of the last axis times diag(signs) H / 4, H the Hadamard matrix of 16 in
    Sylvester's order. Applied to both sides of a product along what it sums over, it changes
    nothing but how outliers spread. Sums are float32, in one order; the result is of the type of x.
    fouroversix `get_rht_matrix`.
    """
    signs = repeat(signs.astype(jnp.float32), "e -> (n e)", n=x.shape[-1] // BLOCK)
    y = x.astype(jnp.float32) * signs
    for step in (1, 2, 4, 8):
        low, high = jnp.moveaxis(rearrange(y, "... (n k i) -> ... n k i", k=2, i=step), -2, 0)
        y = rearrange(jnp.stack([low + high, low - high], -2), "... n k i -> ... (n k i)")
    return (y * jnp.float32(0.25)).astype(x.dtype)
