"""Linear weights packed as NVFP4 by FourOverSix (LongLive 2.0, `fouroversix/quantize`), unpacked.

Where a file has `X.quantized_weight_values`, it has no `X.weight`, but

    X.quantized_weight_values         uint8 [out, in / 2], two e2m1 a byte, the even column low
    X.quantized_weight_scale_factors  e4m3, one per 16 columns, in cuBLAS's 128×4 order, flat
    X.quantized_weight_amax           float32 [1], the largest magnitude of the whole weight
    X.quantized_weight_metadata       int32 [out, in, padded out, padded in]

and a weight is e2m1 · e4m3 · amax / (largest e2m1 · largest scale). The divisor depends on the rule
that chose the scales, which the tensors do not name but show: see `divisor`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

from longlive_jax.convert.source import Stored, Tensors, spec_of

BLOCK = 16  # columns that share a scale
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
VALUES = np.concatenate([_E2M1, -_E2M1])  # by code: sign, two bits of exponent, one of mantissa
_PACKED = "quantized_weight_"
_TRANSPOSED = "quantized_weight_transposed_"  # a second copy, for gradients: not read


def is_packed(names: Iterable[str]) -> bool:
    """Whether any of a checkpoint's tensors is packed."""
    return any(name.endswith(f"{_PACKED}values") for name in names)


def unpacked(tensors: Mapping[str, np.ndarray], dtype=ml_dtypes.bfloat16) -> Tensors:
    """The tensors, of which the packed ones appear as the `weight` that they stand for, unpacked
    when read.
    """
    stored = {}
    for name in tensors:
        if name.endswith(f"{_PACKED}values"):  # never those of _TRANSPOSED
            start = name.removesuffix("values")
            rows, columns = (int(n) for n in tensors[f"{start}metadata"][:2])
            read = functools.partial(_read, tensors, start, np.dtype(dtype))
            weight = f"{start.removesuffix(_PACKED)}weight"
            stored[weight] = Stored((rows, columns), np.dtype(dtype), read)
        elif _PACKED not in name:
            spec = spec_of(tensors, name)
            read = functools.partial(lambda key: np.asarray(tensors[key]), name)
            stored[name] = Stored(tuple(spec.shape), np.dtype(spec.dtype), read)
    return Tensors(stored)


def _read(tensors: Mapping[str, np.ndarray], start: str, dtype: np.dtype) -> np.ndarray:
    parts = ("values", "scale_factors", "amax", "metadata")
    return unpack(*(np.asarray(tensors[start + part]) for part in parts), dtype)


def unpack(values, scales, amax, metadata, dtype=np.float32) -> Float[np.ndarray, "out in"]:
    """The weight of which these are the packed parts. Raises ValueError where their sizes do not
    agree with the metadata.
    """
    rows, columns, padded_rows, padded_columns = (int(n) for n in metadata)
    codes = nibbles(values.reshape(padded_rows, padded_columns // 2))
    scales = unswizzle(scales.view(ml_dtypes.float8_e4m3fn), padded_rows, padded_columns // BLOCK)
    scales = scales.astype(np.float32)
    factor = np.float32(amax.reshape(-1)[0]) / np.float32(divisor(codes, scales))
    weight = VALUES[codes].reshape(padded_rows, -1, BLOCK) * scales[:, :, None]
    weight = weight.reshape(padded_rows, padded_columns)[:rows, :columns]
    return (weight * factor).astype(dtype)


def nibbles(packed: UInt8[np.ndarray, "r c"]) -> UInt8[np.ndarray, "r 2*c"]:
    """The two codes of every byte, the low one first."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)


def unswizzle(scales: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Scales in cuBLAS's order → r c. Tiles of 128 rows × 4 columns follow each other along the
    columns; within one, the scales of row r are at 16·(r mod 32) + 4·(r div 32).
    """
    tiles = scales.reshape(rows // 128, columns // 4, 32, 4, 4)  # R C r q c
    return tiles.transpose(0, 3, 2, 1, 4).reshape(rows, columns)  # (R q r) (C c)


def divisor(codes: UInt8[np.ndarray, "r c"], scales: Float[np.ndarray, "r s"]) -> int:
    """Largest e2m1 times largest scale, under the rule that chose the scales.

    The block of the largest magnitude has the largest scale, and that is 448 under the static rules
    (always 6, always 4) and 256, or 384 = 1.5 · 256, under those that choose between 4 and 6 by
    error. A 6 in a block of scale 448 tells the two static rules apart.
    """
    if scales.max(initial=0) < 448:
        return 6 * 256
    top = np.repeat(scales == 448, BLOCK, 1)
    return 448 * int(np.abs(VALUES[codes[top]]).max())
