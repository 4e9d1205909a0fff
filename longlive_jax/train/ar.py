"""Teacher forcing of long videos (LongLive 2.0 section 2.1, `model/diffusion.py`): every chunk is
denoised from a noise level of its own, given the clean chunks before it; all chunks of a sequence
are learned at once, spread over devices.

Arrays are in the order of the video, b f …, also where they are spread over devices: rank p has the
p-th part of the frames. Only inside the forward they lie as `Order` says.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from longlive_jax import flow, sharding
from longlive_jax.config import ModelConfig, StreamConfig
from longlive_jax.dit import mask, parallel
from longlive_jax.dit.attention import as_table
from longlive_jax.dit.model import DiT, TextKV
from longlive_jax.dit.parallel import Ulysses
from longlive_jax.dit.rope import phases
from longlive_jax.errors import InputError
from longlive_jax.flow import Flow
from longlive_jax.train.order import Order

Latents = Float[Array, "b f h w c"]


@dataclasses.dataclass(frozen=True)
class ARConfig:
    """What is learned. The values of LongLive 2.0 are the defaults (section 4, appendix I)."""

    stream: StreamConfig
    shift: float = 5.0
    # Contexts are made a little noisy: at most this level, and this share of the chunks.
    context_sigma: float = 0.0
    context_share: float = 1.0
    image: bool = False  # the first latent is given: clean, and not in the loss
    windowed: bool = False  # attend as the streaming cache does; otherwise all that came before
    balanced: bool = True
    remat: str = "nothing"  # of a block is kept for its gradient, its input aside
    attention: str = "best"  # a backend of `longlive_kernels.attention.chunk_table`

    def order(self, ranks: int) -> Order:
        return Order(ranks if self.balanced else 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Videos:
    """Encoded videos, and prompts as the text encoder leaves them."""

    latents: Float[Array, "*parts b f h w c"]
    context: Float[Array, "*parts b p l e"]
    prompt: Int[Array, "*parts b n"]  # which of its p prompts each chunk is under
    valid: Float[Array, "*parts b f"]  # 0 where a video is padded: not in the loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """What chance decides in a step, as a function of the position in the video. Errors are what
    recycling adds to what the model is shown (`recycling.py`).
    """

    noise: Latents
    t: Float[Array, "b f"]  # timestep of each noisy frame
    context_t: Float[Array, "b f"]  # of each clean one, 0: as it is
    error: Latents | None = None
    noise_error: Latents | None = None
    context_error: Latents | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Task:
    """What the model is shown, and what it should say."""

    context: Latents
    context_t: Float[Array, "b f"]
    noisy: Latents
    t: Float[Array, "b f"]
    target: Latents
    counts: Float[Array, "b f"]


def draw(keys: Array, shape: tuple[int, ...], cfg: ARConfig, mesh: Mesh) -> Draws:
    """Draws for latents of `shape`, b f h w c, of a key for each video. Every device makes its own
    part, of what one device would draw.
    """
    chunk, chunks = cfg.stream.chunk, shape[1] // cfg.stream.chunk

    def of_video(key: Array) -> tuple[Array, Array]:
        noise, _, share, level = jax.random.split(key, 4)
        context = jax.random.uniform(level, (chunks,)) * cfg.context_sigma
        context = jnp.where(jax.random.uniform(share, (chunks,)) < cfg.context_share, context, 0.0)
        return jax.random.normal(noise, shape[1:]), flow.TRAIN_STEPS * context

    noise, context_t = jax.vmap(of_video)(keys)
    t = timesteps(keys, shape[1], cfg)
    return Draws(sharding.frames(noise, mesh), t, jnp.repeat(context_t, chunk, 1))


def timesteps(keys: Array, frames: int, cfg: ARConfig) -> Float[Array, "b f"]:
    """One level of the table for each chunk of each video, drawn evenly."""
    chunks = frames // cfg.stream.chunk

    def of_video(key: Array) -> Array:
        return jax.random.randint(jax.random.split(key, 4)[1], (chunks,), 0, flow.TRAIN_STEPS)

    return jnp.repeat(Flow(cfg.shift).timestep(jax.vmap(of_video)(keys)), cfg.stream.chunk, 1)


def video_keys(key: Array, parts: int, b: int) -> Array:
    """A key for each video of a step, parts b: the same however many parts there are."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(parts * b))
    return keys.reshape(parts, b)


def task(latents: Latents, valid: Float[Array, "b f"], draws: Draws, cfg: ARConfig) -> Task:
    """Corrupts videos (`model/diffusion.py:CausalDiffusion.generator_loss`)."""
    levels = Flow(cfg.shift)

    def plus(x: Latents, error: Latents | None) -> Latents:
        return x if error is None else x + error.astype(x.dtype)

    noise = plus(draws.noise, draws.noise_error)
    noisy = flow.corrupt(plus(latents, draws.error), noise, levels.sigma(draws.t))
    context_sigma = jnp.where(draws.context_t > 0, levels.sigma(draws.context_t), 0.0)
    context = plus(flow.corrupt(latents, draws.noise, context_sigma), draws.context_error)
    made = Task(context, draws.context_t, noisy, draws.t, flow.target(latents, noise), valid)
    return _given(made, latents) if cfg.image else made


def _given(made: Task, latents: Latents) -> Task:
    """With the first latent frame given, at timestep 0."""
    first = jnp.arange(latents.shape[1]) == 0

    def put(x: Array, value: Array | float) -> Array:
        return jnp.where(first.reshape(-1, *(1,) * (x.ndim - 2)), value, x)

    return Task(
        put(made.context, latents),
        put(made.context_t, 0.0),
        put(made.noisy, latents),
        put(made.t, 0.0),
        put(made.target, 0.0),
        put(made.counts, 0.0),
    )


def velocity(
    dit: DiT, made: Task, text: TextKV, prompt: Int[Array, "b n"], cfg: ARConfig, mesh: Mesh
) -> Latents:
    """What the model says of the noisy frames."""
    b, f = made.t.shape
    order = cfg.order(mesh.shape[sharding.SEQ])
    limits = dict(window=cfg.stream.window, sink=cfg.stream.sink) if cfg.windowed else {}
    table = order.table(mask.clean(f, cfg.stream.chunk), **limits)
    x = order.join(made.context, made.noisy).astype(text.k.dtype)
    x = sharding.frames(x, mesh)  # b 2f h w c
    position = jnp.broadcast_to(jnp.arange(f, dtype=jnp.float32), (b, f))
    rows, columns = (n // p for n, p in zip(x.shape[2:4], dit.cfg.patch[1:], strict=True))
    angles = phases(dit.cfg, sharding.frames(order.join(position, position), mesh), rows, columns)
    segment = order.join(prompt, prompt)
    segment = jnp.broadcast_to(segment, (text.k.shape[0], *segment.shape))
    attn = Ulysses(angles, as_table(table), mesh, cfg.attention)
    t = sharding.frames(order.join(made.context_t, made.t), mesh)
    kv = TextKV(text.k, text.v, segment)
    v, _ = dit(x, t, kv, attn, remat=cfg.remat)
    return sharding.frames(order.split(v)[1], mesh)


def check_attention(cfg: ARConfig, model: ModelConfig, frames: int, ranks: int, dtype: Any) -> None:
    """Raises InputError where `cfg.attention` cannot attend so many latent frames here, in `dtype`.
    Nothing is computed.
    """
    table = as_table(cfg.order(ranks).table(mask.clean(frames, cfg.stream.chunk)))
    heads = model.dit.heads // ranks, model.dit.head_dim
    parallel.check((1, 2 * frames * model.tokens_per_frame, *heads), table, cfg.attention, dtype)


def loss_sum(v: Latents, made: Task, cfg: ARConfig) -> Float[Array, ""]:
    """The loss of every frame that counts, added up; the mean is this over `counts.sum()`, of all
    devices and all parts of a step.
    """
    error = (v.astype(jnp.float32) - made.target.astype(jnp.float32)) ** 2
    weight = Flow(cfg.shift).training_weight(made.t) * made.counts  # b f
    return jnp.sum(jnp.mean(error, axis=(2, 3, 4)) * weight)


def check(cfg: ARConfig, frames: int, heads: int, ranks: int) -> None:
    """Raises InputError where a sequence cannot be spread over so many ranks: before anything is
    compiled.
    """
    chunk = cfg.stream.chunk
    if frames % (ranks * chunk):
        raise InputError(
            f"{frames} latent frames do not divide into {ranks} ranks of whole chunks of {chunk}:"
            f" frames must be a multiple of {ranks * chunk}"
        )
    if heads % ranks:
        raise InputError(f"{heads} heads do not divide over {ranks} ranks of a sequence")
