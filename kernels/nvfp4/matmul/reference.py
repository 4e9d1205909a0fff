"""The meaning: dequantised, each number rounded to float32, and multiplied in full float32.

Slow on GPUs, whose tensor cores have no such product: there `xla.py` comes before it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from longlive_kernels.nvfp4.format import NVFP4
from longlive_kernels.nvfp4.quantize import dequantize


def unsupported(a: NVFP4 | Array, b: NVFP4, dtype) -> str | None:
    """Why a call cannot run here; None if it can."""
    return None


def matmul(a: NVFP4, b: NVFP4, dtype) -> Float[Array, "*s m n"]:
    """a bᵀ, of which only the result is rounded to `dtype`."""
    return matmul_w4a16(dequantize(a), b, dtype)


def matmul_w4a16(x: Float[Array, "*s m k"], w: NVFP4, dtype) -> Float[Array, "*s m n"]:
    """x wᵀ, of which only the result is rounded to `dtype`."""
    x, w = x.astype(jnp.float32), dequantize(w)
    return jnp.matmul(x, w.mT, precision=jax.lax.Precision.HIGHEST).astype(dtype)
