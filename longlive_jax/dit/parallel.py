"""Attention of a sequence that is spread over devices."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float
from longlive_kernels.attention.chunk_table import chunk_table

from longlive_jax import sharding
from longlive_jax.dit.attention import Heads, OfPrompts, Table, named
from longlive_jax.dit.rope import rotate
from longlive_jax.errors import InputError
from longlive_jax.sharding import BATCH, SEQ


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["angles"],
    meta_fields=["table", "mesh", "backend"],
)
@dataclasses.dataclass(frozen=True)
class Ulysses(OfPrompts):
    """Attention under a table, by the exchange of DeepSpeed-Ulysses (arXiv 2309.14509; LongLive 2.0
    section 2.1, `distributed/sequence_parallel.py`).

    Each device rotates its own tokens. One exchange of q, k and v together turns all heads of its
    tokens into its heads of all tokens, one more turns the result back. The gathered order is used
    as it is: `table` and `angles` are in that order. backend: of `chunk_table`; "best": its own
    choice.
    """

    angles: Float[Array, "b n p"]
    table: Table
    mesh: Mesh
    backend: str = "best"

    def spread(self, x: Array) -> Array:
        return sharding.frames(x, self.mesh)

    def __call__(self, q: Heads, k: Heads, v: Heads, state: None) -> tuple[Heads, None]:
        tokens = PartitionSpec(BATCH, SEQ)
        local = functools.partial(_local, table=self.table, backend=named(self.backend))
        run = jax.shard_map(local, mesh=self.mesh, in_specs=(tokens,) * 4, out_specs=tokens)
        return run(q, k, v, self.angles), None


def check(shape: tuple[int, int, int, int], table: Table, backend: str, dtype: Any) -> None:
    """Raises InputError where a device of this kind cannot attend by `backend`: b n a d of its
    heads, in `dtype`. Nothing is computed.
    """

    def attend() -> Array:
        x = jnp.zeros(shape, dtype)
        return chunk_table(x, x, x, table, implementation=named(backend))

    try:
        jax.eval_shape(attend)
    except NotImplementedError as error:
        raise InputError(f"attention: {error}") from error


def _local(
    q: Array, k: Array, v: Array, angles: Array, *, table: Table, backend: str | None
) -> Array:
    """On one device: b n/ranks a d of every operand."""
    exchange = functools.partial(jax.lax.all_to_all, axis_name=SEQ, tiled=True)
    qkv = jnp.stack([rotate(q, angles), rotate(k, angles), v])
    q, k, v = exchange(qkv, split_axis=3, concat_axis=2)  # b n a/ranks d
    out = chunk_table(q, k, v, table, implementation=backend)
    return exchange(out, split_axis=1, concat_axis=2)
