"""XLA: all at once where scores are few, else in steps with an online softmax (arXiv 2112.05682).
A table of one slot is attended as by the reference, if in float32.

Runs wherever XLA does. A step is some query frames and some slots of the list of those that they
see; no more is unpacked at a time. On CPUs forward steps end with the list: what none of their
frames sees is neither read nor multiplied. A GPU would have to ask the host, step by step, whether
there is another one: there, and for gradients, as many steps are gone through as there are slots,
and what is behind a list's last one is hidden. For a chunk that is work only until the window is
full; a recache of four chunks, whose pairs of chunks are 10 of 16, does 1.6 times the work.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from longlive_kernels.attention.sink_window import kept, reference
from longlive_kernels.attention.sink_window.call import Call
from longlive_kernels.attention.sink_window.kept import Kept
from longlive_kernels.attention.sink_window.visits import visits
from longlive_kernels.attention.sink_window.vjp import differentiable

# Most scores in a step, batch and heads included, unless one slot has more: 128 MiB in float32.
SCORES = 2**25
NEVER = jnp.finfo(jnp.float32).min  # below every score, and finite
DTYPES = ("bfloat16", "float16", "float32")

product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
Read = Callable[[Int[Array, "b c"]], tuple[Array, Array]]
State = tuple[Float[Array, "b a n"], Float[Array, "b a n"], Float[Array, "b a n d"]]


@dataclasses.dataclass(frozen=True)
class Steps:
    """frames: of queries, in one step. slots: in one step."""

    frames: int
    slots: int


def unsupported(call: Call) -> str | None:
    """Why a call cannot run here; None if it can."""
    if call.q.dtype.name not in DTYPES:
        return f"takes queries of one of {DTYPES}, not {call.q.dtype.name}"
    return None


def steps(call: Call, scores: int = SCORES) -> Steps:
    """As many frames of queries as fit, then as many slots; scores: see `SCORES`."""
    pairs = max(scores // (call.rows * call.heads * call.tokens**2), 1)
    frames = max(n for n in range(1, call.frames + 1) if call.frames % n == 0 and n <= pairs)
    return Steps(frames, min(pairs // frames, call.slots))


def attend(call: Call) -> Float[Array, "b n a d"]:
    """See `api.sink_window`."""
    call = call.by_frame()
    chosen = steps(call)
    if chosen != Steps(call.frames, call.slots):
        return by_steps(call.rounded(call.q.dtype), chosen)
    if call.slots == 1 and call.q.dtype == jnp.float32:
        # With so few keys, turning axes slows gradients more than it speeds up what follows.
        return reference.attend(call)
    return at_once(call.rounded(call.q.dtype))


def at_once(call: Call) -> Float[Array, "b n a d"]:
    """What is small is done soonest in one piece, empty slots included."""
    k, v = dataclasses.replace(call, read=None).windows(call.q.dtype)
    # Batch axes in front are faster on CPUs, also for turning.
    q = rearrange(call.q, "b n a d -> b a n d")
    k, v = (rearrange(x, "b c s a d -> b a c s d") for x in (k, v))
    k = k if call.read is None else kept.turned(k, call.read[:, None, :, None])
    k, v = (rearrange(x, "b a c s d -> b a (c s) d") for x in (k, v))
    mask = jnp.repeat(jnp.repeat(call.visible, call.tokens, 1), call.tokens, 2)[:, None]
    scores = product("band,bamd->banm", q, k) * np.float32(1 / math.sqrt(call.width))
    weights = jax.nn.softmax(jnp.where(mask, scores, NEVER), axis=-1).astype(v.dtype)
    out = jnp.einsum("banm,bamd->band", weights, v)
    some = jnp.repeat(call.visible.any(2), call.tokens, 1)[:, None, :, None]
    return rearrange(jnp.where(some, out, jnp.zeros((), out.dtype)), "b a n d -> b n a d")


def by_steps(call: Call, by: Steps) -> Float[Array, "b n a d"]:
    """Its gradient goes through the steps again, and keeps the sums of one tile of queries."""
    once, again = (functools.partial(_forward, by=by, to_end=end) for end in (False, True))
    return differentiable(once, again)(call)


def _forward(call: Call, *, by: Steps, to_end: bool) -> Float[Array, "b n a d"]:
    """to_end: goes through lists to their ends, which are known beforehand, as gradients need."""
    passes = _passes(call)

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def tile(given: tuple[Array, list[Array]]) -> Float[Array, "b n a d"]:
        q, seen = rearrange(given[0], "b n a d -> b a n d"), given[1]
        top = jnp.full(q.shape[:-1], NEVER, jnp.float32)
        state = (top, jnp.zeros_like(top), jnp.zeros(q.shape, jnp.float32))
        for (read, _), mask in zip(passes, seen, strict=True):
            state = _pass(q, state, read, mask, by.slots, to_end)
        _, total, out = state
        out = out / jnp.where(total > 0, total, 1.0)[..., None]
        return rearrange(out.astype(q.dtype), "b a n d -> b n a d")

    tiles = call.frames // by.frames
    q = rearrange(call.q, "b (t n) a d -> t b n a d", t=tiles)
    seen = [rearrange(mask, "b (t g) m -> t b g m", t=tiles) for _, mask in passes]
    return rearrange(lax.map(tile, (q, seen)), "t b n a d -> b (t n) a d")


def _passes(call: Call) -> list[tuple[Read, Bool[Array, "b f m"]]]:
    """What reads keys and values, and what queries see there: of the table, and of fresh frames."""

    def reader(k: Kept, v: Kept, layer: Array | None, phases: Array | None) -> Read:
        def read(chosen: Int[Array, "b c"]) -> tuple[Array, Array]:
            pair = (kept.of_slots(x, layer, chosen) for x in (k, v))
            k_, v_ = (kept.plain(x, call.heads, call.q.dtype) for x in pair)
            if phases is not None:
                k_ = kept.turned(k_, kept.of_slots(phases, None, chosen)[:, :, None, None])
            return k_, v_

        return read

    phases, fresh = call.read, call.fresh
    table = functools.partial(reader, call.k, call.v, call.layer)
    if fresh is None:
        return [(table(phases), call.visible)]
    stored, own = kept.divided(call.visible, fresh)
    inside = jnp.minimum(fresh.slots, call.slots - 1)
    own_phases = None if phases is None else kept.of_slots(phases, None, inside)
    return [(table(phases), stored), (reader(fresh.k, fresh.v, None, own_phases), own)]


def _pass(
    q: Float[Array, "b a n d"],
    state: State,
    read: Read,
    seen: Bool[Array, "b g m"],
    width: int,
    to_end: bool,
) -> State:
    """Through the list of what any query frame of any row sees, `width` slots at a time."""
    index, count = visits(seen.any(1))
    width = min(width, index.shape[1])
    index = jnp.pad(index, ((0, 0), (0, -index.shape[1] % width)))

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
    def step(at: Array, state: State) -> State:
        chosen = lax.dynamic_slice_in_dim(index, at * width, width, 1)  # b c
        there = at * width + jnp.arange(width, dtype=jnp.int32) < count[:, None]
        mask = jnp.take_along_axis(seen, chosen[:, None], 2) & there[:, None]  # b g c
        return _online(q, *read(chosen), mask, state)

    def until(end: int | Array, state: State) -> State:
        return lax.fori_loop(0, end, step, state)

    whole = functools.partial(until, index.shape[1] // width)
    if to_end:
        return whole(state)
    some = functools.partial(until, -(-count.max() // width))
    return lax.platform_dependent(state, cpu=some, default=whole)


def _online(
    q: Float[Array, "b a n d"],
    k: Float[Array, "b c s a d"],
    v: Float[Array, "b c s a d"],
    mask: Bool[Array, "b g c"],
    state: State,
) -> State:
    """The softmax of some more keys: the largest score, the sum of exponentials, the output."""
    highest, total, out = state
    k, v = (rearrange(x, "b c s a d -> b a (c s) d") for x in (k, v))
    scores = product("band,bamd->banm", q, k) * np.float32(1 / math.sqrt(q.shape[-1]))
    by_frame = rearrange(scores, "b a (g n) (c s) -> b a g n c s", g=mask.shape[1], c=mask.shape[2])
    by_frame = jnp.where(mask[:, None, :, None, :, None], by_frame, -jnp.inf)
    scores = by_frame.reshape(scores.shape)
    top = lax.stop_gradient(jnp.maximum(highest, scores.max(-1)))
    fade, weights = jnp.exp(highest - top), jnp.exp(scores - top[..., None])
    values = product("banm,bamd->band", weights.astype(v.dtype), v)
    return top, fade * total + weights.sum(-1), fade[..., None] * out + values
