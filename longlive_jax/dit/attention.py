"""The `attn` callables: what differs between training, streaming and recaching.

A block hands over queries and keys that are normalised but not rotated; an `attn` rotates them,
decides what is visible, and returns `(out, state)`. `state` runs through the layers; it is None
where nothing is remembered.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int
from longlive_kernels.attention.chunk_table import chunk_table, unmasked
from longlive_kernels.attention.chunk_table.api import BACKENDS as PROMPT_BACKENDS
from longlive_kernels.attention.sink_window import Fresh, Order, sink_window

from longlive_jax import sharding
from longlive_jax.dit import storage
from longlive_jax.dit.rope import in_space, rotate

Heads = Float[Array, "b n a d"]
Frames = Float[Array, "b f s a d"]
Call = tuple[Heads, Heads, Heads]  # q, k and v
KV = tuple[Any, Any]  # of all layers, kept in any way of `storage`
OfSegments = Float[Array, "b s n a d"]
OfSaid = Float[Array, "b s l a d"]  # keys or values of each segment's prompt
Table = tuple[tuple[bool, ...], ...]  # rows of a boolean table: query frame, key frame


EVERYTHING = ((True,),)  # a table in which all queries see all keys


class OfPrompts:
    """How prompts are attended: the same wherever frames are not left to a kernel by name."""

    def text(self, q: OfSegments, k: OfSaid, v: OfSaid) -> OfSegments:
        """Each of s segments of a sequence attends its own prompt. Videos and segments stay two
        axes: they may lie on different axes of a mesh.
        """
        return jax.vmap(unmasked, 1, 1)(q, k, v)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["angles"], meta_fields=["table"])
@dataclasses.dataclass(frozen=True)
class Masked(OfPrompts):
    """Attention under a static table over latent frames (`mask.table`), for training and
    bidirectional models.

    Empty tiles of the table cost nothing.
    """

    angles: Float[Array, "b n p"]
    table: Table

    def spread(self, x: Array) -> Array:
        return x

    def __call__(self, q: Heads, k: Heads, v: Heads, state: None) -> tuple[Heads, None]:
        q, k = rotate(q, self.angles), rotate(k, self.angles)
        return chunk_table(q, k, v, self.table), None


def named(backend: str) -> str | None:
    """As kernels take it: None picks the default."""
    return None if backend == "best" else backend


def as_table(table: np.ndarray) -> Table:
    return tuple(tuple(bool(x) for x in row) for row in table)


def masked(table: np.ndarray, angles: Float[Array, "b n p"]) -> Masked:
    return Masked(angles, as_table(table))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """The keys and values of all layers, kept in any way of `storage`, and the layer whose turn it
    is.
    """

    k: Any  # layers b slots s a d
    v: Any
    layer: Int[Array, ""]


# Where arrays lie that have a row for each video, and those with layers in front.
ROWS = PartitionSpec(sharding.BATCH)
LAYERS = PartitionSpec(None, sharding.BATCH)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cached(OfPrompts):
    """Attention over the slot table: writes this call's frames into their slots, then attends the
    visible slots.

    slots: the slot of each of the call's frames; a frame that is to leave no trace names the one
    past the last. chunk: of each of them. visible: which slots each frame may attend, or one row
    for all of them; order: what is known of it when the program is compiled, as `sink_window` takes
    it. angles: phases of the call's frames. read: phases in time of all slots, where positions are
    relative: keys are then stored rotated in space alone, and in time when they are read. final:
    this is the frames' clean pass. backend: of `sink_window`; "best": the default. mesh: over which
    the rows are spread; each device writes and attends its own.
    """

    angles: Float[Array, "b n p"]
    slots: Int[Array, "b f"]
    chunk: Int[Array, "b f"]
    visible: Bool[Array, "b f_or_1 slots"]
    read: Float[Array, "b slots t"] | None = None
    order: Order = dataclasses.field(default="any", metadata=dict(static=True))
    final: bool = dataclasses.field(default=False, metadata=dict(static=True))
    backend: str = dataclasses.field(default="best", metadata=dict(static=True))
    mesh: Mesh | None = dataclasses.field(default=None, metadata=dict(static=True))

    def spread(self, x: Array) -> Array:
        return sharding.rows(x, self.mesh)

    def __call__(self, q: Heads, k: Heads, v: Heads, state: LayerCache) -> tuple[Heads, LayerCache]:
        write = self.by_rows(Cached._write, (ROWS, LAYERS))
        out, kept = write(self, (q, k, v), (state.k, state.v), state.layer)
        return out, LayerCache(*kept, state.layer + 1)

    def by_rows(self, run: Callable, made: Any) -> Callable:
        """`run` of (self, q k v, what is kept, layer), on each device with its rows. made: where
        its results lie. Left to itself, XLA gathers rows that are written and read by index, and
        with them the activations of all layers.
        """
        if self.mesh is None:
            return run
        # Loops within begin with zeros, which are the same on all devices, and end with what is
        # not: the check of that would refuse them.
        given = (ROWS, ROWS, LAYERS, PartitionSpec())
        return jax.shard_map(run, mesh=self.mesh, in_specs=given, out_specs=made, check_vma=False)

    def text(self, q: OfSegments, k: OfSaid, v: OfSaid) -> OfSegments:
        """`OfPrompts.text`, by the backend that is named where it attends prompts, too. Kernels
        write no scores: those of a prompt of 512 tokens are more than all else that a block moves
        between its matmuls (`experiments/pointwise.py`).
        """
        backend = self.backend if self.backend in PROMPT_BACKENDS else None
        attend = functools.partial(chunk_table, table=EVERYTHING, implementation=backend)

        def segments(q: Array, k: Array, v: Array) -> Array:
            each = [attend(q[:, i], k[:, i], v[:, i]) for i in range(q.shape[1])]
            return jnp.stack(each, 1)

        if self.mesh is None:
            return segments(q, k, v)
        given = dict(in_specs=(ROWS, ROWS, ROWS), out_specs=ROWS, check_vma=False)
        return jax.shard_map(segments, mesh=self.mesh, **given)(q, k, v)

    def _write(self, call: Call, kept: KV, layer: Int[Array, ""]) -> tuple[Heads, KV]:
        q, new = self._turned(*call)
        place = storage.Place(layer, self.slots, self.chunk, self.final)
        k, v = (storage.enter(x, y, place) for x, y in zip(kept, new, strict=True))
        fresh = Fresh(*new, self.slots) if isinstance(k, storage.LowBit) else None
        return self._over(q, (k, v), layer, fresh), (k, v)

    def attend_beside(self, call: Call, kept: KV, layer: Int[Array, ""]) -> tuple[Heads, KV]:
        """Attention over the memory as it is, the call's frames in the place of their slots; and
        their keys and values, b f s a d.
        """
        q, new = self._turned(*call)
        return self._over(q, kept, layer, Fresh(*new, self.slots)), new

    def _turned(self, q: Heads, k: Heads, v: Heads) -> tuple[Heads, tuple[Frames, Frames]]:
        """Queries, and keys and values as they are kept."""
        lasting = self.angles if self.read is None else in_space(self.angles, self.read.shape[2])
        q, k = rotate(q, self.angles), rotate(k, lasting)
        shape = (*self.slots.shape, -1, *k.shape[2:])
        return q, (k.reshape(shape), v.reshape(shape))

    def _over(self, q: Heads, kept: KV, layer: Int[Array, ""], fresh: Fresh | None) -> Heads:
        return sink_window(
            q,
            *map(storage.table, kept),
            self.visible,
            layer=layer,
            read=self.read,
            fresh=fresh,
            order=self.order,
            implementation=named(self.backend),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beside(OfPrompts):
    """`Cached`, but the memory stays as it is, and a call's own keys and values are attended beside
    it. For gradients: of every layer they keep what runs through the layers, which here is what is
    written and never read, [layers b f s a d], instead of the whole memory.
    """

    attn: Cached
    k: Any  # of all layers, kept in any way of `storage`
    v: Any

    def spread(self, x: Array) -> Array:
        return self.attn.spread(x)

    def __call__(self, q: Heads, k: Heads, v: Heads, state: LayerCache) -> tuple[Heads, LayerCache]:
        attend = self.attn.by_rows(Cached.attend_beside, (ROWS, ROWS))
        out, new = attend(self.attn, (q, k, v), (self.k, self.v), state.layer)
        made = (x.at[state.layer].set(y) for x, y in zip((state.k, state.v), new, strict=True))
        return out, LayerCache(*made, state.layer + 1)
