"""`longlive quantize`: a model's folder with matrices in fewer bits, as a new folder.

A layer at a time: no more than one kernel is held as it is quantised.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import model, weights
from longlive_jax.config import Precision
from longlive_jax.convert.source import spec_of
from longlive_jax.convert.table import Pending
from longlive_jax.errors import InputError
from longlive_jax.output import check_new_folder
from longlive_jax.quant import kernels, transformer

_PART = "dit"


def run(name: str | os.PathLike, output: str | os.PathLike, how: Precision) -> None:
    """Writes the folder `output`, whole or not at all. Other weights are linked to the model's
    files where the disk allows it; the rest is copied.

    Raises:
      InputError: the model is broken, its matrices do not fit or are so already, it has a LoRA of
        its own, or `output` is there.
    """
    source, target = model.folder_of(name), pathlib.Path(output)
    cfg = model.read_config(source)
    if cfg.precision is not None:
        raise InputError(f"the matrices of {source} are in fewer bits already")
    if (source / "lora.safetensors").exists():
        raise InputError(f"{source} has a LoRA: merge it first (longlive merge-lora)")
    check_new_folder(target)
    tensors = weights.read(source, _PART)
    specs = {path: spec_of(tensors, path) for path in tensors}
    transformer.check({path: spec.shape for path, spec in specs.items()}, how)
    chosen = {path + transformer.SUFFIX: kind for path, kind in transformer.kinds(how).items()}
    pending: dict[str, Pending] = {}
    for path, spec in specs.items():
        if path in chosen:
            pending |= _parts(path, tensors, spec.shape, chosen[path], how)
        else:
            whole = functools.partial(_whole, tensors, path)
            pending[path] = Pending(spec.shape, spec.dtype, whole)
    model.write_with(target, source, pending, dataclasses.replace(cfg, precision=how))


def _parts(
    path: str, tensors: Mapping[str, Any], shape: tuple[int, ...], kind: str, how: Precision
) -> dict[str, Pending]:
    """What a kernel becomes. Its parts are written one after the other; it is quantised once."""
    make = functools.partial(kernels.make, kind=kind, how=how)
    like = jax.eval_shape(make, jax.ShapeDtypeStruct(shape, jnp.float32))
    made = functools.cache(lambda: _by_layer(make, np.asarray(tensors[path])))
    left = list(weights.arrays({path: like}))

    def pieces(name: str) -> Iterator[np.ndarray]:
        yield made()[name.removeprefix(path)]
        left.remove(name)
        if not left:
            made.cache_clear()

    return {
        name: Pending(x.shape, np.dtype(x.dtype), functools.partial(pieces, name))
        for name, x in weights.arrays({path: like}).items()
    }


def dense(pending: Mapping[str, Pending], leaves: Mapping[str, Any]) -> dict[str, Pending]:
    """What fills a transformer of these leaves, its kernels in fewer bits unpacked to bfloat16, a
    layer at a time.
    """
    made = {}
    for path, leaf in leaves.items():
        made[path] = pending.get(path)
        if isinstance(leaf, kernels.Kernel):
            unpack = functools.partial(_unpacked, pending, path, leaf)
            made[path] = Pending(leaf.shape, np.dtype(jnp.bfloat16), unpack)
    return made


def _unpacked(pending: Mapping[str, Pending], path: str, leaf: Any) -> Iterator[np.ndarray]:
    held = {name: pending[name].array() for name in weights.arrays({path: leaf})}
    kernel = weights.filled({path: leaf}, held)[path]
    one = jax.jit(lambda x: x.dense().astype(jnp.bfloat16))
    if len(leaf.shape) == 2:
        yield np.asarray(one(kernel))
    else:
        for i in range(leaf.shape[0]):
            yield np.asarray(one(kernel[i]))[None]


def _by_layer(make: Any, kernel: np.ndarray) -> dict[str, np.ndarray]:
    one = jax.jit(make)
    layers = [weights.arrays({"": one(jnp.asarray(layer)[None])}) for layer in kernel]
    return {name: np.concatenate([layer[name] for layer in layers]) for name in layers[0]}


def _whole(tensors: Mapping[str, Any], path: str) -> Iterator[np.ndarray]:
    yield np.asarray(tensors[path])
