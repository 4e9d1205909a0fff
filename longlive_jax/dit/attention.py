"""The `attn` callables: what differs between training, streaming and recaching.

A block hands over queries and keys that are normalised but not rotated; an `attn` rotates them,
decides what is visible, and returns `(out, state)`. `state` runs through the layers; it is None
where nothing is remembered.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from longlive_kernels.attention.chunk_table import chunk_table
from longlive_kernels.attention.sink_window import Fresh, sink_window

from longlive_jax.dit import storage
from longlive_jax.dit.rope import rotate

Heads = Float[Array, "b n a d"]
Keys = Float[Array, "b m a d"]
Frames = Float[Array, "b f s a d"]
Table = tuple[tuple[bool, ...], ...]  # rows of a boolean table: query frame, key frame


def attend(q: Heads, k: Keys, v: Keys) -> Heads:
    """softmax(q kᵀ / √d) v, the softmax in float32."""
    q, k, v = (
        jnp.swapaxes(x, 1, 2) for x in (q, k, v)
    )  # b a n d; batch axes in front are faster on CPUs
    scores = jnp.einsum("band,bamd->banm", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * (1.0 / np.sqrt(q.shape[-1])), axis=-1).astype(v.dtype)
    return jnp.swapaxes(jnp.einsum("banm,bamd->band", weights, v), 1, 2)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["angles"], meta_fields=["table"])
@dataclasses.dataclass(frozen=True)
class Masked:
    """Attention under a static table over latent frames (`mask.table`), for training and
    bidirectional models.

    Empty tiles of the table cost nothing.
    """

    angles: Float[Array, "b n p"]
    table: Table

    def __call__(self, q: Heads, k: Heads, v: Heads, state: None) -> tuple[Heads, None]:
        q, k = rotate(q, self.angles), rotate(k, self.angles)
        return chunk_table(q, k, v, self.table), None


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cached:
    """Attention over the slot table: writes this call's frames into their slots, then attends the
    visible slots.

    slots: the slot of each of the call's frames; a frame that is to leave no trace names the one
    past the last. chunk: of each of them. visible: which slot each may attend. angles: phases of
    the call's frames. read: phases of all slots, where positions are relative: keys are then stored
    as they come, and rotated when they are read. final: this is the frames' clean pass.
    """

    angles: Float[Array, "b n p"]
    slots: Int[Array, "b f"]
    chunk: Int[Array, "b f"]
    visible: Bool[Array, "b f slots"]
    read: Float[Array, "b m p"] | None = None
    final: bool = dataclasses.field(default=False, metadata=dict(static=True))

    def __call__(self, q: Heads, k: Heads, v: Heads, state: LayerCache) -> tuple[Heads, LayerCache]:
        q, k, v = self.turned(q, k, v)
        place = storage.Place(state.layer, self.slots, self.chunk, self.final)
        kept = storage.enter(state.k, k, place), storage.enter(state.v, v, place)
        fresh = Fresh(k, v, self.slots) if isinstance(kept[0], storage.LowBit) else None
        return self.over(q, *kept, state.layer, fresh), LayerCache(*kept, state.layer + 1)

    def turned(self, q: Heads, k: Heads, v: Heads) -> tuple[Heads, Frames, Frames]:
        """Queries, and keys and values as they are kept, b f s a d."""
        q, k = rotate(q, self.angles), rotate(k, self.angles) if self.read is None else k
        shape = (*self.slots.shape, -1, *k.shape[2:])
        return q, k.reshape(shape), v.reshape(shape)

    def over(self, q: Heads, k: Any, v: Any, layer: Int[Array, ""], fresh: Fresh | None) -> Heads:
        """Attention over what is kept of all layers, fresh frames in the place of their slots."""
        tables = map(storage.table, (k, v))
        return sink_window(q, *tables, self.visible, layer=layer, read=self.read, fresh=fresh)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Beside:
    """`Cached`, but the memory stays as it is, and a call's own keys and values are attended beside
    it. For gradients: of every layer they keep what runs through the layers, which here is what is
    written and never read, [layers b f s a d], instead of the whole memory.
    """

    attn: Cached
    k: Any  # of all layers, kept in any way of `storage`
    v: Any

    def __call__(self, q: Heads, k: Heads, v: Heads, state: LayerCache) -> tuple[Heads, LayerCache]:
        q, k, v = self.attn.turned(q, k, v)
        fresh = Fresh(k, v, self.attn.slots)
        out = self.attn.over(q, self.k, self.v, state.layer, fresh)
        new = (x.at[state.layer].set(y) for x, y in ((state.k, k), (state.v, v)))
        return out, LayerCache(*new, state.layer + 1)
