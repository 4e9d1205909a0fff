"""A block-scaled product for Blackwell (sm_100), in Pallas for Mosaic GPU; see tcgen05.py."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from longlive_kernels import arch
from longlive_kernels.nvfp4.format import BLOCK, NVFP4, RULES, swizzle

ARCHS = (100, 103)  # of which the tensor cores have memory of their own
GROUP = 4 * BLOCK  # of k, whose scales lie together


@dataclasses.dataclass(frozen=True)
class Blocks:
    """rows, columns: of a tile of the result. depth: of k, in one step. stages: steps that are
    loaded ahead. band: tiles that a row of tiles is cut into, so that blocks that run together
    share operands in the second-level cache.
    """

    rows: int = 128
    columns: int = 128
    depth: int = 128
    stages: int = 5
    band: int = 8

    @property
    def groups(self) -> int:
        return self.depth // GROUP

    @property
    def scales(self) -> int:
        return self.depth // BLOCK


BLOCKS = Blocks()


def unsupported(a: NVFP4 | Array, b: NVFP4, dtype, *, sm: int | None = None) -> str | None:
    """Why a call cannot run here; None if it can. sm: the architecture; None: the default's."""
    if not isinstance(a, NVFP4):
        return "multiplies two quantised matrices"
    sm = arch.default() if sm is None else sm
    lacking = arch.lacks_fp4(sm)
    if lacking is not None:
        return lacking
    if sm not in ARCHS:
        return f"is for {' and '.join(f'sm_{x}' for x in ARCHS)}, not sm_{sm}"
    if a.ndim != 2:
        return f"multiplies two matrices, not stacks of them: {a.shape}"
    if a.shape[-1] % GROUP or b.shape[0] % 8:
        return f"needs k in multiples of {GROUP} and n of 8, not {a.shape[-1]} and {b.shape[0]}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"writes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    return None


def matmul(a: NVFP4, b: NVFP4, dtype) -> Float[Array, "m n"]:
    """a bᵀ, scaled before it is rounded to `dtype`."""
    from longlive_kernels.nvfp4.matmul.tcgen05 import product

    unit = RULES[a.rule].unit(a.amax) * RULES[b.rule].unit(b.amax)
    return product(_values(a), _values(b), _scales(a), _scales(b), unit.reshape(1), dtype, BLOCKS)


def _values(x: NVFP4) -> Array:
    """r k, four bits each. The same bytes."""
    return jax.lax.bitcast_convert_type(x.packed, jnp.float4_e2m1fn).reshape(x.shape)


def _scales(x: NVFP4) -> Array:
    """Of 128 rows and `GROUP` columns each, as tensor cores read them: r/128 k/64 32 16."""
    return swizzle(x.scales).reshape(-1, x.shape[-1] // GROUP, 32, 16)
