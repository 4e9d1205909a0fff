"""Operands unpacked, and XLA's ordinary product of these: of bfloat16 on any device but CPUs.

A value times its scale has six significant bits at most (two of e2m1, four of e4m3) and lies
between 2^-10 and 2688: bfloat16, of eight, holds it exactly. The product of two such numbers has
twelve bits, that of one and any bfloat16 number fourteen: exact in float32, as tensor cores make
it. Rounded are, in float32, every sum and its products with the factors of whole matrices, and
then the result, once. So W4A4 differs from that of FP4 units in the order of sums, if at all; and
from `reference.py`, which rounds operands to float32 too, by 1e-5 of the largest number.

Weights are unpacked whole, a matrix at a time, in front of the product: 2 bytes a number for as
long as it runs. CPUs make float32 of bfloat16 before they multiply, so there operands are unpacked
to that: the same sums, and one pass less.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32
from longlive_kernels.nvfp4.format import NVFP4, RULES, unscaled


def unsupported(a: NVFP4 | Array, b: NVFP4, dtype) -> str | None:
    """Why a call cannot run here; None if it can."""
    if isinstance(a, NVFP4) or a.dtype == jnp.bfloat16:
        return None
    return f"multiplies bfloat16 with quantised weights, not {a.dtype}"


def matmul(a: NVFP4, b: NVFP4, dtype) -> Float[Array, "*s m n"]:
    """a bᵀ, scaled before it is rounded to `dtype`."""
    return _product(unscaled(a.packed, a.scales), b, _unit(a)).astype(dtype)


def matmul_w4a16(x: BFloat16[Array, "*s m k"], w: NVFP4, dtype) -> Float[Array, "*s m n"]:
    """x wᵀ, scaled before it is rounded to `dtype`."""
    return _product(x, w, jnp.float32(1)).astype(dtype)


def _product(x: Float[Array, "*s m k"], w: NVFP4, unit: Array) -> Float32[Array, "*s m n"]:
    """Of x, whose numbers bfloat16 holds, times their factor."""
    operands = x, unscaled(w.packed, w.scales), unit, _unit(w)
    return jax.lax.platform_dependent(*operands, cpu=_in_float32, default=_in_bfloat16)


def _unit(q: NVFP4) -> Float32[Array, "*s 1 1"]:
    return RULES[q.rule].unit(q.amax)[..., None, None]


def _in_bfloat16(x, w, x_unit, w_unit):
    return _scaled(_sums(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)), x_unit, w_unit)


def _in_float32(x, w, x_unit, w_unit):
    """Factors are a pass of their own on a CPU: over operands, where these have fewer numbers, or
    are several matrices, each with a factor of its own.
    """
    x = x.astype(jnp.float32)
    sums = x.size // x.shape[-1] * w.shape[-2]
    if w.ndim > 2 or x.size + w.size < sums:
        return _sums(x * x_unit, w * w_unit)
    return _scaled(_sums(x, w), x_unit, w_unit)


def _sums(x: Float[Array, "*s m k"], w: Float[Array, "*w n k"]) -> Float32[Array, "*s m n"]:
    how = dict(precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32)
    return jnp.matmul(x, w.mT, **how)


def _scaled(sums, x_unit, w_unit):
    """One factor at a time: the product of two small ones may be below what float32 holds."""
    return sums * x_unit * w_unit
