"""The function that users call."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from longlive_kernels.nvfp4.format import BLOCK
from longlive_kernels.nvfp4.linear import vjp
from longlive_kernels.nvfp4.linear.recipe import Recipe

# What LongLive 2.0 trains with: teacher forcing (its `train_ar_nvfp4.yaml`), and distillation.
AR = Recipe()
DMD = Recipe(weights="mse")


def linear(
    x: Float[Array, "*s k"],
    kernel: Float[Array, "k n"],
    key: Array,
    recipe: Recipe = AR,
    tokens: Int[Array, " t"] | None = None,
) -> Float[Array, "*s n"]:
    """x · kernel in the type of x; operands are quantised, and so are those of its gradient.

    All of x is quantised as one matrix, 16 numbers of a token to a scale; kernel, best kept in
    float32, in tiles. The gradient of kernel has the type of kernel. What is kept of x for it is
    its quantised form. `key` decides the signs of the rotation and how gradients are rounded: give
    every layer and step one of its own; it has no gradient.

    fouroversix `model/modules/linear.py:FourOverSixLinearFunction`, as LongLive 2.0 trains.

    Raises ValueError where k or n are not multiples of 16.
    """
    k, n = kernel.shape
    if k % BLOCK or n % BLOCK:
        raise ValueError(f"a kernel of {k} x {n} does not divide into blocks of 16")
    rows = x.reshape(math.prod(x.shape[:-1]), k)  # t k
    tokens = jnp.arange(rows.shape[0], dtype=jnp.int32) if tokens is None else tokens
    return vjp.linear(rows, kernel, key, tokens, recipe).reshape(*x.shape[:-1], n)
