"""Teacher-forcing training: clean and noisy halves in one forward (LongLive 2.0 section 2.1, `model/diffusion.py`).

Every noisy chunk is denoised from its own noise level, given the clean chunks before it; every chunk of a sequence is
supervised at once.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from longlive_jax.dit import mask
from longlive_jax.dit.attention import masked
from longlive_jax.dit.model import DiT, TextKV
from longlive_jax.dit.rope import phases
from longlive_jax.config import StreamConfig
from longlive_jax.text.umt5 import UMT5, encode


class TextToLatents(nnx.Module):
    """What is trained together: the transformer, and its text encoder where that is small."""

    def __init__(self, dit: DiT, text: UMT5):
        self.dit, self.text = dit, text


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences of chunks with up to p prompts each. `*_prompt` says which prompt a chunk of each half is under."""

    latents: Float[Array, "b f h w c"]
    position: Float[Array, "b f"]  # temporal RoPE position of each latent frame
    ids: Int[Array, "b p l"]
    clean_prompt: Int[Array, "b chunks"]
    noisy_prompt: Int[Array, "b chunks"]
    weight: Float[Array, "b chunks"]  # of each chunk in the loss; 0 leaves it out


@dataclasses.dataclass(frozen=True)
class CorruptionConfig:
    """Noise levels: sigma = shift(u), u uniform, one per chunk; part of the clean context is noised a little."""

    shift: float = 3.0
    context_sigma: float = 0.25  # at most
    context_share: float = 0.7  # of the clean chunks

    def sigma(self, u: Array) -> Array:
        return self.shift * u / (1.0 + (self.shift - 1.0) * u)


def layout(stream: StreamConfig, chunks: int) -> np.ndarray:
    """Table of [clean chunks but the last; all noisy chunks]: nobody attends the last clean chunk."""
    video = mask.clean(chunks * stream.chunk, stream.chunk)
    labels = video[: -stream.chunk] + mask.as_noisy(video)
    return mask.table(labels, window=stream.window, sink=stream.sink)


def loss(
    model: TextToLatents, batch: Batch, key: jax.Array, stream: StreamConfig, cfg: CorruptionConfig
) -> Float[Array, ""]:
    """Weighted mean over chunks of |v - (noise - clean)|²."""
    b, f = batch.latents.shape[:2]
    n = f // stream.chunk
    keys = jax.random.split(key, 5)
    sigma = cfg.sigma(jax.random.uniform(keys[0], (b, n)))
    noised = jax.random.uniform(keys[1], (b, n)) < cfg.context_share
    context = jnp.where(noised, jax.random.uniform(keys[2], (b, n)) * cfg.context_sigma, 0.0)
    per_frame = lambda x: jnp.repeat(x, stream.chunk, 1)  # noqa: E731
    blend = lambda s, e: batch.latents + per_frame(s)[..., None, None, None] * (e - batch.latents)  # noqa: E731
    noise = jax.random.normal(keys[3], batch.latents.shape)
    clean = blend(context, jax.random.normal(keys[4], batch.latents.shape))

    def halves(clean_half, noisy_half, per_chunk):
        return jnp.concatenate([clean_half[:, :-per_chunk], noisy_half], 1)

    latents = halves(clean, blend(sigma, noise), stream.chunk)
    t = 1000.0 * per_frame(halves(context, sigma, 1))
    position = halves(batch.position, batch.position, stream.chunk)
    prompt = halves(batch.clean_prompt, batch.noisy_prompt, 1)
    v = _velocity(model, latents, t, position, batch.ids, prompt, layout(stream, n))
    error = jnp.mean((v[:, f - stream.chunk :] - (noise - batch.latents)) ** 2, (2, 3, 4))  # b f
    error = jnp.mean(error.reshape(b, n, -1), -1)
    return jnp.sum(error * batch.weight) / jnp.maximum(jnp.sum(batch.weight), 1.0)


def _velocity(model, latents, t, position, ids, prompt, table):
    b, p, length = ids.shape
    flat = ids.reshape(b * p, length)
    text = encode(model.text, flat, flat != 0).reshape(b, p, length, -1)
    kv = model.dit.text_kv(text)
    index = prompt[None, :, :, None, None, None]
    kv = TextKV(*(jnp.take_along_axis(x, index, axis=2) for x in (kv.k, kv.v)))
    _, rows, columns = (s // q for s, q in zip(latents.shape[1:4], model.dit.cfg.patch, strict=True))
    attn = masked(table, phases(model.dit.cfg, position, rows, columns))
    return model.dit(latents, t, kv, attn)[0]
