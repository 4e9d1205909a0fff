"""The NVFP4 format: e2m1 values, an e4m3 scale for 16 of them, one float32 for a whole matrix.

A number is value · scale · amax / (largest value · largest scale), the two largest being those of
the rule that chose the scales (arXiv 2509.25149; four-over-six, arXiv 2512.02010).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32, UInt8
from longlive_kernels.nvfp4 import exact

BLOCK = 16  # columns that share a scale
_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate(
    [_MAGNITUDES, -_MAGNITUDES]
)  # by code: sign << 3 | exponent << 1 | mantissa
_PAIRS = np.stack([np.tile(VALUES, 16), np.repeat(VALUES, 16)], -1)  # of a byte, the low code first

Leaf = Any  # an array; in trees of shapes, shardings or specs, what stands for one


@dataclasses.dataclass(frozen=True)
class Rule:
    """How scales are chosen.

    largest_value: the e2m1 magnitude that the largest of a block is scaled to. largest_scale: the
    e4m3 scale of the block that holds the largest of the matrix. error: of differences [*, block],
    what decides between scaling to 6 and to 4; None always takes `largest_value`.
    """

    largest_value: int
    largest_scale: int
    error: Callable[[Float32[Array, "*s e"]], Float32[Array, "*s"]] | None = None

    @property
    def candidates(self) -> int:
        """Scales that are tried for every block, each of which has draws of its own."""
        return 1 if self.error is None else 2

    def unit(self, amax: Float32[Array, "*s"]) -> Float32[Array, "*s"]:
        """What value · scale is a multiple of."""
        return exact.divide(amax, self.largest_value * self.largest_scale)


# A scale that is chosen by error may be 1.5 times as large, and has to fit e4m3: hence 256.
RULES = {
    "static_6": Rule(6, 448),
    "static_4": Rule(4, 448),
    "mse": Rule(6, 256, lambda d: exact.total(exact.product(d, d))),
    "mae": Rule(6, 256, lambda d: exact.total(jnp.abs(d))),
    "abs_max": Rule(6, 256, lambda d: jnp.abs(d).max(-1)),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NVFP4:
    """Quantised matrices, of which leading axes are stacked: each matrix has its own `amax`.

    packed: two codes a byte, the even column in the low nibble. scales: row-major; of tiles of
    16 x 16 the scale is repeated over the rows of its tile. amax: the largest magnitude. rule: a
    name in `RULES`, without which the numbers cannot be read.
    """

    packed: Leaf  # uint8, *s rows columns/2
    scales: Leaf  # float8_e4m3fn, *s rows columns/16
    amax: Leaf  # float32, *s
    rule: str = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.packed.shape[:-1], 2 * self.packed.shape[-1])

    @property
    def ndim(self) -> int:
        return self.packed.ndim

    def __getitem__(self, index) -> NVFP4:
        """Of leading axes."""
        return jax.tree.map(lambda x: x[index], self)


def encode(x: Float[Array, "*s"]) -> UInt8[Array, "*s"]:
    """The code of the nearest value, of two as near the even code; beyond 6 it is 6. Zeros keep
    their sign.
    """
    size = jnp.abs(x)
    # Halfway up to each magnitude. The code below is even where the tie goes down.
    middles = (_MAGNITUDES[1:] + _MAGNITUDES[:-1]) / 2
    passed = [size > m if i % 2 == 0 else size >= m for i, m in enumerate(middles.astype(x.dtype))]
    code = sum(p.astype(jnp.uint8) for p in passed)
    return code | (jnp.signbit(x).astype(jnp.uint8) << jnp.uint8(3))


def decode(codes: UInt8[Array, "*s"]) -> Float32[Array, "*s"]:
    """The values."""
    return jnp.asarray(VALUES).at[codes].get(mode="promise_in_bounds")


def pack(codes: UInt8[Array, "*s c"]) -> UInt8[Array, "*s half"]:
    """Two codes a byte, the even column low."""
    return codes[..., ::2] | (codes[..., 1::2] << jnp.uint8(4))


def unpack(packed: UInt8[Array, "*s half"]) -> UInt8[Array, "*s c"]:
    """The codes of `pack`."""
    pairs = jnp.stack([packed & jnp.uint8(15), packed >> jnp.uint8(4)], -1)
    return rearrange(pairs, "... half two -> ... (half two)")


def unscaled(
    packed: UInt8[Array, "*s half"], scales: Float[Array, "*s b"]
) -> Float32[Array, "*s c"]:
    """value · scale, exactly. A byte is looked up whole, as two values side by side: several times
    as fast on CPUs as codes that are taken apart and put in order. (So would be a bitcast to
    float4_e2m1fn, but XLA for CPUs gets that wrong where the bytes are computed: jax 0.10.2.)
    """
    values = jnp.asarray(_PAIRS).at[packed].get(mode="promise_in_bounds")  # *s half 2
    blocks = values.reshape(*scales.shape, BLOCK) * scales.astype(jnp.float32)[..., None]
    return blocks.reshape(*packed.shape[:-1], -1)


def swizzle(scales: Float[Array, "*s r c"]) -> Float[Array, "*s n"]:
    """Scales in the order that cuBLAS and tensor cores read ("128x4"), flat, padded with zeros to
    128 rows and 4 columns. Tiles of 128 x 4 follow each other along the columns; within one, the
    scales of row r are at 16 (r mod 32) + 4 (r div 32). fouroversix `quantize/utils.py:to_blocked`.
    """
    rows, columns = scales.shape[-2:]
    padding = [(0, 0)] * (scales.ndim - 2) + [(0, -rows % 128), (0, -columns % 4)]
    scales = jnp.pad(scales, padding)
    return rearrange(scales, "... (R q r) (C c) -> ... (R C r q c)", q=4, r=32, c=4)


def unswizzle(flat: Float[Array, "*s n"], rows: int, columns: int) -> Float[Array, "*s r c"]:
    """The rows and columns of `swizzle`. Raises ValueError where the size is not theirs."""
    tiles = (-(-rows // 128), -(-columns // 4))
    if flat.shape[-1] != tiles[0] * tiles[1] * 512:
        raise ValueError(f"{flat.shape[-1]} swizzled scales are not {rows} x {columns}, padded")
    named = dict(R=tiles[0], C=tiles[1], q=4, r=32, c=4)
    scales = rearrange(flat, "... (R C r q c) -> ... (R q r) (C c)", **named)
    return scales[..., :rows, :columns]
