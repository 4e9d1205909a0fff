"""Streams of the tests: sessions of small models, and single forwards over the slot cache."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax import rollout
from longlive_jax.config import TINY_TEXT, ModelConfig, SamplerConfig, StreamConfig, VAEConfig
from longlive_jax.dit import cache as slots
from longlive_jax.dit.attention import Cached, LayerCache
from longlive_jax.dit.rope import in_time, phases, rotate
from longlive_jax.vae.vae import VAE

# Half the time to compile; nothing here runs long.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

GRID = (4, 4)  # latent rows and columns: 2 x 2 tokens
TOKENS = 4
SMALL_VAE = VAEConfig(
    latent_channels=4,
    encoder_dim=8,
    decoder_dim=8,
    multipliers=(1, 1, 1),
    res_blocks=1,
    strides=((2, 1), (2, 1)),
    patch=2,
    attention=False,
    kernel=(1, 1),
    shortcut=True,
)


def model(dit, stream: StreamConfig, sampler: SamplerConfig, grid=GRID) -> ModelConfig:
    height, width = (n * SMALL_VAE.space_stride for n in grid)
    return ModelConfig("test", dit.cfg, SMALL_VAE, TINY_TEXT, stream, sampler, height, width, 16)


def randomly(build):
    """The module that `build` makes of `nnx.Rngs`, with random weights; compiles nothing."""
    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    rng = np.random.default_rng(0)

    def draw(x):
        fan_in = np.prod(x.shape[:-1][-4:]) if len(x.shape) > 1 else 25.0
        return jnp.asarray(rng.normal(size=x.shape) / fan_in**0.5, x.dtype)

    return jax.tree.map(draw, abstract)


@functools.cache
def vae() -> VAE:
    return randomly(lambda rngs: VAE(SMALL_VAE, rngs=rngs))


def begin(
    dit, stream: StreamConfig, sampler: SamplerConfig, *, batch=1, seed=0, grid=GRID
) -> rollout.Rollout:
    return rollout.begin(model(dit, stream, sampler, grid), [seed + row for row in range(batch)])


@jit
def text(dit, context):
    """Prompts b l c, one for all of a row's tokens."""
    return dit.text_kv(context[:, None])


@functools.partial(jit, static_argnames=("frames", "sink", "shot_sink"))
def claim(cache, start, chunk, shot=0, *, frames, sink, shot_sink=0):
    """Labels the slots of the next chunk, the same in every row."""
    taken = slots.choose(cache, frames, sink, shot_sink)
    labels = (jnp.full(taken.shape[0], x, jnp.int32) for x in (start, chunk, shot))
    return taken, slots.claim(cache, taken, *labels)


@jit
def call(dit, cache, taken, visible, position, x, t, text, read=None):
    """Velocity of latents b f h w c that see the slots `visible` (b slots), and the cache.

    read: positions of all slots (b slots), where they are relative.
    """
    rows, columns = (n // 2 for n in x.shape[2:4])
    angles = phases(dit.cfg, position, rows, columns)
    read = None if read is None else in_time(dit.cfg, read)
    state = LayerCache(cache.k, cache.v, jnp.zeros((), jnp.int32))
    chunk = jnp.take_along_axis(cache.chunk, taken, 1)
    attn = Cached(angles, taken, chunk, visible[:, None], read)
    v, state = dit(x, t, text, attn, state)
    return v, dataclasses.replace(cache, k=state.k, v=state.v)


@functools.partial(jit, static_argnames=("stream", "solver", "guidance"))
def denoise(dit, video, text, noise, draws=None, given=None, *, stream, solver, guidance=1.0):
    """`rollout.denoise`, the noise between steps being `draws`, one for each step but the first."""
    renoise = lambda step: draws[step - 1]  # noqa: E731
    options = dict(stream=stream, solver=solver, guidance=guidance)
    return rollout.denoise(dit, video, text, noise, renoise, given, **options)


@functools.partial(jit, static_argnames="stream")
def absorb(dit, video, text, latents, *, stream):
    """`rollout.absorb`; `video` stays as it is."""
    return rollout.absorb(dit, video, text, latents, stream=stream)


@functools.partial(jit, static_argnames=("stream", "how"))
def recache(dit, video, text, which, *, stream, how):
    """`rollout.recache`; `video` stays as it is."""
    return rollout.recache(dit, video, text, which, stream=stream, how=how)


def by_frame(cache, x, row=0) -> dict[int, np.ndarray]:
    """Latent frame -> what `x` (keys or values, layers b slots …) holds of it."""
    x, frames = np.asarray(x), np.asarray(cache.frame[row])
    return {int(frame): x[:, row, slot] for slot, frame in enumerate(frames) if frame >= 0}


def in_space(cfg, k, grid=GRID) -> np.ndarray:
    """Keys *l s a d of frames as they come, as they are kept where positions are relative."""
    angles = phases(cfg, jnp.zeros((1, 1)), *(n // 2 for n in grid))
    frames = jnp.asarray(k).reshape(-1, *k.shape[-3:])
    return np.asarray(rotate(frames, jnp.repeat(angles, frames.shape[0], 0))).reshape(k.shape)


def attended(cache) -> list[list[int]]:
    """The frames in each row's cache, sorted."""
    return [sorted(int(f) for f in row if f >= 0) for row in np.asarray(cache.frame)]
