"""Weights in eight bits beside scales, as tools for Wan write them; dequantised when they are read.

A weight is value · scale, computed in float32 and rounded once, to the type that is asked for:

    ComfyUI, musubi-tuner   X.weight in fp8, X.scale_weight; `scaled_fp8` for the file
    ComfyUI                 X.weight in fp8 or int8, X.weight_scale; X.comfy_quant, or
                            `_quantization_metadata` in the header
    LightX2V                X.weight in fp8 or int8, X.weight_scale of each output
    DeepSeek                X.weight in fp8, X.weight_scale_inv of blocks of 128x128
    quanto                  X.weight._data in fp8 or int8, X.weight._scale

A scale is one number, one for each output, or one for each of equal blocks of a matrix. Scales of
activations are left out: nothing here is multiplied in eight bits.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from longlive_jax import documents
from longlive_jax.convert.finite import checked
from longlive_jax.convert.source import Fact, Stored, Tensors
from longlive_jax.errors import InputError

MARKER = "scaled_fp8"  # a tensor that stands for the file; its type is that of the matrices
_CONFIG = ".comfy_quant"  # JSON in bytes, of one matrix
_METADATA = "_quantization_metadata"  # the same for all of them, in the header
# Names of values and of their scales, by what they end in.
_PAIRS = {
    ".scale_weight": ".weight",
    ".weight_scale": ".weight",
    ".weight_scale_inv": ".weight",
    ".weight._scale": ".weight._data",
}
_UNUSED = (".scale_input", ".input_scale", ".output_scale", ".weight_scale_input")
_FORMATS = {
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int8_tensorwise": np.dtype(np.int8),
    "int8_blockwise": np.dtype(np.int8),
    "int8": np.dtype(np.int8),
}
_FP8 = (_FORMATS["float8_e4m3fn"], _FORMATS["float8_e5m2"])
_WIDE = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32))
_INTEGERS = (np.dtype(np.int8), np.dtype(np.uint8))
# What says no more than how to multiply, or what the shape of the scales says too.
_HARMLESS = ("format", "full_precision_matrix_mult", "group_size", "block_size", "orig_dtype")
# What the names of other formats end in or hold, and what they are called.
_OTHERS = {
    ".quant_state.bitsandbytes__nf4": "bitsandbytes (NF4)",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes (FP4)",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes (LLM.int8)",
    ".smooth_factor": "Nunchaku (SVDQuant)",
    ".wscales": "Nunchaku (SVDQuant)",
    ".qzeros": "GPTQ or AWQ",
    ".qweight": "GPTQ or AWQ",
    ".W_q": "HQQ",
    ".weight_packed": "compressed-tensors (packed integers)",
    ".weight_zero_point": "compressed-tensors (with zero points)",
    ".weight_global_scale": "NVFP4",
    ".weight_scale_2": "NVFP4 (ModelOpt)",
    ".weight_qdata": "torchao",
    "._weight_qdata": "torchao",
    ".weight._packed": "quanto (less than eight bits)",
    ".weight._shift": "quanto (less than eight bits)",
    ".weight._data._data": "quanto (less than eight bits)",
}
_ADVICE = "convert a file in bf16, fp16, scaled fp8 or int8"


@dataclasses.dataclass(frozen=True)
class Dequantised:
    """Tensors as of a file that was never quantised, and what was done ("" is nothing)."""

    tensors: Tensors
    note: str


def dequantised(
    tensors: Tensors, facts: Mapping[str, Fact], path: object, dtype: Any = None
) -> Dequantised:
    """The tensors, of which quantised ones appear as the `weight` that they stand for.

    Args:
      tensors: Of a checkpoint, under any names.
      facts: Its metadata.
      path: Where it is, for what is said of it.
      dtype: Of dequantised matrices; None is the shortest type of the other tensors.

    Raises:
      InputError: they are quantised in a way that is not known, or scales and matrices do not go
        together.
    """
    _refuse_others(tensors, path)
    formats = _formats(tensors, facts, path)
    scales = _scales(tensors, path)
    kept = [name for name in tensors if not _is_beside(name, tensors, scales)]
    dtype = np.dtype(dtype or _usual(tensors.spec(name).dtype for name in kept))
    stored, kinds = {}, collections.Counter()
    for name in kept:
        if name not in scales:
            stored[name] = tensors.stored[name]
            continue
        plain = name.removesuffix("._data")
        kind = np.dtype(tensors.spec(name).dtype)
        _check_format(formats.get(plain.removesuffix(".weight")), kind, name, path)
        stored[plain] = _product(tensors, name, scales[name], dtype, path)
        kinds[kind.name] += 1
    counts = " and ".join(f"{count} in {kind}" for kind, count in sorted(kinds.items()))
    note = f"the scaled matrices of {path} ({counts}) are dequantised to {dtype.name}"
    return Dequantised(Tensors(stored), note if kinds else "")


def _refuse_others(tensors: Tensors, path: object) -> None:
    """Raises InputError for formats that are known by name only."""
    for name in tensors:
        if other := next((what for end, what in _OTHERS.items() if name.endswith(end)), None):
            raise InputError(f"{path} is quantised by {other}, which is not read: {_ADVICE}")


def _scales(tensors: Tensors, path: object) -> dict[str, str]:
    """The scale of each quantised tensor. Raises InputError for integers that have none."""
    scales: dict[str, str] = {}
    for name in tensors:
        for end, values in _PAIRS.items():
            owner = name.removesuffix(end) + values
            if not name.endswith(end) or owner not in tensors:
                continue
            if owner in scales:
                raise InputError(f"{path} has two scales of {owner}: {scales[owner]}, {name}")
            scales[owner] = name
    for name in tensors:
        weight = name.endswith((".weight", "._data")) and name not in scales
        if weight and np.dtype(tensors.spec(name).dtype) in _INTEGERS:
            kind = tensors.spec(name).dtype
            raise InputError(f"{path} holds {name} as {kind} without a scale: {_ADVICE}")
    return scales


def _is_beside(name: str, tensors: Tensors, scales: Mapping[str, str]) -> bool:
    """Return whether a tensor is only there for the sake of quantised ones."""
    if name.rpartition(".")[2] == MARKER or name.endswith(_CONFIG) or name in scales.values():
        return True
    end = next((end for end in _UNUSED if name.endswith(end)), None)
    return end is not None and np.dtype(tensors.spec(name).dtype) in _WIDE


def _formats(tensors: Tensors, facts: Mapping[str, Fact], path: object) -> dict[str, str]:
    """The format that the file gives of each module. Raises InputError for unknown ones."""
    configs: dict[str, Any] = {}
    if _METADATA in facts:
        told = documents.parse(str(facts[_METADATA]), f"{path}: {_METADATA}")
        layers = told.get("layers") if isinstance(told, dict) else None
        configs |= layers if isinstance(layers, dict) else {}
    for name in tensors:
        if name.endswith(_CONFIG):
            text = tensors[name].tobytes()
            configs[name.removesuffix(_CONFIG)] = documents.parse(text, f"{path}: {name}")
    formats = {}
    for module, config in configs.items():
        fields = config if isinstance(config, dict) else {}
        kind = str(fields.get("format", "an unnamed format"))
        odd = [key for key, value in fields.items() if key not in _HARMLESS and value]
        if kind not in _FORMATS or odd:
            said = f"{kind} with {', '.join(sorted(odd))}" if odd else kind
            raise InputError(f"{path} is quantised as {said[:80]}, which is not read: {_ADVICE}")
        formats[module] = kind
    return formats


def _check_format(said: str | None, kind: np.dtype, name: str, path: object) -> None:
    if kind not in (*_FP8, np.dtype(np.int8)):
        raise InputError(f"{path} holds {name} as {kind} beside a scale: {_ADVICE}")
    if said is not None and _FORMATS[said] != kind:
        raise InputError(f"{path} says that {name} is {said}, but it is {kind}")


def _usual(kinds: Iterable[np.dtype]) -> np.dtype:
    """The shortest type of what is not quantised; bfloat16 where there is nothing."""
    found = set(kinds)
    return next((kind for kind in _WIDE if kind in found), _WIDE[0])


def _product(tensors: Tensors, name: str, scale: str, dtype: np.dtype, path: object) -> Stored:
    """The weight that values and their scale stand for."""
    shape = tuple(tensors.spec(name).shape)
    spread = _spread(shape, tuple(tensors.spec(scale).shape))
    if spread is None or np.dtype(tensors.spec(scale).dtype) not in _WIDE:
        spec = tensors.spec(scale)
        raise InputError(
            f"{path} has a scale that does not fit: {scale} is {spec.dtype} {list(spec.shape)} for"
            f" a matrix of {list(shape)}"
        )

    def read() -> np.ndarray:
        values = tensors[name].astype(np.float32)
        with np.errstate(over="ignore"):  # of float16: it is found below
            product = (values * spread(tensors[scale].astype(np.float32))).astype(dtype)
        return checked(product, f"the product of {name} and {scale}", path)

    return Stored(shape, dtype, read)


def _spread(
    shape: tuple[int, ...], scale: tuple[int, ...]
) -> Callable[[np.ndarray], np.ndarray] | None:
    """Return a function that repeats scales of the second shape for values of the first; None where
    they do not fit.
    """
    if math.prod(scale) == 1:
        return lambda x: x.reshape(())
    while len(scale) > max(len(shape), 1) and scale[-1] == 1:
        scale = scale[:-1]
    if len(scale) == 1:  # of each output
        scale = (*scale, *[1] * (len(shape) - 1))
    if len(scale) != len(shape) or not all(shape) or not all(scale):
        return None
    if any(size % count for size, count in zip(shape, scale, strict=True)):
        return None
    return functools.partial(_repeated, shape=shape, counts=scale)


def _repeated(x: np.ndarray, shape: tuple[int, ...], counts: tuple[int, ...]) -> np.ndarray:
    x = x.reshape(counts)
    for axis, (size, count) in enumerate(zip(shape, counts, strict=True)):
        if 1 < count < size:
            x = np.repeat(x, size // count, axis)
    return x
