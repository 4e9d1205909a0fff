"""Float32 arithmetic of which every step is rounded, in one order, whatever is compiled around it.

XLA replaces division by a constant with a product, and compilers fuse a product into the sum that
follows. Each shifts the last bit, and with it now and then a byte of a quantised matrix, which then
depends on how a program was cut into kernels, or over devices.
"""

from __future__ import annotations

import functools
import operator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

_LARGEST = np.finfo(np.float32).max


def divide(x: Float32[Array, "*s"], by: int) -> Float32[Array, "*s"]:
    """x / by."""
    # What XLA knows nothing of is no constant to it.
    return x / jnp.where(jnp.isnan(x), jnp.float32(0), jnp.float32(by))


def product(x: Float32[Array, "*#s"], y: Float32[Array, "*#s"]) -> Float32[Array, "*s"]:
    """x · y, at most the largest finite number: a limit that no sum after it can absorb."""
    return jnp.minimum(x * y, _LARGEST)


def total(x: Float32[Array, "*s e"]) -> Float32[Array, "*s"]:
    """The sum over the last axis, of 2^n: the two halves are added until eight numbers are left,
    then those one after the other. So does PyTorch on CPUs where there are 16.
    """
    while x.shape[-1] > 8:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return functools.reduce(operator.add, (x[..., i] for i in range(x.shape[-1])))
