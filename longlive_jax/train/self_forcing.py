"""Self-forcing: a clip is made as it will be made when it is served, chunk by chunk over the
model's own memory, and the model learns from it (arXiv 2506.08009; LongLive 1.0 section 3.2, 2.0
section 4.1; `pipeline/self_forcing_training.py`).

Every chunk stops at a step drawn at random; what that step says is the chunk, and only that step
has a gradient. `roll` makes a clip. `gradient` goes through it a second time, with what the first
time left behind, and turns the gradient of a loss with respect to the clip into that of the
parameters, one chunk at a time: memory does not grow with the clip, and steps before the last are
not repeated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from longlive_jax import flow, rollout, sampler
from longlive_jax.config import StreamConfig
from longlive_jax.dit.attention import Cached
from longlive_jax.dit.model import DiT, TextKV
from longlive_jax.flow import Flow
from longlive_jax.rollout import KV, Latents, Rollout, Shown
from longlive_jax.sampler import Progress, Solver

Build = Callable[[Any], DiT]  # of parameters
Draw = Callable[[Rollout, int | Array], Latents]  # noise of the next chunk at a step


@dataclasses.dataclass(frozen=True)
class SelfForcing:
    """How a clip is made.

    flow: the table in which the exit step's timestep is looked up. context_t: the timestep at which
    a finished chunk is read into the memory; noise of the table's nearest level is on it, which is
    never none. through: "stop", the memory has no gradient, or "straight", that of the exit step's
    keys and values, as in the released code.
    """

    stream: StreamConfig
    solver: Solver
    flow: Flow
    context_t: float = 0.0
    through: str = "stop"

    THROUGH = ("stop", "straight")

    def __post_init__(self):
        if self.through not in self.THROUGH:
            raise ValueError(f"through {self.through!r}: choose {', '.join(self.THROUGH)}")
        if self.through == "straight" and self.stream.kv not in ("model", "bf16"):
            raise ValueError(f"no gradient goes through a memory in {self.stream.kv}")

    @property
    def steps(self) -> int:
        return len(self.solver.steps)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Script:
    """What a clip of n chunks shows. A cut begins a shot; at a switch the memory is read anew under
    the chunk's prompt. given: a picture that the clip begins with; None for clips that go on.
    """

    context: Float[Array, "b p l e"]  # encoded prompts
    prompt: Int[Array, "b n"]  # which of them each chunk is under
    cut: Bool[Array, "b n"]
    switch: Bool[Array, "b n"]
    given: Float[Array, "b 1 h w c"] | None = None

    @property
    def chunks(self) -> int:
        return self.prompt.shape[1]

    def at(self, i: int | Int[Array, ""]) -> Script:
        """Of one chunk: n is 1, and so is p."""
        prompt, cut, switch = (
            jax.lax.dynamic_slice_in_dim(x, i, 1, 1) for x in (self.prompt, self.cut, self.switch)
        )
        context = jnp.take_along_axis(self.context, prompt[:, :, None, None], 1)
        return Script(context, jnp.zeros_like(prompt), cut, switch, self.given)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip, and what each chunk's exit step was given."""

    latents: Latents  # b f …, f = n chunks
    inputs: Float[Array, "n b chunk h w c"]
    exits: Int[Array, " n"]


def roll(
    dit: DiT,
    memory: Rollout,
    script: Script,
    exits: Int[Array, " n"],
    cfg: SelfForcing,
    draw: Draw = None,
) -> tuple[Rollout, Clip]:
    """Makes a clip, of which chunk i stops at step exits[i]. Nothing here has a gradient."""
    draw = _own_noise(cfg) if draw is None else draw

    def chunk(memory: Rollout, given) -> tuple[Rollout, tuple[Latents, Latents]]:
        i, exit_ = given
        memory, attn, text = _open(dit, memory, script.at(i), cfg)
        known = _known(memory, script)
        kv = memory.cache.k, memory.cache.v
        x, kv = _until(dit, memory, text, attn, kv, exit_, cfg, draw, known)
        x0, _ = _exit(dit, x, exit_, text, attn, kv, cfg, known)
        return _close(dit, memory, x0, text, attn, cfg, draw, known), (x0, x)

    memory, (x0, x) = jax.lax.scan(chunk, memory, (jnp.arange(script.chunks), exits))
    return memory, Clip(_joined(x0), x, exits)


def gradient(
    build: Build,
    params: Any,
    memory: Rollout,
    script: Script,
    clip: Clip,
    cotangent: Latents,
    cfg: SelfForcing,
    draw: Draw = None,
) -> Any:
    """The gradient of `params` for that of a loss with respect to the clip, which `roll` made of
    the same memory.

    Through "straight" memory all chunks are kept: one memory and one chunk's activations, at its
    blocks' inputs, for each.
    """
    draw = _own_noise(cfg) if draw is None else draw
    cotangents = _cut(cotangent, script.chunks)
    if cfg.through == "straight":
        made = lambda params: replay(build, params, memory, script, clip, cfg, draw)  # noqa: E731
        _, back = jax.vjp(made, params)
        return back(cotangent)[0]
    dit, chunks = build(params), _cut(clip.latents, script.chunks)

    def chunk(carry, given):
        memory, total = carry
        i, exit_, x, x0, cotangent = given
        memory, attn, text = _open(dit, memory, script.at(i), cfg)
        known = _known(memory, script)
        kv = memory.cache.k, memory.cache.v

        def exited(params: Any) -> Latents:
            dit = build(params)
            return _exit(dit, x, exit_, _text(dit, script.at(i)), attn, kv, cfg, known)[0]

        _, back = jax.vjp(exited, params)
        total = jax.tree.map(jnp.add, total, back(cotangent)[0])
        return (_close(dit, memory, x0, text, attn, cfg, draw, known), total), None

    begin = memory, jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params)
    given = jnp.arange(script.chunks), clip.exits, clip.inputs, chunks, cotangents
    return jax.lax.scan(chunk, begin, given)[0][1]


def replay(
    build: Build,
    params: Any,
    memory: Rollout,
    script: Script,
    clip: Clip,
    cfg: SelfForcing,
    draw: Draw = None,
) -> Latents:
    """The clip once more, as a function of the parameters: each chunk's exit step, and the memory
    with the value of the clean pass and the gradient of that step's keys and values.
    """
    draw = _own_noise(cfg) if draw is None else draw
    dit = build(jax.lax.stop_gradient(params))

    @jax.checkpoint
    def chunk(memory: Rollout, given) -> tuple[Rollout, Latents]:
        i, exit_, x = given
        memory, attn, text = _open(dit, memory, script.at(i), cfg)
        known = _known(memory, script)
        kv = memory.cache.k, memory.cache.v
        live = build(params)
        x0, own = _exit(live, x, exit_, _text(live, script.at(i)), attn, kv, cfg, known)
        rows = jnp.arange(attn.slots.shape[0])[:, None]
        kv = tuple(old.at[:, rows, attn.slots].set(new) for old, new in zip(kv, own, strict=True))
        # Of the clean pass only values are used.
        memory, still = jax.lax.stop_gradient((memory, x0))
        memory = _close(dit, memory, still, text, attn, cfg, draw, known)
        after = memory.cache.k, memory.cache.v
        k, v = jax.tree.map(lambda to, by: jax.lax.stop_gradient(to - by) + by, after, kv)
        return dataclasses.replace(memory, cache=dataclasses.replace(memory.cache, k=k, v=v)), x0

    given = jnp.arange(script.chunks), clip.exits, clip.inputs
    return _joined(jax.lax.scan(chunk, memory, given)[1])


def draw_exits(key: Array, chunks: int, cfg: SelfForcing, same: bool = True) -> Int[Array, " n"]:
    """The steps at which chunks stop: one for a whole clip, or one for each chunk."""
    drawn = jax.random.randint(key, (chunks,), 0, cfg.steps)
    return jnp.broadcast_to(drawn[0], drawn.shape) if same else drawn


def _own_noise(cfg: SelfForcing) -> Draw:
    """Of the rollout's own keys; the clean pass's is that of one step more than there are."""
    return lambda memory, step: rollout.noise(memory, cfg.stream.chunk, step)


def _text(dit: DiT, script: Script) -> TextKV:
    return dit.text_kv(script.context.astype(_dtype(dit)))


def _dtype(dit: DiT) -> Any:
    return dit.head.kernel[...].dtype


def _open(
    dit: DiT, memory: Rollout, script: Script, cfg: SelfForcing
) -> tuple[Rollout, Cached, TextKV]:
    """The next chunk's slots, after what its script says happens to the memory."""
    text = _text(dit, script)
    memory = dataclasses.replace(memory, shot=memory.shot + script.cut[:, 0].astype(jnp.int32))

    def reread(memory: Rollout) -> Rollout:
        which, how = script.switch[:, 0], dict(stream=cfg.stream, how=cfg.stream.recache)
        # What is read anew has no gradient, which would keep what every layer read.
        before, seen = jax.lax.stop_gradient((memory, text))
        made = jax.lax.stop_gradient(rollout.recache(dit, before, seen, which, **how))
        return made if cfg.through == "stop" else _where(which, made, memory)

    memory = jax.lax.cond(script.switch.any(), reread, lambda memory: memory, memory)
    return *rollout.enter(dit, memory, cfg.stream.chunk, cfg.stream), text


def _where(which: Bool[Array, " b"], made: Rollout, memory: Rollout) -> Rollout:
    """`made`, with the keys and values of `memory` for videos that are not among `which`."""

    def chosen(new: Array, old: Array) -> Array:  # layers b …
        rows = jnp.tile(which, new.shape[1] // which.shape[0])
        return jnp.where(rows.reshape(1, -1, *(1,) * (new.ndim - 2)), new, old)

    k, v = jax.tree.map(chosen, (made.cache.k, made.cache.v), (memory.cache.k, memory.cache.v))
    return dataclasses.replace(made, cache=dataclasses.replace(made.cache, k=k, v=v))


def _known(memory: Rollout, script: Script) -> tuple[Array, Array] | None:
    """Which frames of the chunk are given [b f], and as what."""
    if script.given is None:
        return None
    return memory.frame == 0, script.given


def _pinned(x: Latents, known: tuple[Array, Array] | None) -> Latents:
    if known is None:
        return x
    begins, given = known
    first = jnp.where(begins[:, None, None, None, None], given.astype(x.dtype), x[:, :1])
    return jnp.concatenate([first, x[:, 1:]], 1)


def _at(t: Array, frames: int, known: tuple[Array, Array] | None) -> Float[Array, "b f"]:
    """The timestep that each frame is shown at: 0 of a given one."""
    if known is None:
        return t[None, None]
    begins, _ = known
    first = (jnp.arange(frames) == 0) & begins[:, None]
    return jnp.where(first, 0.0, t)


def _until(
    dit: DiT,
    memory: Rollout,
    text: TextKV,
    attn: Cached,
    kv: KV,
    exit_: Int[Array, ""],
    cfg: SelfForcing,
    draw: Draw,
    known: tuple[Array, Array] | None,
) -> tuple[Latents, KV]:
    """What the exit step is given: as many steps are made as come before it."""
    timestep, *rows = (jnp.asarray(row) for row in cfg.solver.rows)
    noise = draw(memory, 0)

    def step(i: Array, state: tuple[Progress, KV]) -> tuple[Progress, KV]:
        at, kv = state
        x = _pinned(at.x.astype(noise.dtype), known)
        v, kv = _forward(dit, x, timestep[i], text, attn, kv, known)
        fresh = draw(memory, i + 1) if cfg.solver.renoises else None
        return sampler.advance(at, v, *(row[i] for row in rows), fresh), kv

    at, kv = jax.lax.fori_loop(0, exit_, step, (sampler.begin(noise), kv))
    return _pinned(at.x.astype(noise.dtype), known), kv


def _forward(dit, x, t, text, attn, kv, known) -> tuple[Latents, KV]:
    return rollout.forward(dit, x, _at(t, x.shape[1], known), text, attn, kv)


def _exit(
    dit: DiT,
    x: Latents,
    exit_: Int[Array, ""],
    text: TextKV,
    attn: Cached,
    kv: KV,
    cfg: SelfForcing,
    known: tuple[Array, Array] | None,
) -> tuple[Latents, KV]:
    """What the exit step says: the chunk; and its own keys and values, layers b f s a d."""
    t = jnp.asarray(cfg.solver.rows[0])[exit_]
    v, own = rollout.beside(dit, x, _at(t, x.shape[1], known), text, attn, kv)
    return _pinned(cfg.flow.to_x0(v, x, t), known), own


def _close(
    dit: DiT,
    memory: Rollout,
    x0: Latents,
    text: TextKV,
    attn: Cached,
    cfg: SelfForcing,
    draw: Draw,
    known: tuple[Array, Array] | None,
) -> Rollout:
    """Reads the chunk into the memory, as the model will see it from then on."""
    t = jnp.float32(cfg.context_t)
    noise = draw(memory, cfg.steps)
    seen = _pinned(flow.corrupt(x0, noise, cfg.flow.sigma(t)), known)
    shown = Shown(seen, _at(t, x0.shape[1], known))
    return rollout.leave(dit, memory, x0, text, attn, cfg.stream, shown)


def _joined(x: Float[Array, "n b f h w c"]) -> Float[Array, "b nf h w c"]:
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def _cut(x: Float[Array, "b nf h w c"], chunks: int) -> Float[Array, "n b f h w c"]:
    return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)
