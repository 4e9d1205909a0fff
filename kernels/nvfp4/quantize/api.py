"""The functions that users call."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32
from longlive_kernels.nvfp4.format import BLOCK, NVFP4, RULES, unscaled
from longlive_kernels.nvfp4.quantize import reference, triton
from longlive_kernels.nvfp4.quantize.hadamard import oriented

# The best first; but before what has not run on a device comes what has.
BACKENDS = {"reference": reference, "triton": triton}


def quantize(
    x: Float[Array, "*s r c"],
    *,
    rule: str = "static_6",
    tile: int = 1,
    transpose: bool = False,
    signs: Float[Array, " n"] | None = None,
    draws: Float32[Array, "k *s p q"] | None = None,
    key: Array | None = None,
    amax: Float32[Array, "*s"] | None = None,
    implementation: str | None = None,
) -> NVFP4:
    """Matrices as NVFP4, each by itself; in float32, whatever the type of x.

    rule: a name in `RULES`. tile: rows that share a scale, 1 or 16. transpose: quantise xᵀ. signs:
    16 of ±1, to rotate every 16 columns of that with (`hadamard.py:rotate`). Rounding is to the
    nearest value, unless it is stochastic: by `draws`, uniform in [0, 1), for one candidate scale
    (two under a rule that chooses by error) and every number [k *s r c], or every block in order
    [k *s blocks e]; or by draws made from `key`, as functions of the position in the whole of x.
    amax: the largest magnitude of each matrix after transposing and rotating, where x is a piece of
    it, as in `jax.shard_map`; see `largest`. implementation: a name in `BACKENDS`;
    None picks the best that supports the call.

    A matrix that holds NaN or infinity comes back as NaN, one that is below 1e-32 as zero.

    Raises ValueError for names, shapes and sizes that do not fit, NotImplementedError where the
    named backend cannot run the call.
    """
    rows, columns = x.shape[:-3:-1] if transpose else x.shape[-2:]
    _check(rule, tile, rows, columns, signs)
    if draws is not None and key is not None:
        raise ValueError("stochastic rounding takes draws or a key, not both")
    shape = (RULES[rule].candidates, *x.shape[:-2], rows, columns)
    if key is not None:
        draws = jax.random.uniform(key, shape, jnp.float32)
    elif draws is not None and draws.shape != shape:
        tiles = (*shape[:-2], rows // tile, columns // BLOCK, tile * BLOCK)
        if draws.shape != (*shape[:-2], tiles[-3] * tiles[-2], tiles[-1]):
            raise ValueError(f"draws of shape {draws.shape} are not those of {shape} in blocks")
        draws = reference.unblocked(draws.reshape(tiles), tile)
    amax = largest(x, transpose=transpose, signs=signs) if amax is None else amax
    options = dict(rule=rule, tile=tile, transpose=transpose, signs=signs, draws=draws, amax=amax)
    return _backend(implementation, x, options).quantize(x, **options)


def largest(
    x: Float[Array, "*s r c"],
    *,
    transpose: bool = False,
    signs: Float[Array, " n"] | None = None,
) -> Float32[Array, "*s"]:
    """The largest magnitude of each matrix, after transposing and rotating. Over pieces of a
    matrix, the largest of theirs (`jax.lax.pmax`) is what all of them are quantised with.
    """
    return jnp.abs(oriented(x, transpose, signs)).max((-2, -1)).astype(jnp.float32)


def dequantize(q: NVFP4, dtype=jnp.float32) -> Float[Array, "*s r c"]:
    """value · scale · (amax / (largest value · largest scale)), in float32, then cast."""
    numbers = unscaled(q.packed, q.scales)
    return (numbers * RULES[q.rule].unit(q.amax)[..., None, None]).astype(dtype)


def _check(rule: str, tile: int, rows: int, columns: int, signs: Array | None):
    if rule not in RULES:
        raise ValueError(f"no rule {rule!r}: there are {', '.join(RULES)}")
    if tile not in (1, BLOCK):
        raise ValueError(f"a scale is shared by 1 or 16 rows, not {tile}")
    if columns % BLOCK or rows % tile:
        raise ValueError(f"{rows} x {columns} do not divide into blocks of {tile} x {BLOCK}")
    if signs is not None and signs.shape != (BLOCK,):
        raise ValueError(f"a rotation has 16 signs, not {signs.shape}")


def _backend(name: str | None, x: Array, options: dict):
    if name is None:
        return next(b for b in BACKENDS.values() if b.unsupported(x, **options) is None)
    if name not in BACKENDS:
        raise NotImplementedError(f"no backend {name!r}: there are {', '.join(BACKENDS)}")
    reason = BACKENDS[name].unsupported(x, **options)
    if reason is not None:
        raise NotImplementedError(f"{name} {reason}")
    return BACKENDS[name]
