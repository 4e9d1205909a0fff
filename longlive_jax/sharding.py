"""Where arrays lie on several devices: one mesh of three axes, and the rules for it.

    data   different videos; every device has all weights
    fsdp   different videos
    seq    different parts of the same videos (sequence parallel)

Weights, and what belongs to them, are spread over the devices of `fsdp` and `seq` together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from longlive_jax import cpu_devices
from longlive_jax.errors import InputError

DATA, FSDP, SEQ = AXES = ("data", "fsdp", "seq")
BATCH = (DATA, FSDP)  # both hold different videos
MATRICES = {"kernel", "lora_a", "lora_b"}  # words in names of what is spread


def make_mesh(data: int = 1, fsdp: int = 1, seq: int = 1, *, devices=None) -> Mesh:
    """A mesh of data x fsdp x seq devices, neighbours in `seq` side by side.

    Raises InputError where there are not as many devices, or fewer are asked for than several
    processes have.
    """
    cpu_devices.reserve_threads()
    given, devices = devices, jax.devices() if devices is None else devices
    if data * fsdp * seq > len(devices):
        raise InputError(
            f"a mesh of {data} x {fsdp} x {seq} needs {data * fsdp * seq} devices, there are"
            f" {len(devices)}"
        )
    if given is None and jax.process_count() > 1 and data * fsdp * seq < len(devices):
        raise InputError(
            f"a mesh of several processes must have all their {len(devices)} devices, not"
            f" {data * fsdp * seq}"
        )
    shape, used = (data, fsdp, seq), devices[: data * fsdp * seq]
    cpu_devices.check_threads(used)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=used)


def frames(x: Array, mesh: Mesh) -> Array:
    """Says that b f … is spread over videos and over time."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(BATCH, SEQ)))


def rows(x: Array, mesh: Mesh | None) -> Array:
    """Says that b … is spread over videos alone, where there is a mesh."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(BATCH)))


def whole(x: Array) -> np.ndarray:
    """On the host, also what lies on devices of other processes, which must all ask for it."""
    if not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def of_weight(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """A parameter's place: a matrix is spread over `fsdp` and `seq` along its largest axis that
    divides. The leading axis of stacked blocks is left whole: a layer is gathered when its turn
    comes. What is small is whole everywhere: gathering it would cost more than it is.
    """
    parts, first = mesh.shape[FSDP] * mesh.shape[SEQ], int(".blocks." in f".{name}")
    fitting = [i for i in range(first, len(shape)) if shape[i] % parts == 0]
    axes: list[tuple[str, str] | None] = [None] * len(shape)
    if fitting and parts > 1 and not MATRICES.isdisjoint(name.split(".")):
        axes[max(fitting, key=lambda i: shape[i])] = (FSDP, SEQ)
    return NamedSharding(mesh, PartitionSpec(*axes))


def of_module(module: Any, mesh: Mesh) -> Any:
    """The place of every leaf of a transformer, in its likeness; parts of a matrix in fewer bits
    lie as it does.
    """

    def place(path: tuple, x: Any) -> NamedSharding:
        return of_weight(jax.tree_util.keystr(path, simple=True, separator="."), x.shape, mesh)

    return jax.tree.map_with_path(place, module)


def of_weights(weights: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """The place of every parameter, by name."""
    return {name: of_weight(name, tuple(x.shape), mesh) for name, x in weights.items()}
