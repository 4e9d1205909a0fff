"""The sinusoidal embedding of timesteps, as exact as float64 makes it.

The references compute angles, sines and cosines in float64 and round the result to float32 (Wan2.1
`wan/modules/model.py:sinusoidal_embedding_1d`). A float32 angle of 1000 rad is off by 3e-5, and so
is its sine. Here float64 is only used for constants, so that 64-bit types stay off:

1. Angles are counted in turns. A product of two numbers of 12 bits fits the 24 bits of a float32,
   so the timestep and the frequency are cut into such numbers, and whole turns are dropped from
   products that are exact.
2. What is left of each product becomes an integer, in units of 2^-31 of a turn. Sums of integers
   are exact, and drop whole turns by themselves.
3. The upper bits of the sum pick the sine and the cosine of one of 256 points of the circle from a
   table; the rest, at most 1/512 of a turn, turns it by a short series. Only the last addition
   rounds a number near 1.

No step depends on the order of float additions or on a product that is rounded before it is added,
so that neither fused multiply-adds nor fast-math options of a compiler change it by more than the
last bit. Timesteps may be traced.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_BASE = 10000.0  # ratio of the highest to the lowest frequency
_HALF = 12  # bits of a number whose product with another such is exact in float32
_TURN = 31  # bits of a turn, as an integer
_POINT = 8  # bits of a turn that the table of points resolves
_REST = _TURN - _POINT


def sinusoid(t: Float[Array, "*b"], dim: int) -> Float[Array, "*b dim"]:
    """Embed timesteps as [cos, sin] of t at geometric frequencies, to 6e-8 of the exact value.

    Args:
      t: timesteps, of any magnitude below 2^20.
      dim: length of the embedding, an even number.

    Returns: float32; the first half holds cosines, the second one sines.
    """
    half = dim // 2
    frequency = _BASE ** (-np.arange(half) / half)  # radians per unit of t, in float64
    cos, sin = _cos_sin(_angle(t.astype(jnp.float32)[..., None], frequency))
    return jnp.concatenate([cos, sin], -1)


def _angle(t: Float[Array, "*b 1"], frequency: np.ndarray) -> Int[Array, "*b half"]:
    """t * frequency in units of 2^-31 of a turn, whole turns aside."""
    turns = frequency / (2 * np.pi)
    first = _upper_bits(turns)
    second = _upper_bits(turns - first)
    third = turns - first - second
    first, second, third = (np.float32(part) for part in (first, second, third))

    # Cut as an integer: a compiler may not take this for a rounding that it can leave out.
    bits = jax.lax.bitcast_convert_type(t, jnp.int32) & np.int32(-(1 << (24 - _HALF)))
    upper = jax.lax.bitcast_convert_type(bits, jnp.float32)
    lower = t - upper
    return (
        _units(upper * first)
        + _units(upper * second)
        + _units(lower * first)
        + _units(t * third + lower * second)
    )


def _upper_bits(x: np.ndarray) -> np.ndarray:
    """x rounded to `_HALF` significant bits."""
    fraction, exponent = np.frexp(x)
    return np.ldexp(np.round(fraction * 2.0**_HALF), exponent - _HALF)


def _units(turns: Float[Array, "*b half"]) -> Int[Array, "*b half"]:
    """Turns as an integer of `_TURN` bits, whole turns aside."""
    fraction = turns - jnp.round(turns)
    return jnp.round(fraction * np.float32(2.0**_TURN)).astype(jnp.int32)


def _cos_sin(
    angle: Int[Array, "*b half"],
) -> tuple[Float[Array, "*b half"], Float[Array, "*b half"]]:
    """Cosine and sine of an angle in units of 2^-31 of a turn."""
    nearest = (angle + np.int32(1 << (_REST - 1))) >> _REST
    rest = (angle - (nearest << _REST)).astype(jnp.float32) * np.float32(2 * np.pi / 2**_TURN)
    sin_rest = rest - rest**3 / 6
    versine_rest = rest**2 / 2 - rest**4 / 24  # 1 - cos

    place = nearest & np.int32((1 << _POINT) - 1)
    points = 2 * np.pi / 2**_POINT * np.arange(2**_POINT)
    cos, cos_below = _pair(np.cos(points), place)
    sin, sin_below = _pair(np.sin(points), place)
    return (
        cos + (cos_below - (cos * versine_rest + sin * sin_rest)),
        sin + (sin_below - (sin * versine_rest - cos * sin_rest)),
    )


def _pair(
    table: np.ndarray, place: Int[Array, "*b half"]
) -> tuple[Float[Array, "*b half"], Float[Array, "*b half"]]:
    """Entries of a float64 table, as a float32 and what it lacks."""
    upper = table.astype(np.float32)
    lower = (table - upper).astype(np.float32)
    return jnp.asarray(upper)[place], jnp.asarray(lower)[place]
