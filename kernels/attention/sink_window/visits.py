"""The slots that a kernel reads: those that are seen, in order, and how many they are."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def visits(seen: Bool[Array, "*t slots"]) -> tuple[Int[Array, "*t slots"], Int[Array, "*t"]]:
    """Numbers of the slots that are seen, first ones first, then zeros; and their count.

    By comparisons: to sort so few would cost GPUs a program of its own.
    """
    number = jnp.arange(seen.shape[-1], dtype=jnp.int32)
    place = jnp.cumsum(seen, -1, dtype=jnp.int32) - 1
    here = seen[..., None, :] & (place[..., None, :] == number[:, None])  # *t place slots
    index = jnp.where(here, number, 0).sum(-1, dtype=jnp.int32)
    return index, seen.sum(-1, dtype=jnp.int32)
