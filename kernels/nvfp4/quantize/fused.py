"""The kernel of triton.py. Needs Triton, so that only calls import it.

Every step is one of reference.py, in its order: what is rounded, and when, decides bytes. It has to
be compiled without fusing products into sums. Numbers are [T I C 16]: I rows of a tile, C blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)
STEEPEST = tl.constexpr(2.0**117)
# Adding and taking away 1.5 · 2^23 leaves the nearest whole number, of two the even one.
WHOLE = tl.constexpr(12582912.0)


@triton.jit
def quantized(  # noqa: PLR0913
    x,
    amax,
    noise,
    packed,
    scales,
    R: tl.constexpr,
    C: tl.constexpr,
    TILE: tl.constexpr,
    RULE: tl.constexpr,
    VALUE: tl.constexpr,
    SCALE: tl.constexpr,
    NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """x [S R C·16] to packed [S R C·8] and scales [S R C].

    RULE: what decides between two scales, or "static". VALUE, SCALE: the largest of the rule.
    NOISE: "none" rounds to nearest; of "draws", noise is [K S R C·16] in [0, 1), K for either
    scale; of "seed", it is one integer.
    """
    T: tl.constexpr = ROWS // TILE
    matrix = tl.program_id(2)
    rows = tl.program_id(0) * ROWS + tl.arange(0, T)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    at = matrix.to(tl.int64) * (R * C) + rows[:, :, None] * C + blocks[None, None, :]  # t i c
    inside = (rows < R)[:, :, None] & (blocks < C)[None, None, :]
    numbers = at[:, :, :, None] * 16 + tl.arange(0, 16)[None, None, None, :]
    values = tl.load(x + numbers, mask=inside[:, :, :, None], other=0.0).to(tl.float32)
    largest = tl.load(amax + matrix)
    encoding = tl.div_rn(VALUE * SCALE, largest)
    encoding = tl.where(encoding <= STEEPEST, encoding, 0.0)
    scale = tl.div_rn(tl.max(tl.max(tl.abs(values), 3), 1), VALUE) * encoding  # t c
    draws = _draws(noise, numbers, inside, matrix, R * C * 16, 0, NOISE)
    codes, rounded = _rounded(values, scale, encoding, draws, NOISE)
    if RULE != "static":
        draws = _draws(noise, numbers, inside, matrix, R * C * 16, 1, NOISE)
        codes_4, rounded_4 = _rounded(values, scale * 1.5, encoding, draws, NOISE)
        error = _error(values, codes, rounded, largest, VALUE * SCALE, RULE)
        better = _error(values, codes_4, rounded_4, largest, VALUE * SCALE, RULE) < error
        codes = tl.where(better[:, None, :, None], codes_4, codes)
        rounded = tl.where(better, rounded_4, rounded)
    low, high = tl.split(codes.reshape(T, TILE, BLOCKS, 8, 2))
    bytes_at = at[:, :, :, None] * 8 + tl.arange(0, 8)[None, None, None, :]
    tl.store(packed + bytes_at, (low | (high << 4)).to(tl.uint8), mask=inside[:, :, :, None])
    tiled = tl.broadcast_to(rounded[:, None, :], (T, TILE, BLOCKS))
    tl.store(scales + at, tiled.to(tl.float8e4nv), mask=inside)


@triton.jit
def _draws(noise, numbers, inside, matrix, size, K: tl.constexpr, NOISE: tl.constexpr):
    """Of candidate K. Those of a seed are functions of it and of the place in the matrix."""
    if NOISE == "draws":
        start = size * tl.num_programs(2).to(tl.int64) * K
        return tl.load(noise + start + numbers, mask=inside[:, :, :, None], other=0.0)
    elif NOISE == "seed":
        place = (numbers - matrix.to(tl.int64) * size).to(tl.uint32)
        nothing = place * 0
        one, two, _, _ = tl.philox(tl.load(noise), place, nothing + matrix, nothing, nothing)
        return tl.uint_to_uniform_float(two if K else one)
    else:
        return numbers


@triton.jit
def _rounded(values, scale, encoding, draws, NOISE: tl.constexpr):
    """The codes under a scale, and the scale as e4m3 has it."""
    scale = tl.minimum(scale, 448.0).to(tl.float8e4nv).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.div_rn(1.0, encoding) * scale)
    scaled = tl.minimum(values * inverse[:, None, :, None], LARGEST)
    scaled = tl.where((scale > 0)[:, None, :, None], scaled, 0.0)
    size = tl.abs(scaled)
    negative = scaled.to(tl.int32, bitcast=True) < 0
    if NOISE != "none":
        # Values are 1/2 apart below 2, then 1, then 2.
        step = tl.where(size < 2, 0.5, tl.where(size < 4, 1.0, 2.0))
        nudged = size * tl.where(size < 2, 2.0, tl.where(size < 4, 1.0, 0.5)) + (draws - 0.5)
        # As in the reference, what goes down to zero is a zero of the other sign.
        negative = negative ^ (nudged < 0)
        size = tl.maximum((nudged + WHOLE) - WHOLE, 0.0) * step
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    return code | (negative.to(tl.int32) << 3), scale


@triton.jit
def _error(values, codes, scale, amax, unit, RULE: tl.constexpr):
    """What the rule compares, [T C]."""
    code = codes & 7
    size = tl.where(code < 5, code * 0.5, code - 2.0 + (code == 7).to(tl.float32))
    found = tl.where(codes > 7, -size, size) * scale[:, None, :, None]
    difference = tl.div_rn(tl.minimum(found * amax, LARGEST), unit) - values
    if RULE == "mse":
        return _total(tl.minimum(difference * difference, LARGEST))
    elif RULE == "mae":
        return _total(tl.abs(difference))
    else:
        return tl.max(tl.max(tl.abs(difference), 3), 1)


@triton.jit
def _total(x):
    """The sum over I and 16, as in `exact.py:total`: by halves down to eight, then in order."""
    if x.shape[1] == 16:
        x = _halved(_halved(_halved(_halved(x))))
    x = x.reshape(x.shape[0], x.shape[2], 2, 8)
    low, high = tl.split(x.permute(0, 1, 3, 2))
    even, odd = _pairs(low + high)
    x04, x26 = _pairs(even)
    x15, x37 = _pairs(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7


@triton.jit
def _halved(x):
    """Half as many rows of a tile: one half added to the other."""
    parted = x.reshape(x.shape[0], 2, x.shape[1] // 2, x.shape[2], x.shape[3])
    low, high = tl.split(parted.permute(0, 2, 3, 4, 1))
    return low + high


@triton.jit
def _pairs(x):
    """The even and the odd places of the last axis."""
    return tl.split(x.reshape(x.shape[0], x.shape[1], x.shape[2] // 2, 2))
