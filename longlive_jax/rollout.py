"""A video's memory while it is made: state in, state out.

A `Rollout` is everything that the transformer's next chunk depends on, but the prompt. `generate`
denoises one chunk into it, `absorb` writes given latents, `recache` re-reads the window under a new
prompt, `decode` turns latents into pixels. All are pure functions, compiled once for any length.
Rows are videos that advance together; each has a position, a shot and noise of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8
from longlive_kernels.attention.sink_window import Order

from longlive_jax import sampler, sharding
from longlive_jax.config import ModelConfig, Recache, StreamConfig
from longlive_jax.dit import cache as slots
from longlive_jax.dit.attention import KV, Beside, Cached, LayerCache
from longlive_jax.dit.cache import Held, KVCache
from longlive_jax.dit.model import DiT, TextKV
from longlive_jax.dit.rope import in_time, phases
from longlive_jax.vae.tae import TAE
from longlive_jax.vae.vae import VAE, VAECarry, stream

Latents = Float[Array, "b f h w c"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """Memory of `b` videos.

    Under guidance the cache holds twice as many rows: the conditional ones, then the unconditional
    ones. mesh: over whose `sharding.BATCH` the rows are spread; None is one device.
    """

    cache: KVCache
    held: Held
    frame: Int[Array, " b"]  # latent frames made so far
    chunk: Int[Array, " b"]
    shot: Int[Array, " b"]
    key: Array  # b; noise is a function of this key, the chunk and the step
    mesh: Mesh | None = dataclasses.field(default=None, metadata=dict(static=True))


def begin(cfg: ModelConfig, seeds: Sequence[int], dtype=jnp.float32) -> Rollout:
    """One video for each seed, with nothing made yet."""
    return start(cfg, jnp.stack([jax.random.key(seed) for seed in seeds]), dtype)


def start(cfg: ModelConfig, keys: Array, dtype=jnp.float32, mesh: Mesh | None = None) -> Rollout:
    """One video for each key of noise."""
    batch = len(keys)
    grid = (cfg.latent_height, cfg.latent_width, cfg.dit.channels)
    rows = batch * cfg.sampler.branches
    zeros = (jnp.zeros(batch, jnp.int32) for _ in range(3))  # buffers of their own: it is donated
    return Rollout(
        slots.empty(cfg.dit, cfg.stream, rows, cfg.tokens_per_frame, dtype),
        slots.empty_held(cfg.stream, batch, grid, dtype),
        *zeros,
        key=keys,
        mesh=mesh,
    )


def noise(rollout: Rollout, frames: int, step: int | Int[Array, ""] = 0) -> Latents:
    """Normal noise of each video's next chunk, at `step`."""
    shape = (frames, *rollout.held.latents.shape[2:])

    def draw(key: Array, chunk: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(key, chunk), step)
        return jax.random.normal(key, shape, rollout.held.latents.dtype)

    return jax.vmap(draw)(rollout.key, rollout.chunk)


@functools.partial(
    jax.jit, static_argnames=("stream", "solver", "guidance"), donate_argnames="rollout"
)
def generate(
    dit: DiT,
    rollout: Rollout,
    text: TextKV,
    first_noise: Latents,
    given: Float[Array, "b known h w c"] | None = None,
    *,
    stream: StreamConfig,
    solver: sampler.Solver,
    guidance: float = 1.0,
) -> tuple[Rollout, Latents]:
    """The next chunk: `denoise` as one program that updates the rollout in place, with the
    rollout's own noise.
    """
    renoise = functools.partial(noise, rollout, first_noise.shape[1])
    choices = dict(stream=stream, solver=solver, guidance=guidance)
    return denoise(dit, rollout, text, first_noise, renoise, given, **choices)


def denoise(
    dit: DiT,
    rollout: Rollout,
    text: TextKV,
    first_noise: Latents,
    renoise: sampler.Renoise,
    given: Float[Array, "b known h w c"] | None = None,
    *,
    stream: StreamConfig,
    solver: sampler.Solver,
    guidance: float = 1.0,
) -> tuple[Rollout, Latents]:
    """Denoises the next chunk and writes it into the cache, as `stream.clean_pass` says.

    Args:
      text: the prompt in force, for every row of the cache.
      first_noise: b f h w c; f is the length of the chunk.
      renoise: step -> noise of that step, for solvers that put fresh noise on between steps.
      given: the chunk's first latents where they are known (an image): held clean, at timestep 0
        (`causal_diffusion_inference.py`, `initial_latent` with `independent_first_frame`).
    """
    frames = first_noise.shape[1]
    rollout, attn = enter(dit, rollout, frames, stream)
    # What has fewer bits takes final passes only: without a clean one, every step is the last yet.
    attn = dataclasses.replace(attn, final=not stream.clean_pass)
    known = 0 if given is None else given.shape[1]

    def pinned(x: Latents) -> Latents:
        return x if given is None else x.at[:, :known].set(given.astype(x.dtype))

    def velocity(x: Latents, t: Array, kv: KV) -> tuple[Latents, KV]:
        t = jnp.where(jnp.arange(frames)[None] < known, 0.0, t) if known else t[None, None]
        v, kv = forward(dit, pinned(x), t, text, attn, kv)
        return (v if v.shape[0] == x.shape[0] else sampler.guide(*jnp.split(v, 2), guidance)), kv

    kv = rollout.cache.k, rollout.cache.v
    latents, kv = sampler.sample_stateful(solver, velocity, first_noise, renoise, kv)
    latents = pinned(latents)
    cache = dataclasses.replace(rollout.cache, k=kv[0], v=kv[1])
    rollout = dataclasses.replace(rollout, cache=cache)
    if stream.clean_pass:
        return leave(dit, rollout, latents, text, attn, stream), latents
    return _put_aside(rollout, latents, stream), latents


@functools.partial(jax.jit, static_argnames="stream", donate_argnames="rollout")
def absorb(
    dit: DiT, rollout: Rollout, text: TextKV, latents: Latents, *, stream: StreamConfig
) -> Rollout:
    """Takes given latents as the next chunk: a clean pass, no denoising (`initial_latent` in
    `causal_diffusion_inference.py`).
    """
    rollout, attn = enter(dit, rollout, latents.shape[1], stream)
    return leave(dit, rollout, latents, text, attn, stream)


def forward(
    dit: DiT, x: Latents, t: Float[Array, "r m"], text: TextKV, attn: Cached, kv: KV
) -> tuple[Float[Array, "rows f h w c"], KV]:
    """Velocity of each row of the cache, and the new keys and values; `x` has a row a video. t: of
    all videos or of each, of all frames or of each.
    """
    x, t = _tiled(x, t, attn)
    v, state = dit(x, t, text, attn, LayerCache(*kv, jnp.zeros((), jnp.int32)))
    return v, (state.k, state.v)


def beside(
    dit: DiT, x: Latents, t: Float[Array, "r m"], text: TextKV, attn: Cached, kv: KV
) -> tuple[Float[Array, "rows f h w c"], KV]:
    """`forward` for gradients: velocity, and the keys and values that the call would have written,
    layers b f s a d.
    """
    x, t = _tiled(x, t, attn)
    rows, frames = attn.slots.shape
    tokens = x.shape[2] * x.shape[3] // (dit.cfg.patch[1] * dit.cfg.patch[2])
    shape = (dit.cfg.layers, rows, frames, tokens, dit.cfg.heads, dit.cfg.head_dim)
    none = (jnp.zeros(shape, text.k.dtype) for _ in range(2))
    state = LayerCache(*none, jnp.zeros((), jnp.int32))
    v, state = dit(x, t, text, Beside(attn, *kv), state, remat="nothing")
    return sharding.rows(v, attn.mesh), (state.k, state.v)


def _tiled(
    x: Latents, t: Float[Array, "r m"], attn: Cached
) -> tuple[Float[Array, "rows f h w c"], Array]:
    """A row of the input for each row of the cache."""
    x, t = _tile(x, attn.slots.shape[0]), _tile(t.astype(jnp.float32), attn.slots.shape[0])
    return sharding.rows(x, attn.mesh), t


def enter(dit: DiT, rollout: Rollout, frames: int, stream: StreamConfig) -> tuple[Rollout, Cached]:
    """Labels the slots of the next chunk, and what its passes attend: all of its frames the same
    slots, every one that is filled.
    """
    cache, rows = rollout.cache, rollout.cache.frame.shape[0]
    labels = [_tile(x, rows) for x in (rollout.frame, rollout.chunk, rollout.shot)]
    taken = slots.choose(cache, frames, stream.sink, stream.shot_sink)
    cache = slots.claim(cache, taken, *labels)
    rollout = dataclasses.replace(rollout, cache=cache)
    return rollout, _attention_of_chunk(dit, rollout, taken, stream)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shown:
    """What a clean pass is shown in the place of a chunk's latents, and as which timestep."""

    latents: Latents
    t: Float[Array, "r m"]  # of all videos or of each, of all frames or of each


def leave(
    dit: DiT,
    rollout: Rollout,
    latents: Latents,
    text: TextKV,
    attn: Cached,
    stream: StreamConfig,
    shown: Shown | None = None,
) -> Rollout:
    """The clean pass of the chunk that `enter` labelled, and the latents put aside."""
    cache = rollout.cache
    shown = Shown(latents, jnp.zeros((1, 1))) if shown is None else shown
    if stream.clean_recache:
        cache = slots.keep(cache, _after_cut(cache, attn.slots, stream.sink))
        rollout = dataclasses.replace(rollout, cache=cache)
        attn = _attention_of_chunk(dit, rollout, attn.slots, stream)
    attn = dataclasses.replace(attn, final=True)
    _, (k, v) = forward(dit, shown.latents, shown.t, text, attn, (cache.k, cache.v))
    cache = dataclasses.replace(cache, k=k, v=v)
    return _put_aside(dataclasses.replace(rollout, cache=cache), latents, stream)


def _put_aside(rollout: Rollout, latents: Latents, stream: StreamConfig) -> Rollout:
    """A finished chunk among the held latents, and the rollout at the next one."""
    frames = latents.shape[1]
    held = slots.choose(rollout.held, frames, stream.sink, stream.shot_sink)
    batch = jnp.arange(latents.shape[0])[:, None]
    table = slots.claim(rollout.held, held, rollout.frame, rollout.chunk, rollout.shot)
    table = dataclasses.replace(table, latents=table.latents.at[batch, held].set(latents))
    if stream.clean_recache:
        table = slots.keep(table, _after_cut(table, held, stream.sink))
    return dataclasses.replace(
        rollout, held=table, frame=rollout.frame + frames, chunk=rollout.chunk + 1
    )


def _after_cut(table: slots.Table, taken: Int[Array, "b f"], sink: int) -> Bool[Array, "b slots"]:
    """What a clean recache leaves: all, but of a chunk that opens a shot only itself and the
    global sink (`causal_diffusion_inference.py:shot_clean_recache`).
    """
    own = (jnp.arange(table.frame.shape[1]) == taken[:, :, None]).any(1)
    opens = ~(table.filled & ~own & (table.shot == slots.shown(table)[:, None])).any(1)
    return ~opens[:, None] | own | (table.filled & (slots.rank(table) < sink))


def _attention_of_chunk(
    dit: DiT, rollout: Rollout, taken: Int[Array, "rows f"], stream: StreamConfig
) -> Cached:
    """Attention for a chunk in the slots `taken`: over every slot that is filled.

    These are the first ones of the table: empty slots are taken in order, and a slot is only taken
    from another frame when none is empty. A clean recache at a cut alone empties slots between
    others.
    """
    visible = rollout.cache.filled[:, None]
    order = "nested" if stream.clean_recache else "prefix"
    return _attention(dit, rollout, taken, visible, order, stream)


def _attention(
    dit: DiT,
    rollout: Rollout,
    taken: Int[Array, "rows f"],
    visible: Bool[Array, "rows f_or_1 slots"],
    order: Order,
    stream: StreamConfig,
) -> Cached:
    """Attention over the cache for the frames in the slots `taken`. order: of `visible`.

    Absolute positions: each frame keeps its own and its shot's offset. Relative ones
    (`causal_model_infinity.py`) are ranks in time, and shots do not matter.
    """
    cache, grid = rollout.cache, rollout.held.latents.shape[2:4]
    rows, columns = (n // p for n, p in zip(grid, dit.cfg.patch[1:], strict=True))

    relative, chunk = stream.rope == "relative", cache.chunk
    position = slots.rank(cache) if relative else cache.frame + stream.shot_offset * cache.shot
    position = position.astype(jnp.float32) * stream.time_scale
    angles = phases(dit.cfg, jnp.take_along_axis(position, taken, 1), rows, columns)
    read = in_time(dit.cfg, position) if relative else None
    chunk = jnp.take_along_axis(chunk, taken, 1)
    how = dict(order=order, backend=stream.attention, mesh=rollout.mesh)
    return Cached(angles, taken, chunk, visible, read, **how)


def check_attention(cfg: ModelConfig, dtype: Any) -> None:
    """Raises NotImplementedError where `cfg.stream.attention` cannot attend a chunk of the model,
    which computes in `dtype`, here. Nothing is computed.
    """
    stream, frames, tokens = cfg.stream, cfg.stream.chunk, cfg.tokens_per_frame

    def attend() -> Array:
        cache = slots.empty(cfg.dit, stream, 1, tokens, dtype)
        angles = phases(cfg.dit, jnp.zeros((1, frames)), 1, tokens)
        positions = jnp.zeros((1, stream.window))
        read = in_time(cfg.dit, positions) if stream.rope == "relative" else None
        own = jnp.zeros((1, frames), jnp.int32)
        visible = jnp.ones((1, 1, stream.window), bool)
        attn = Cached(angles, own, own, visible, read, "prefix", backend=stream.attention)
        x = jnp.zeros((1, frames * tokens, cfg.dit.heads, cfg.dit.head_dim), dtype)
        prompt = jnp.zeros((1, 1, cfg.dit.text_len, cfg.dit.heads, cfg.dit.head_dim), dtype)
        out = attn(x, x, x, LayerCache(cache.k, cache.v, jnp.int32(0)))[0]
        return attn.text(out[:, None], prompt, prompt)

    jax.eval_shape(attend)


def _tile(x: Array, rows: int) -> Array:
    return jnp.tile(x, (rows // x.shape[0], *(1,) * (x.ndim - 1)))


@functools.partial(jax.jit, static_argnames=("stream", "how"), donate_argnames="rollout")
def recache(
    dit: DiT,
    rollout: Rollout,
    text: TextKV,
    which: Bool[Array, " b"],
    *,
    stream: StreamConfig,
    how: Recache,
) -> Rollout:
    """Re-reads the window under a new prompt: one clean pass over the held latents
    (LongLive 1.0 section 3.1, KV recache).

    Frames keep their position and shot, and with them their phases. `which` videos do so; the
    others keep their memory as it is.
    """
    if how.sinks == "window":
        rollout = _window_only(rollout, which)
    cache = rollout.cache
    rows, count = cache.frame.shape
    which = _tile(which, rows)[:, None]
    places = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (rows, count))
    earlier = cache.chunk[:, :, None] >= cache.chunk[:, None, :]
    visible = cache.filled[:, None, :] & (earlier | (how.form == "bidirectional"))
    # What a chunk sees, every later one sees, too.
    attn = _attention(dit, rollout, places, visible, "nested", stream)
    silent = ~which
    if how.sinks == "keep":
        silent |= slots.is_sink(cache, stream.sink, stream.shot_sink)
    attn = dataclasses.replace(attn, slots=jnp.where(silent, count, places), final=True)
    latents = slots.latents_of(rollout.held, cache.frame[: rollout.frame.shape[0]])
    _, (k, v) = forward(dit, latents, jnp.zeros((1, 1)), text, attn, (cache.k, cache.v))
    return dataclasses.replace(rollout, cache=dataclasses.replace(cache, k=k, v=v))


def _window_only(rollout: Rollout, which: Bool[Array, " b"]) -> Rollout:
    """The cache labelled as the last frames of the video, however many it has room for; older ones
    are given up, and their sinks with them. Keys and values are still to be written.
    """
    cache, held = rollout.cache, rollout.held
    rows, count = cache.frame.shape
    order = jnp.argsort(-held.frame, axis=1, stable=True)[:, :count]

    def relabel(old: Array, labels: Array) -> Array:
        new = jnp.take_along_axis(labels, order, 1)
        return jnp.where(_tile(which, rows)[:, None], _tile(new, rows), old)

    names = ("frame", "chunk", "shot")
    labels = {name: relabel(getattr(cache, name), getattr(held, name)) for name in names}
    kept = (jnp.arange(held.frame.shape[1]) == order[:, :, None]).any(1) | ~which[:, None]
    cache, held = dataclasses.replace(cache, **labels), slots.keep(held, kept)
    return dataclasses.replace(rollout, cache=cache, held=held)


@functools.partial(jax.jit, donate_argnames="rollout")
def forget(rollout: Rollout, which: Bool[Array, " b"]) -> Rollout:
    """Empties the memory of `which` videos; they go on where they are, and their next frames become
    their sinks.
    """
    cache, held = rollout.cache, rollout.held
    rows = _tile(which, cache.frame.shape[0])
    return dataclasses.replace(
        rollout,
        cache=slots.keep(cache, jnp.broadcast_to(~rows[:, None], cache.frame.shape)),
        held=slots.keep(held, jnp.broadcast_to(~which[:, None], held.frame.shape)),
    )


def switched(
    dit: DiT,
    rollout: Rollout,
    text: TextKV,
    mode: str,
    *,
    stream: StreamConfig,
    begun: bool,
    how: Recache | None = None,
) -> Rollout:
    """One video's memory after a switch of the prompt or of the weights.

    Args:
      dit: That goes on with it.
      rollout: The memory as it was made.
      text: Of the prompt that it is re-read under.
      mode: "recache" re-reads the window, "keep" leaves it, "reset" empties it.
      stream: How the model streams.
      begun: Whether there is something to re-read.
      how: The form of the recache; None is the model's own.
    """
    everyone = jnp.ones(1, bool)
    if mode == "recache" and begun:
        return recache(dit, rollout, text, everyone, stream=stream, how=how or stream.recache)
    return forget(rollout, everyone) if mode == "reset" else rollout


@jax.jit
def finite(latents: Latents) -> Bool[Array, " b"]:
    """Return whether the latents of each video are finite: neither NaN nor infinity."""
    return jnp.isfinite(latents).all(tuple(range(1, latents.ndim)))


@functools.partial(jax.jit, donate_argnames="carry", static_argnames="first")
def decode(
    vae: VAE | TAE, carry: VAECarry, latents: Latents, *, first: bool
) -> tuple[VAECarry, UInt8[Array, "b t H W 3"]]:
    """Pixels of a chunk. `first`: it begins the video, and its first latent frame is one
    picture.
    """
    frames, carry = stream(vae, carry, latents, first=first)
    frames = frames.astype(jnp.float32)  # bfloat16 has no room for 256 levels
    return carry, jnp.clip(jnp.round((frames + 1.0) * 127.5), 0.0, 255.0).astype(jnp.uint8)
