"""A check for NaN and infinity in tensors, at the speed of memory.

Read as integers of their size, numbers that are not finite are the largest ones of each sign: the
largest signed integer finds the positive ones, the largest unsigned integer the negative ones. Both
are reductions without a copy.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from longlive_jax.errors import InputError

BLOCK = 1 << 18  # bytes, which stay in a cache for the second reduction

# The smallest positive pattern of bits that is no finite number.
_LEAST = {
    np.dtype(np.float16): 0x7C00,
    np.dtype(ml_dtypes.bfloat16): 0x7F80,
    np.dtype(np.float32): 0x7F800000,
    np.dtype(np.float64): 0x7FF0000000000000,
    np.dtype(ml_dtypes.float8_e5m2): 0x7C,
    np.dtype(ml_dtypes.float8_e4m3fn): 0x7F,
}
_SCALE = np.dtype(ml_dtypes.float8_e8m0fnu)  # without a sign: 0xff is NaN


def finite(x: np.ndarray) -> bool:
    """Return whether all numbers of an array are finite; integers are."""
    kind = x.dtype
    if x.size == 0 or not (kind in _LEAST or kind == _SCALE):
        return True
    if not x.flags.c_contiguous:
        x = x.T if x.flags.f_contiguous else np.ascontiguousarray(x)
    flat = x.reshape(-1)
    if kind == _SCALE:
        return int(flat.view(np.uint8).max()) < 0xFF
    least = _LEAST[kind]
    sign = 1 << (8 * kind.itemsize - 1)
    signed, unsigned = flat.view(f"i{kind.itemsize}"), flat.view(f"u{kind.itemsize}")
    step = BLOCK // kind.itemsize
    for start in range(0, len(flat), step):
        block = slice(start, start + step)
        if signed[block].max() >= least or unsigned[block].max() >= sign + least:
            return False
    return True


def checked(x: np.ndarray, name: str, path: object) -> np.ndarray:
    """Return the array itself. Raises InputError where it holds NaN or infinity."""
    if not finite(x):
        raise InputError(f'"{path}" is damaged: {name} holds NaN or infinity')
    return x
