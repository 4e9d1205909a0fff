"""The KV cache: a table of slots, one latent frame each.

Softmax does not care about the order of keys, so a new chunk simply takes free slots, or those of
the oldest frames that are no sinks: nothing is ever shifted, and shapes never change. Replaces the
roll-and-pin branches of `causal_model.py:CausalWanSelfAttention.forward`.

Sinks are known by their rank in time, not by a number: they are never evicted, so the oldest frames
that are held are the first ones of the video, or the first ones since the table was last emptied.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from longlive_jax.config import DiTConfig, StreamConfig
from longlive_jax.dit import storage

EMPTY = -1


@dataclasses.dataclass(frozen=True)
class Table:
    """What each slot holds. A slot is empty where `frame` is -1."""

    frame: Int[Array, "b slots"]  # latent frame in the video
    chunk: Int[Array, "b slots"]
    shot: Int[Array, "b slots"]  # its RoPE offset is shot * StreamConfig.shot_offset

    @property
    def filled(self) -> Bool[Array, "b slots"]:
        return self.frame >= 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache(Table):
    """Keys and values of every layer, slot by slot. Keys are stored rotated; where positions are
    relative, in space alone.
    """

    k: Any  # layers b slots s a d, kept in any way of `storage`
    v: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Held(Table):
    """The latents of the last `window` frames and of all sinks: what a recache reads."""

    latents: Float[Array, "b slots h w c"]


AnyTable = TypeVar("AnyTable", bound=Table)


def _labels(batch: int, slots: int) -> dict[str, Array]:
    # Buffers of their own: tables are donated.
    names = ("frame", "chunk", "shot")
    return {name: jnp.full((batch, slots), EMPTY, jnp.int32) for name in names}


def empty(
    cfg: DiTConfig, stream: StreamConfig, batch: int, tokens: int, dtype=jnp.float32
) -> KVCache:
    """A cache of `stream.window` slots of `tokens` tokens, kept as `stream.kv` says.

    Raises ValueError for heads that cannot be kept so.
    """
    shape = (cfg.layers, batch, stream.window, tokens, cfg.heads, cfg.head_dim)
    k = storage.empty(stream.kv, shape, dtype, scores=stream.eight_bit_scores)
    v = storage.empty(stream.kv, shape, dtype)
    return KVCache(k=k, v=v, **_labels(batch, stream.window))


def empty_held(
    stream: StreamConfig, batch: int, grid: tuple[int, int, int], dtype=jnp.float32
) -> Held:
    """No latents yet. The sinks that are no longer among the last `window` frames have room of
    their own.
    """
    slots = stream.window + stream.sink + stream.shot_sink
    return Held(latents=jnp.zeros((batch, slots, *grid), dtype), **_labels(batch, slots))


def rank(table: Table) -> Int[Array, "b slots"]:
    """How many held frames are older, slot by slot. Frames are in order of time, 0 is the
    oldest.
    """
    return _older(table).sum(2, dtype=jnp.int32)


def _older(table: Table) -> Bool[Array, "b slots slots"]:
    frame = table.frame
    return table.filled[:, None, :] & (frame[:, None, :] < frame[:, :, None])


def newest(table: Table) -> Int[Array, " b"]:
    """The slot of the newest frame; any slot while all are empty."""
    return jnp.argmax(table.frame, axis=1).astype(jnp.int32)


def shown(table: Table) -> Int[Array, " b"]:
    """The shot of the newest frame."""
    return jnp.take_along_axis(table.shot, newest(table)[:, None], 1)[:, 0]


def is_sink(table: Table, sink: int, shot_sink: int = 0) -> Bool[Array, "b slots"]:
    """The frames that are not evicted: the first `sink` ones (global sink), and the first
    `shot_sink` ones of the shot that was last shown (shot sink, LongLive 2.0 section 4.2).

    The chunk that opens a new shot thus still sees the sink of the shot before.
    """
    of_shot = table.filled & (table.shot == shown(table)[:, None])
    in_shot = (_older(table) & of_shot[:, None, :]).sum(2, dtype=jnp.int32)
    return table.filled & ((rank(table) < sink) | (of_shot & (in_shot < shot_sink)))


def choose(table: Table, frames: int, sink: int, shot_sink: int = 0) -> Int[Array, "b f"]:
    """Slots for the next `frames` latent frames: empty ones first, else the oldest frames that are
    no sinks.
    """
    never = jnp.iinfo(jnp.int32).max
    age = jnp.where(is_sink(table, sink, shot_sink), never, table.frame)
    return jnp.argsort(age, axis=1, stable=True)[:, :frames].astype(jnp.int32)


def claim(
    table: AnyTable,
    slots: Int[Array, "b f"],
    start: Int[Array, " b"],
    chunk: Int[Array, " b"],
    shot: Int[Array, " b"],
) -> AnyTable:
    """Labels `slots` as frames start, start + 1, … of `chunk`. What they hold follows."""
    batch = jnp.arange(slots.shape[0])[:, None]
    frame = start[:, None] + jnp.arange(slots.shape[1], dtype=jnp.int32)
    return dataclasses.replace(
        table,
        frame=table.frame.at[batch, slots].set(frame),
        chunk=table.chunk.at[batch, slots].set(chunk[:, None]),
        shot=table.shot.at[batch, slots].set(shot[:, None]),
    )


def keep(table: AnyTable, which: Bool[Array, "b slots"]) -> AnyTable:
    """Empties every slot but `which`."""
    return dataclasses.replace(table, frame=jnp.where(which, table.frame, EMPTY))


def latents_of(held: Held, frames: Int[Array, "b n"]) -> Float[Array, "b n h w c"]:
    """The held latents of frames; of a frame that is not held, anything."""
    place = jnp.argmax(held.frame[:, None, :] == frames[:, :, None], axis=2)
    return jnp.take_along_axis(held.latents, place[:, :, None, None, None], 1)
