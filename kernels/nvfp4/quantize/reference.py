"""The meaning: every step in float32, each rounded once."""

from __future__ import annotations

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Float32, UInt8
from longlive_kernels.nvfp4 import exact
from longlive_kernels.nvfp4.format import BLOCK, NVFP4, RULES, Rule, decode, encode, pack
from longlive_kernels.nvfp4.quantize.hadamard import oriented

Blocks = Float32[Array, "*s r c e"]  # e numbers share a scale
# Of every candidate scale.
Draws = Float32[Array, "k *s r c e"]
Codes = UInt8[Array, "k *s r c e"]
Scales = Float32[Array, "k *s r c"]

# The reciprocal of amax is used as long as its products with the smallest scales are normal
# numbers. Matrices with smaller amax, about 1e-32, are zero.
_STEEPEST = 2.0**117
_LARGEST_SCALE = 448.0  # of e4m3


def unsupported(x: Array, **options) -> str | None:
    """Why a call cannot run here; None if it can."""
    return None


def quantize(
    x: Float[Array, "*s r c"],
    *,
    rule: str,
    tile: int,
    transpose: bool,
    signs: Float[Array, " 16"] | None,
    draws: Float32[Array, "k *s r2 c2"] | None,
    amax: Float32[Array, "*s"],
) -> NVFP4:
    """fouroversix `quantize/pytorch/reference.py:quantize_to_fp4`, but saturating.

    draws: in [0, 1), for every candidate scale and number that is quantised, after transposing.
    """
    chosen = RULES[rule]
    blocks = blocked(oriented(x, transpose, signs).astype(jnp.float32), tile)
    if draws is not None:
        draws = blocked(draws, tile)  # k *s R C e
    slope = exact.divide(jnp.abs(blocks).max(-1), chosen.largest_value)
    encoding = jnp.float32(chosen.largest_value * chosen.largest_scale) / amax
    encoding = jnp.where(encoding <= _STEEPEST, encoding, jnp.float32(0))[..., None, None]
    scale = slope * encoding
    scales = jnp.stack([scale, scale * jnp.float32(1.5)][: chosen.candidates])  # k *s R C
    codes, scales = _rounded(blocks, scales, encoding, draws)
    if chosen.error is not None:
        to_6, to_4 = _errors(blocks, codes, scales, amax, chosen)
        better = to_4 < to_6
        codes = jnp.where(better[..., None], codes[1], codes[0])[None]
        scales = jnp.where(better, scales[1], scales[0])[None]
    scales = jnp.repeat(scales[0], tile, axis=-2).astype(jnp.float8_e4m3fn)
    return NVFP4(pack(unblocked(codes[0], tile)), scales, amax, rule)


def blocked(x: Array, tile: int) -> Array:
    """*s r c → *s R C e: the numbers that share a scale, row by row, last."""
    return rearrange(x, "... (R i) (C j) -> ... R C (i j)", i=tile, j=BLOCK)


def unblocked(x: Array, tile: int) -> Array:
    """*s R C e → *s r c"""
    return rearrange(x, "... R C (i j) -> ... (R i) (C j)", i=tile, j=BLOCK)


def _rounded(
    blocks: Blocks, scales: Scales, encoding: Float32[Array, "*s 1 1"], draws: Draws | None
) -> tuple[Codes, Scales]:
    """The codes under every scale, and scales as e4m3 has them."""
    scales = jnp.minimum(scales, _LARGEST_SCALE).astype(jnp.float8_e4m3fn).astype(jnp.float32)
    inverse = jnp.float32(1) / ((jnp.float32(1) / encoding) * scales)
    scaled = exact.product(blocks, inverse[..., None])
    scaled = jnp.where(scales[..., None] > 0, scaled, jnp.float32(0))
    return encode(scaled if draws is None else _nudged(scaled, draws)), scales


def _nudged(x: Draws, draws: Draws) -> Draws:
    """One of the two values around x: the upper one with a probability that makes x the mean.
    fouroversix `quantize/pytorch/reference.py:fake_quantize_to_e2m1`.
    """
    size, draws = jnp.abs(x), draws - jnp.float32(0.5)
    # Values are 1/2 apart below 2, then 1, then 2.
    step = jnp.where(
        size < 2, jnp.float32(0.5), jnp.where(size < 4, jnp.float32(1), jnp.float32(2))
    )
    # As upstream, what is rounded down from below 0.25 is a zero of the other sign.
    return jnp.round(size / step + draws) * step * jnp.copysign(jnp.float32(1), x)


def _errors(blocks: Blocks, codes: Codes, scales: Scales, amax: Array, rule: Rule) -> Scales:
    """Of what each scale makes of a block."""
    found = exact.product(decode(codes) * scales[..., None], amax[..., None, None, None])
    return rule.error(exact.divide(found, rule.largest_value * rule.largest_scale) - blocks)
