"""Linear weights packed as NVFP4 by FourOverSix (LongLive 2.0, `fouroversix/quantize`): kept as
they are, or unpacked.

Where a file has `X.quantized_weight_values`, it has no `X.weight`, but

    X.quantized_weight_values         uint8 [out, in / 2], two e2m1 a byte, the even column low
    X.quantized_weight_scale_factors  e4m3, one per 16 columns, in cuBLAS's 128×4 order, flat
    X.quantized_weight_amax           float32 [1], the largest magnitude of the whole weight
    X.quantized_weight_metadata       int32 [out, in, padded out, padded in]

and a weight is e2m1 · e4m3 · amax / (largest e2m1 · largest scale), as in
`longlive_kernels.nvfp4.format`. The divisor depends on the rule that chose the scales, which the
tensors do not name but show: see `rule`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8
from longlive_kernels.nvfp4.format import BLOCK, RULES, VALUES

from longlive_jax.config import Precision
from longlive_jax.convert.lora import LINEARS
from longlive_jax.convert.source import Stored, Tensors, spec_of
from longlive_jax.convert.table import Row
from longlive_jax.errors import InputError

FIELDS = ("packed", "scales", "amax")  # of a matrix as we keep it (`quant.kernels.FourBit`)
_START = "quantized_weight_"  # not _transposed_, a second copy for gradients: that is not read
_TENSORS = ("values", "scale_factors", "amax", "metadata")
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_UNPACK = "--dequantize unpacks them"

Matrix = tuple[UInt8[np.ndarray, "out half"], Float[np.ndarray, "out blocks"], np.ndarray]


def is_packed(names: Iterable[str]) -> bool:
    """Whether any of a checkpoint's tensors is packed."""
    return any(name.endswith(f"{_START}values") for name in names)


def unpacked(tensors: Mapping[str, np.ndarray], dtype=ml_dtypes.bfloat16) -> Tensors:
    """The tensors, of which the packed ones appear as the `weight` that they stand for, unpacked
    when read.
    """

    def weight(name: str, shape: tuple[int, int], read: Callable[[], list]) -> dict[str, Stored]:
        dense = lambda: _known(name, lambda: unpack(*read(), dtype))  # noqa: E731
        return {name: Stored(shape, np.dtype(dtype), dense)}

    return _replaced(tensors, weight)


def kept(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """The tensors, of which the packed ones appear as `weight.packed`, `weight.scales` and
    `weight.amax`: the same bytes, without padding and with scales in rows.
    """

    def fields(name: str, shape: tuple[int, int], read: Callable[[], list]) -> dict[str, Stored]:
        rows, columns = shape
        shapes = ((rows, columns // 2), (rows, columns // BLOCK), ())
        kinds = (np.dtype(np.uint8), _E4M3, np.dtype(np.float32))
        one = lambda i: lambda: matrix(*read())[i]  # noqa: E731
        described = enumerate(zip(FIELDS, shapes, kinds, strict=True))
        return {
            f"{name}.{field}": Stored(size, kind, one(i)) for i, (field, size, kind) in described
        }

    return _replaced(tensors, fields)


def _replaced(tensors: Mapping[str, np.ndarray], make: Callable[..., dict[str, Stored]]) -> Tensors:
    """make: of the name and the shape of a packed weight, and of what reads its tensors, what
    appears in their place.
    """
    stored: dict[str, Stored] = {}
    for name in tensors:
        if name.endswith(f"{_START}values"):
            start = name.removesuffix("values")
            shape = tuple(int(n) for n in tensors[f"{start}metadata"][:2])
            read = functools.partial(_read, tensors, [start + part for part in _TENSORS])
            stored |= make(f"{start.removesuffix(_START)}weight", shape, read)
        elif _START not in name:
            spec = spec_of(tensors, name)
            read = lambda name=name: np.asarray(tensors[name])  # noqa: E731
            stored[name] = Stored(tuple(spec.shape), np.dtype(spec.dtype), read)
    return Tensors(stored)


def _read(tensors: Mapping[str, np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
    return [np.asarray(tensors[name]) for name in names]


def _known(name: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ValueError as error:
        raise InputError(f"{name} cannot be read: {error}") from error


def matrix(values, scales, amax, metadata) -> Matrix:
    """Codes, scales by row and the largest magnitude of one packed weight. Raises ValueError where
    sizes do not agree with the metadata.
    """
    rows, columns, padded_rows, padded_columns = (int(n) for n in metadata)
    packed = values.view(np.uint8).reshape(padded_rows, padded_columns // 2)
    scales = unswizzle(scales.view(_E4M3), padded_rows, padded_columns // BLOCK)
    amax = amax.astype(np.float32).reshape(())
    return packed[:rows, : columns // 2], scales[:rows, : columns // BLOCK], amax


def unpack(values, scales, amax, metadata, dtype=np.float32) -> Float[np.ndarray, "out in"]:
    """The weight of which these are the packed parts. Raises ValueError where their sizes do not
    agree with the metadata, or their scales are of no rule that is known.
    """
    packed, scales, amax = matrix(values, scales, amax, metadata)
    chosen = RULES[rule(packed, scales) or "mse"]
    factor = amax / np.float32(chosen.largest_value * chosen.largest_scale)
    weight = VALUES[nibbles(packed)].reshape(*scales.shape, BLOCK)
    weight = weight * scales.astype(np.float32)[:, :, None] * factor
    return weight.reshape(len(packed), -1).astype(dtype)


def nibbles(packed: UInt8[np.ndarray, "r c"]) -> UInt8[np.ndarray, "r 2*c"]:
    """The two codes of every byte, the low one first."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)


def unswizzle(scales: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Scales in cuBLAS's order → r c. Tiles of 128 rows × 4 columns follow each other along the
    columns; within one, the scales of row r are at 16·(r mod 32) + 4·(r div 32).
    """
    tiles = scales.reshape(rows // 128, columns // 4, 32, 4, 4)  # R C r q c
    return tiles.transpose(0, 3, 2, 1, 4).reshape(rows, columns)  # (R q r) (C c)


def rule(packed: UInt8[np.ndarray, "r half"], scales: Float[np.ndarray, "r s"]) -> str | None:
    """The name in `RULES` by which a matrix is read; None of zeros, which any of them reads.

    The largest scale is 448 under the static rules (always 6, always 4), that of the block of the
    largest magnitude. Under those that choose between 6 and 4 by error, which are read alike, such
    a block has 256 or 1.5 · 256, and the others no more than that. A 6 in a block of scale 448
    tells the static rules apart.

    Raises ValueError where it is neither.
    """
    largest = scales.astype(np.float32).max(initial=0)
    if largest == 0:
        return None
    if 256 <= largest <= 384:
        return "mse"
    if largest == 448:
        top = np.repeat(scales.astype(np.float32) == 448, BLOCK, 1)
        value = int(np.abs(VALUES[nibbles(packed)[top]]).max())
        if value in (4, 6):
            return f"static_{value}"
    raise ValueError(f"a largest scale of {largest:g} is of no rule that is known")


def table(tensors: Tensors, plain: Sequence[Row], layers: int) -> tuple[Precision, list[Row]]:
    """How the matrices of `kept` tensors are kept in a transformer of so many layers, and the name
    table that fills it. plain: that of weights as they are.

    Raises InputError where one model of ours cannot keep them so.
    """
    found, paths, rules = [], [], {}
    for row in plain:
        names = row.names((layers,))
        packed = [name for name in names if f"{name}.{FIELDS[0]}" in tensors]
        if not packed:
            found.append(row)
            continue
        path = row.target.removesuffix(".kernel")
        if path not in LINEARS or len(packed) < len(names):
            why = "is no linear layer" if path not in LINEARS else "is packed in some blocks only"
            raise InputError(f"{path} {why}: {_UNPACK}")
        found += [Row(f"{row.source}.{field}", f"{row.target}.{field}") for field in FIELDS]
        paths.append(path)
        for name in packed:
            codes, scales = (tensors[f"{name}.{field}"] for field in FIELDS[:2])
            rules[_known(name, functools.partial(rule, codes, scales))] = name
    rules.pop(None, None)
    if len(rules) > 1:
        said = ", ".join(f"{name} by {chosen}" for chosen, name in rules.items())
        raise InputError(f"matrices are packed by more than one rule ({said}): {_UNPACK}")
    return Precision(_patterns(paths), rule=next(iter(rules), "mse")), found


def _patterns(paths: Sequence[str]) -> tuple[tuple[str, str], ...]:
    blocks = [path for path in LINEARS if path.startswith("blocks.")]
    patterns = ["blocks.*"] if sorted(paths) == sorted(blocks) else paths
    return tuple((pattern, "nvfp4") for pattern in patterns)
