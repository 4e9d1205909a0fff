"""cuDNN's block-scaled product, through `jax.nn.scaled_matmul`.

XLA puts scales in the order that it needs, and fills both matrices up to multiples of 128 rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from longlive_kernels import arch
from longlive_kernels.nvfp4.format import BLOCK, NVFP4, RULES


def unsupported(a: NVFP4 | Array, b: NVFP4, dtype, *, sm: int | None = None) -> str | None:
    """Why a call cannot run here; None if it can. sm: the architecture; None: the default's.

    `jax.nn.scaled_matmul` itself runs on Hopper, where it multiplies dequantised copies: that is
    refused, because it would cost more than the same product in bfloat16.
    """
    if not isinstance(a, NVFP4):
        return "multiplies two quantised matrices"
    lacking = arch.lacks_fp4(arch.default() if sm is None else sm)
    if lacking is not None:
        return lacking
    if a.shape[-1] % 32:
        return f"needs k in multiples of 32, so that rows are whole words, not {a.shape[-1]}"
    return None


def matmul(a: NVFP4, b: NVFP4, dtype) -> Float[Array, "*s m n"]:
    """a bᵀ. cuDNN writes sums as float32: the factors of whole matrices are applied after it."""
    unit = RULES[a.rule].unit(a.amax) * RULES[b.rule].unit(b.amax)
    values, scales = zip(*(_batched(x) for x in (a, b)), strict=True)
    out = jax.nn.scaled_matmul(*values, *scales, preferred_element_type=jnp.float32)  # b m n
    out = out.reshape(*a.shape[:-1], b.shape[-2])
    return (out * unit[..., None, None]).astype(dtype)


def _batched(x: NVFP4) -> tuple[Array, Array]:
    """Values and scales with one axis in front. The values stay where they are."""
    rows, columns = x.shape[-2:]
    values = jax.lax.bitcast_convert_type(x.packed, jnp.float4_e2m1fn)
    return (
        values.reshape(-1, rows, columns),  # b m k
        x.scales.reshape(-1, rows, columns // BLOCK),
    )
