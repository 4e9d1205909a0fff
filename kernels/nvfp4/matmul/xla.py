"""Operands unpacked to bfloat16, and XLA's ordinary product of these: on any device.

A value times its scale has six significant bits at most (two of e2m1, four of e4m3) and lies
between 2^-10 and 2688: bfloat16, of eight, holds it exactly. The product of two such numbers has
twelve bits, that of one and any bfloat16 number fourteen: exact in float32, as tensor cores make
it. Rounded are, in float32, every sum and its products with the factors of whole matrices, and
then the result, once. So W4A4 differs from that of FP4 units in the order of sums, if at all; and
from `reference.py`, which rounds operands to float32 too, by 1e-5 of the largest number.

Weights are unpacked whole, a matrix at a time, in front of the product: 2 bytes a number for as
long as it runs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float
from longlive_kernels.nvfp4.format import NVFP4, RULES, unscaled


def unsupported(a: NVFP4 | Array, b: NVFP4, dtype) -> str | None:
    """Why a call cannot run here; None if it can."""
    if isinstance(a, NVFP4) or a.dtype == jnp.bfloat16:
        return None
    return f"multiplies bfloat16 with quantised weights, not {a.dtype}"


def matmul(a: NVFP4, b: NVFP4, dtype) -> Float[Array, "*s m n"]:
    """a bᵀ, scaled before it is rounded to `dtype`."""
    return _scaled(_scaled(_sums(unpacked(a), unpacked(b)), a), b).astype(dtype)


def matmul_w4a16(x: BFloat16[Array, "*s m k"], w: NVFP4, dtype) -> Float[Array, "*s m n"]:
    """x wᵀ, scaled before it is rounded to `dtype`."""
    return _scaled(_sums(x, unpacked(w)), w).astype(dtype)


def unpacked(q: NVFP4) -> BFloat16[Array, "*s r c"]:
    """The numbers without the factor of their matrix, exactly."""
    return unscaled(q.packed, q.scales).astype(jnp.bfloat16)


def _sums(x: BFloat16[Array, "*s m k"], w: BFloat16[Array, "*w n k"]) -> Float[Array, "*s m n"]:
    how = dict(precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32)
    return jnp.matmul(x, w.mT, **how)


def _scaled(sums: Float[Array, "*s m n"], q: NVFP4) -> Float[Array, "*s m n"]:
    """One factor at a time: the product of two small ones may be below what float32 holds."""
    return sums * RULES[q.rule].unit(q.amax)[..., None, None]
