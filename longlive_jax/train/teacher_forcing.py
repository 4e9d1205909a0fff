"""Teacher-forcing training: clean and noisy halves in one forward (LongLive 2.0 section 2.1,
`model/diffusion.py`).

Every noisy chunk is denoised from its own noise level, given the clean chunks before it; every
chunk of a sequence is
supervised at once.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from longlive_jax import flow
from longlive_jax.config import StreamConfig
from longlive_jax.dit import mask
from longlive_jax.dit.attention import masked
from longlive_jax.dit.model import DiT, TextKV
from longlive_jax.dit.rope import phases
from longlive_jax.text.umt5 import UMT5, encode


class TextToLatents(nnx.Module):
    """What is trained together: the transformer, and its text encoder where that is small."""

    def __init__(self, dit: DiT, text: UMT5):
        self.dit, self.text = dit, text


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Sequences of n chunks with up to p prompts each.

    `clean_prompt` says under which prompt a chunk is seen as context, `noisy_prompt` under which it
    is denoised. `weight` is each noisy chunk's in the loss; 0 leaves it out.
    """

    latents: Float[Array, "b f h w c"]
    position: Float[Array, "b f"]  # temporal RoPE position of each latent frame
    ids: Int[Array, "b p l"]
    clean_prompt: Int[Array, "b n"]
    noisy_prompt: Int[Array, "b n"]
    weight: Float[Array, "b m"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which chunks of a sequence are in the forward, as context and to be denoised.

    A chunk may be denoised more than once, each copy from noise of its own: its context is computed
    only once.
    """

    clean: tuple[int, ...]
    noisy: tuple[int, ...]

    def table(self, stream: StreamConfig) -> np.ndarray:
        n = max(self.clean + self.noisy) + 1
        video = mask.clean(n * stream.chunk, stream.chunk)
        part = lambda c: video[c * stream.chunk : (c + 1) * stream.chunk]  # noqa: E731
        labels = [part(c) for c in self.clean]
        labels += [mask.as_noisy(part(c), copy) for copy, c in enumerate(self.noisy)]
        return mask.table(sum(labels[1:], labels[0]), window=stream.window, sink=stream.sink)


def every_chunk(n: int) -> Layout:
    """Every chunk is denoised once. Nobody attends the last clean chunk, so it is left out."""
    return Layout(tuple(range(n - 1)), tuple(range(n)))


@dataclasses.dataclass(frozen=True)
class CorruptionConfig:
    """Noise levels: sigma = shift(u), u uniform, one per noisy chunk; part of the context is noised
    a little.
    """

    shift: float = 3.0
    context_sigma: float = 0.25  # at most
    context_share: float = 0.7  # of the clean chunks


def loss(
    model: TextToLatents,
    batch: Batch,
    key: jax.Array,
    *,
    layout: Layout,
    stream: StreamConfig,
    cfg: CorruptionConfig,
) -> Float[Array, ""]:
    """Weighted mean over noisy chunks of |v - (noise - clean)|²."""
    b, keys = batch.latents.shape[0], jax.random.split(key, 4)
    pick = functools.partial(_pick, chunk=stream.chunk)
    sigma = flow.shift(jax.random.uniform(keys[0], (b, len(layout.noisy))), cfg.shift)
    share, level = jax.random.uniform(keys[1], (2, b, len(layout.clean)))
    context = jnp.where(share < cfg.context_share, level * cfg.context_sigma, 0.0)
    clean, noisy = pick(batch.latents, layout.clean), pick(batch.latents, layout.noisy)
    noise = jax.random.normal(keys[2], noisy.shape)
    level = jnp.repeat(jnp.concatenate([context, sigma], 1), stream.chunk, 1)  # b f
    latents = jnp.concatenate([clean, noisy], 1)
    noises = jnp.concatenate([jax.random.normal(keys[3], clean.shape), noise], 1)
    prompt = jnp.concatenate(
        [batch.clean_prompt[:, list(layout.clean)], batch.noisy_prompt[:, list(layout.noisy)]], 1
    )
    v = velocity(
        model,
        flow.corrupt(latents, noises, level),
        flow.TRAIN_STEPS * level,
        pick(batch.position, layout.clean + layout.noisy),
        TextPlan(batch.ids, prompt),
        layout.table(stream),
    )
    error = (v[:, clean.shape[1] :] - flow.target(noisy, noise)) ** 2
    error = jnp.mean(error.reshape(b, len(layout.noisy), -1), -1)  # b m
    return jnp.sum(error * batch.weight) / jnp.maximum(jnp.sum(batch.weight), 1.0)


def _pick(x: Array, chunks: tuple[int, ...], chunk: int) -> Array:
    """The latent frames of some chunks, in that order."""
    return x[:, np.concatenate([np.arange(chunk) + c * chunk for c in chunks])]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextPlan:
    """Prompts, and which of them each of the s equal segments of a sequence is under."""

    ids: Int[Array, "b p l"]
    segment: Int[Array, "b s"]


def velocity(
    model: TextToLatents,
    latents: Float[Array, "b f h w c"],
    t: Float[Array, "b f"],
    position: Float[Array, "b f"],
    plan: TextPlan,
    table: np.ndarray,
) -> Float[Array, "b f h w c"]:
    """The forward of a sequence under a table over its latent frames."""
    b, p, length = plan.ids.shape
    flat = plan.ids.reshape(b * p, length)
    text = encode(model.text, flat, flat != 0).reshape(b, p, length, -1)
    kv = model.dit.text_kv(text)
    row = jnp.arange(b)[
        :, None
    ]  # whole slices are gathered: their gradient is a few large additions
    kv = TextKV(kv.k[:, row, plan.segment], kv.v[:, row, plan.segment])
    grid = (s // q for s, q in zip(latents.shape[2:4], model.dit.cfg.patch[1:], strict=True))
    attn = masked(table, phases(model.dit.cfg, position, *grid))
    return model.dit(latents, t, kv, attn)[0]
