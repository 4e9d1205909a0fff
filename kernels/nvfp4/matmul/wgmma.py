"""bfloat16 times NVFP4 weights for Hopper (sm_90), in Pallas for Mosaic GPU; see mixed.py."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, UInt8
from longlive_kernels import arch
from longlive_kernels.nvfp4.format import NVFP4, RULES, unpack

ARCH = 90
ROWS = 64  # of weights, that a warpgroup multiplies
MULTIPLIERS = 2  # warpgroups
HALF = 64  # columns that are multiplied at a time
DEPTH = 2 * HALF  # columns that are loaded at a time
LARGEST = 192  # rows of x in a tile that fit shared memory


@dataclasses.dataclass(frozen=True)
class Blocks:
    """stages: steps that are loaded ahead. band: tiles that a row of tiles is cut into, so that
    blocks that run together share operands in the second-level cache. registers: of a thread that
    loads, and of one that multiplies.
    """

    stages: int = 3
    band: int = 8
    registers: tuple[int, int] = (40, 232)


BLOCKS = Blocks()


def unsupported(a: NVFP4 | Array, b: NVFP4, dtype, *, sm: int | None = None) -> str | None:
    """Why a call cannot run here; None if it can. sm: the architecture; None: the default's."""
    if isinstance(a, NVFP4):
        return "multiplies numbers with quantised weights (matmul_w4a16)"
    sm = arch.default() if sm is None else sm
    if sm is None:
        return "needs an NVIDIA GPU"
    if sm != ARCH:
        return f"is for Hopper (sm_{ARCH}), not sm_{sm}"
    if any(jnp.dtype(t) != jnp.bfloat16 for t in (a.dtype, dtype)):
        return f"multiplies and writes bfloat16, not {a.dtype} and {jnp.dtype(dtype).name}"
    n, k = b.shape
    if n % (MULTIPLIERS * ROWS) or k % DEPTH:
        return f"needs weights in multiples of {MULTIPLIERS * ROWS} x {DEPTH}, not {n} x {k}"
    return None


def matmul_w4a16(x: BFloat16[Array, "*s m k"], w: NVFP4, dtype) -> Float[Array, "*s m n"]:
    """x wᵀ, scaled before it is rounded."""
    from longlive_kernels.nvfp4.matmul.mixed import product

    m, k = math.prod(x.shape[:-1]), x.shape[-1]
    rows = tile_rows(m)
    flat = jnp.pad(x.reshape(m, k), ((0, -m % rows), (0, 0)))
    out = product(
        flat,
        interleaved(w.packed),
        w.scales.mT.astype(jnp.bfloat16),  # k/16 n
        (RULES[w.rule].unit(w.amax) * jnp.float32(0.5)).reshape(1),  # of doubled values
        rows,
    )
    return out[:m].reshape(*x.shape[:-1], w.shape[0])


def tile_rows(m: int) -> int:
    """Rows of x in a tile: the most that divide m. Where those are few, x is filled up with zeros,
    as little as possible.
    """
    m += -m % 8
    sizes = range(8, LARGEST + 8, 8)
    whole = max(size for size in sizes if m % size == 0)
    if m <= LARGEST or whole >= LARGEST // 2:
        return whole
    return min(sizes[len(sizes) // 2 :], key=lambda size: (-m % size, -size))


def interleaved(packed: UInt8[Array, "n half"]) -> UInt8[Array, "n half"]:
    """The codes of columns 0 … 63 low, those of 64 … 127 high, and so on: what is unpacked from low
    and from high nibbles is then in order. Its cost is that of reading and writing the weights.
    """
    n = packed.shape[0]
    halves = unpack(packed).reshape(n, -1, 2, HALF)
    return (halves[:, :, 0] | (halves[:, :, 1] << jnp.uint8(4))).reshape(n, -1)
