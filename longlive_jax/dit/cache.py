"""The KV cache: a table of slots, one latent frame each.

Softmax does not care about the order of keys, and keys are stored rotated. So a new chunk simply
takes free slots, or those of the oldest frames that are no sinks: nothing is ever shifted, and
shapes never change. Replaces the roll-and-pin branches of
`causal_model.py:CausalWanSelfAttention.forward`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from longlive_jax.config import DiTConfig, StreamConfig

EMPTY = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, and what each slot holds. A slot is empty where `frame` is
    -1.
    """

    k: Float[Array, "layers b slots s a d"]
    v: Float[Array, "layers b slots s a d"]
    frame: Int[Array, "b slots"]  # latent frame in the video
    chunk: Int[Array, "b slots"]
    shot: Int[Array, "b slots"]  # its RoPE offset is shot * StreamConfig.shot_offset

    @property
    def filled(self) -> Bool[Array, "b slots"]:
        return self.frame >= 0


def empty(
    cfg: DiTConfig, stream: StreamConfig, batch: int, tokens: int, dtype=jnp.float32
) -> KVCache:
    """A cache of `stream.window` slots of `tokens` tokens."""
    shape = (cfg.layers, batch, stream.window, tokens, cfg.heads, cfg.head_dim)
    k, v = (jnp.zeros(shape, dtype) for _ in range(2))  # buffers of their own: a cache is donated
    labels = (jnp.full((batch, stream.window), EMPTY, jnp.int32) for _ in range(3))
    return KVCache(k, v, *labels)


def choose(cache: KVCache, frames: int, sink: int) -> Int[Array, "b f"]:
    """Slots for the next `frames` latent frames: empty ones first, else the oldest frames that are
    no sinks.
    """
    never = jnp.iinfo(jnp.int32).max
    is_sink = cache.filled & (cache.frame < sink)
    age = jnp.where(is_sink, never, cache.frame)
    return jnp.argsort(age, axis=1, stable=True)[:, :frames].astype(jnp.int32)


def claim(
    cache: KVCache,
    slots: Int[Array, "b f"],
    start: Int[Array, ""],
    chunk: Int[Array, ""],
    shot: Int[Array, " b"],
) -> KVCache:
    """Labels `slots` as frames start, start + 1, … of `chunk`. Their keys and values follow with
    the first pass.
    """
    batch = jnp.arange(slots.shape[0])[:, None]
    frame = start + jnp.arange(slots.shape[1], dtype=jnp.int32)
    return dataclasses.replace(
        cache,
        frame=cache.frame.at[batch, slots].set(frame[None]),
        chunk=cache.chunk.at[batch, slots].set(chunk),
        shot=cache.shot.at[batch, slots].set(shot[:, None]),
    )
