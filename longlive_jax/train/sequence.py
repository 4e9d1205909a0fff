"""A video that training makes clip by clip (LongLive 1.0 section 3.2, "streaming long tuning";
`model/streaming_training.py`).

A sequence goes on from clip to clip over the student's own memory, which has no gradient: only the
newest clip is judged. Memory does not grow with the video. A clip that is judged on its own begins
with a picture, as all videos of its teacher do: its first frame is encoded once more, alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from longlive_jax import sharding
from longlive_jax.config import ModelConfig
from longlive_jax.rollout import Latents, Rollout
from longlive_jax.train.dmd import Prompts
from longlive_jax.train.self_forcing import Script
from longlive_jax.vae import vae as vaes
from longlive_jax.vae.vae import VAE, VAECarry


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plot:
    """What whole sequences of N chunks show.

    context: encoded prompts. negative: of none. prompt: which of them each chunk is under. A cut
    begins a shot, at a switch the memory is read anew. given: a picture that videos begin with.
    """

    context: Float[Array, "b p l e"]
    negative: Float[Array, "b l e"]
    prompt: Int[Array, "b n"]
    cut: Bool[Array, "b n"]
    switch: Bool[Array, "b n"]
    given: Float[Array, "b 1 h w c"] | None = None

    def script(self, start: Int[Array, ""], chunks: int) -> Script:
        """Of the `chunks` from `start` on."""
        part = [
            jax.lax.dynamic_slice_in_dim(x, start, chunks, 1)
            for x in (self.prompt, self.cut, self.switch)
        ]
        return Script(self.context, *part, self.given)

    def prompts(self, start: Int[Array, ""], chunks: int, newest: bool) -> Prompts:
        """By which the `chunks` from `start` on are judged; `newest`: all by the last one's."""
        prompt = jax.lax.dynamic_slice_in_dim(self.prompt, start, chunks, 1)
        if not newest:
            return Prompts(self.context, prompt, self.negative)
        last = jnp.take_along_axis(self.context, prompt[:, -1:, None, None], 1)
        return Prompts(last, jnp.zeros_like(prompt), self.negative)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequence:
    """Videos on their way.

    latents: the last frames, as many as a judged clip has. carry: of a decoder that has come to the
    first of these.
    """

    plot: Plot
    memory: Rollout
    latents: Latents
    carry: VAECarry

    @property
    def chunks(self) -> int:
        """Made so far; of all videos as many."""
        return int(self.memory.chunk.addressable_data(0)[0])


Videos = TypeVar("Videos", Rollout, Sequence)


def spread(
    of: Videos, mesh: Mesh, how: Callable[[Array, NamedSharding], Array] = jax.device_put
) -> Videos:
    """Different videos on different devices of a batch. how: `jax.lax.with_sharding_constraint`
    inside `jax.jit`.
    """

    def put(path: tuple, x: Array) -> Array:
        names = {getattr(key, "name", None) for key in path}
        rows = PartitionSpec(None, sharding.BATCH)  # layers are in front of them
        by_layer = "cache" in names and names & {"k", "v"}
        return how(x, NamedSharding(mesh, rows if by_layer else PartitionSpec(sharding.BATCH)))

    return jax.tree.map_with_path(put, of)


def open_(vae: VAE, cfg: ModelConfig, plot: Plot, memory: Rollout, clip: Latents) -> Sequence:
    """A sequence after its first clip, all of which is new."""
    carry = vaes.init_carry(vae, clip.shape[0], cfg.height, cfg.width)
    carry = vaes.stream(vae, carry, clip[:, :1], first=True)[1]
    return Sequence(plot, memory, clip, carry)


def extend(
    vae: VAE, sequence: Sequence, memory: Rollout, new: Float[Array, "b n h w c"]
) -> tuple[Sequence, Latents, Float[Array, "b f"]]:
    """The sequence after one more clip, and what is judged: as many frames as before, the new ones
    last, the first one encoded again as a picture; and which of them are new.
    """
    before, count = sequence.latents, new.shape[1]
    frames, carry = vaes.stream(vae, sequence.carry, before[:, 1 : 1 + count], first=False)
    picture = jnp.clip(frames[:, -1:], -1.0, 1.0)
    latents = jnp.concatenate([before, new], 1)[:, count:]
    shown = jnp.concatenate([vaes.encode(vae, picture).astype(new.dtype), latents[:, 1:]], 1)
    fresh = jnp.arange(latents.shape[1]) >= latents.shape[1] - count
    is_new = jnp.broadcast_to(fresh.astype(jnp.float32), latents.shape[:2])
    return Sequence(sequence.plot, memory, latents, carry), shown, is_new
