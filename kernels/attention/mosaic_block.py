"""What kernels for Hopper and Blackwell share: memories, barriers and numbers in registers.

Mosaic takes long to import, so that only calls import this.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32
from longlive_kernels import jax_versions
from longlive_kernels.attention.tile import GROUPS

Scalar = Int32[Array, ""]
Ref = Any  # of Mosaic, to arrays or parts of them
LOG2E = 1.4426950408889634
LAYOUT = plgpu.Layout.WGMMA


def swizzled(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    """As tensor cores read it, 128 bytes of a row at a time."""
    columns = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def barriers(
    name: str, stages: int, arrivals: int = 1, tensor_cores: bool = False
) -> dict[str, Any]:
    """Of a stream, which has so many parts. tensor_cores: they tell what is done with, at once for
    the whole block.
    """
    done = dict(orders_tensor_core=True) if tensor_cores else dict(num_arrivals=GROUPS)
    return {
        f"{name}_loaded": plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        f"{name}_consumed": plgpu.Barrier(num_barriers=stages, **done),
    }


def zeros(*shape: int, layout: Any = LAYOUT) -> Array:
    """float32 in registers, as tensor cores leave it; one number of each row."""
    layout = layout if len(shape) == 2 else layout.reduce(1)
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def per_row(x: Ref) -> Array:
    """Numbers of the rows of a tile, into registers."""
    return jax_versions.load(x, layout=LAYOUT.reduce(1))


def per_column(x: Ref) -> Array:
    """Numbers of the columns of a tile, into registers."""
    return jax_versions.load(x, layout=LAYOUT.reduce(0))


def across(x: Array, shape: tuple[int, int]) -> Array:
    """A number of each row, in all of its columns."""
    return lax.broadcast_in_dim(x, shape, (0,))


def down(x: Array, shape: tuple[int, int]) -> Array:
    """A number of each column, in all of its rows."""
    return lax.broadcast_in_dim(x, shape, (1,))


def masked(scores: Array, count: Scalar, layout: Any = LAYOUT) -> Array:
    """-inf for keys that are not of the tile."""
    column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=layout)
    return jnp.where(column < count, scores, -jnp.inf)


def product(left: Ref, right: Ref) -> Array:
    """left rightᵀ, of two operands in shared memory."""

    def multiply(total: Ref) -> Array:
        plgpu.wgmma(total, left, jax_versions.transposed(right))
        return total[...]

    return pl.run_scoped(multiply, plgpu.ACC((left.shape[0], right.shape[0]), jnp.float32))


def added(sums: Array, left: Array, right: Ref) -> Array:
    """sums + left right, of an operand in registers and one in shared memory."""

    def multiply(total: Ref):
        plgpu.wgmma(total, left, right)

    return pl.run_state(multiply)(plgpu.ACC.init(sums))
