"""Weights as a flat dict, path to array: what optimisers, checkpoints and files hold.

A path is the attribute path joined by dots ("blocks.self_attn.q.kernel").
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

M = TypeVar("M", bound=nnx.Module)
Weights = Mapping[str, jax.Array]


def flatten(model: nnx.Module) -> dict[str, jax.Array]:
    """The parameters of `model`; of an abstract one, their shapes and types."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}


def unflatten(model: M, weights: Weights) -> M:
    """A module like `model` (abstract or concrete) that holds `weights`."""
    graph, state = nnx.split(model)
    paths = nnx.to_flat_state(state)
    flat = {path: leaf.replace(weights[".".join(map(str, path))]) for path, leaf in paths}
    return nnx.merge(graph, nnx.from_flat_state(flat))


def save(path: str | os.PathLike, weights: Weights, dtype=None) -> None:
    """Writes safetensors, whole or not at all; `dtype` casts on the way."""
    from safetensors.numpy import save_file

    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    host = {k: np.asarray(v if dtype is None else v.astype(dtype)) for k, v in weights.items()}
    partial = path.with_suffix(".partial")
    save_file(host, partial)
    partial.replace(path)


def load(path: str | os.PathLike, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Reads safetensors and casts to `dtype`."""
    import safetensors

    tensors = safetensors.deserialize(pathlib.Path(path).read_bytes())
    names = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
    return {
        name: jnp.asarray(np.frombuffer(t["data"], names[t["dtype"]]).reshape(t["shape"]), dtype)
        for name, t in tensors
    }
