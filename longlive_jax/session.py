"""A video while it is made: state in, state out.

A `Session` is everything that a video's next chunk depends on. `generate` denoises one chunk into
it, `decode` turns the chunk into pixels, `recache` re-reads the window under a new prompt. All are
pure functions, compiled once for any length.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from longlive_jax import sampler
from longlive_jax.config import ModelConfig, StreamConfig
from longlive_jax.dit import cache as slots
from longlive_jax.dit.attention import Cached, LayerCache
from longlive_jax.dit.cache import KVCache
from longlive_jax.dit.model import DiT, TextKV
from longlive_jax.dit.rope import phases
from longlive_jax.vae.tae import TAE
from longlive_jax.vae.vae import VAE, VAECarry, init_carry, stream

Latents = Float[Array, "b f h w c"]
KV = tuple[Array, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Session:
    """State of `b` videos that advance together.

    Under guidance the cache holds twice as many rows: the conditional ones, then the unconditional
    ones. `held` are the latents of the frames in the cache, slot by slot; a recache needs them.
    """

    cache: KVCache
    held: Float[Array, "b slots h w c"]
    carry: VAECarry
    frame: Int[Array, ""]  # latent frames made so far
    chunk: Int[Array, ""]
    shot: Int[Array, " b"]
    key: Array  # noise is a function of this key, the chunk and the step


def begin(model: ModelConfig, vae: VAE | TAE, batch: int, seed: int, dtype=jnp.float32) -> Session:
    """A session with nothing made yet."""
    rows = batch * model.sampler.branches
    grid = (model.latent_height, model.latent_width, model.dit.channels)
    frame, chunk = (jnp.zeros((), jnp.int32) for _ in range(2))  # two buffers: sessions are donated
    return Session(
        cache=slots.empty(model.dit, model.stream, rows, model.tokens_per_frame, dtype),
        held=jnp.zeros((batch, model.stream.window, *grid), dtype),
        carry=init_carry(vae, batch, model.height, model.width),
        frame=frame,
        chunk=chunk,
        shot=jnp.zeros(batch, jnp.int32),
        key=jax.random.key(seed),
    )


def noise(session: Session, frames: int, step: int | Int[Array, ""] = 0) -> Latents:
    """Normal noise of the next chunk's `step`."""
    key = jax.random.fold_in(jax.random.fold_in(session.key, session.chunk), step)
    b, _, *grid = session.held.shape
    return jax.random.normal(key, (b, frames, *grid), session.held.dtype)


@functools.partial(
    jax.jit, static_argnames=("stream", "solver", "guidance"), donate_argnames="session"
)
def generate(
    dit: DiT,
    session: Session,
    text: TextKV,
    first_noise: Latents,
    *,
    stream: StreamConfig,
    solver: sampler.Solver,
    guidance: float = 1.0,
) -> tuple[Session, Latents]:
    """The next chunk: `denoise` as one program that updates the session in place, with the
    session's own noise.
    """
    renoise = functools.partial(noise, session, first_noise.shape[1])
    return denoise(
        dit,
        session,
        text,
        first_noise,
        renoise,
        stream=stream,
        solver=solver,
        guidance=guidance,
    )


def denoise(
    dit: DiT,
    session: Session,
    text: TextKV,
    first_noise: Latents,
    renoise: sampler.Renoise,
    *,
    stream: StreamConfig,
    solver: sampler.Solver,
    guidance: float = 1.0,
) -> tuple[Session, Latents]:
    """Denoises the next chunk and writes it into the cache with a clean pass.

    Args:
      text: the prompt in force, for every row of the cache.
      first_noise: b f h w c; f is the length of the chunk.
      renoise: step -> noise of that step, for solvers that put fresh noise on between steps.
    """
    rows, frames = session.cache.frame.shape[0], first_noise.shape[1]
    shot = jnp.tile(session.shot, rows // session.shot.shape[0])
    taken = slots.choose(session.cache, frames, stream.sink)
    cache = slots.claim(session.cache, taken, session.frame, session.chunk, shot)
    visible = jnp.repeat(cache.filled[:, None], frames, 1)
    attn = Cached(_angles(dit, session.held, cache, taken, stream), taken, visible)

    def forward(x: Array, t: Array, kv: KV) -> tuple[Array, KV]:  # b -> rows
        x = jnp.tile(x, (rows // x.shape[0], 1, 1, 1, 1))
        state = LayerCache(*kv, jnp.zeros((), jnp.int32))
        v, state = dit(x, jnp.full((rows, 1), t, jnp.float32), text, attn, state)
        return v, (state.k, state.v)

    def velocity(x: Latents, t: Array, kv: KV) -> tuple[Latents, KV]:
        v, kv = forward(x, t, kv)
        return (v if rows == x.shape[0] else sampler.guide(*jnp.split(v, 2), guidance)), kv

    kv = cache.k, cache.v
    latents, kv = sampler.sample_stateful(solver, velocity, first_noise, renoise, kv)
    _, kv = forward(latents, jnp.zeros(()), kv)
    batch = jnp.arange(latents.shape[0])[:, None]
    session = dataclasses.replace(
        session,
        cache=dataclasses.replace(cache, k=kv[0], v=kv[1]),
        held=session.held.at[batch, taken[: latents.shape[0]]].set(latents),
        frame=session.frame + frames,
        chunk=session.chunk + 1,
    )
    return session, latents


def _angles(
    dit: DiT,
    held: Float[Array, "b slots h w c"],
    cache: KVCache,
    taken: Int[Array, "rows f"],
    stream: StreamConfig,
) -> Float[Array, "rows n p"]:
    """Rotary phases of the frames in the slots `taken`: each keeps its position and its shot's
    offset.
    """
    pick = lambda x: jnp.take_along_axis(x, taken, 1)  # noqa: E731
    position = pick(cache.frame) + stream.shot_offset * pick(cache.shot)
    rows, columns = (n // p for n, p in zip(held.shape[2:4], dit.cfg.patch[1:], strict=True))
    return phases(dit.cfg, position.astype(jnp.float32), rows, columns)


@functools.partial(jax.jit, static_argnames="stream", donate_argnames="session")
def recache(
    dit: DiT, session: Session, text: TextKV, which: Bool[Array, " b"], *, stream: StreamConfig
) -> Session:
    """Re-reads every held frame under a new prompt, each chunk seeing itself and what came before
    it.

    LongLive 1.0 section 3.1 (KV recache), in the causal layout that the paper describes. One clean
    pass over the window; frames keep their slot, position and shot. `which` videos do so; the
    others keep their memory as it is.
    """
    cache = session.cache
    rows, count = cache.frame.shape
    taken = jnp.tile(jnp.arange(count, dtype=jnp.int32), (rows, 1))
    visible = (cache.chunk[:, :, None] >= cache.chunk[:, None, :]) & cache.filled[:, None, :]
    attn = Cached(_angles(dit, session.held, cache, taken, stream), taken, visible)
    held = jnp.tile(session.held, (rows // session.held.shape[0], 1, 1, 1, 1))
    kv = LayerCache(cache.k, cache.v, jnp.zeros((), jnp.int32))
    _, kv = dit(held, jnp.zeros((rows, 1)), text, attn, kv)
    which = jnp.tile(which, rows // which.shape[0])[None, :, None, None, None, None]
    k, v = jnp.where(which, kv.k, cache.k), jnp.where(which, kv.v, cache.v)
    return dataclasses.replace(session, cache=dataclasses.replace(cache, k=k, v=v))


@functools.partial(jax.jit, donate_argnames="session", static_argnames="first")
def decode(
    vae: VAE | TAE, session: Session, latents: Latents, *, first: bool
) -> tuple[Session, UInt8[Array, "b t H W 3"]]:
    """Pixels of a chunk. `first`: it begins the video, and its first latent frame is one
    picture.
    """
    frames, carry = stream(vae, session.carry, latents, first=first)
    frames = frames.astype(jnp.float32)  # bfloat16 has no room for 256 levels
    pixels = jnp.clip(jnp.round((frames + 1.0) * 127.5), 0.0, 255.0).astype(jnp.uint8)
    return dataclasses.replace(session, carry=carry), pixels
