"""Taking chunks back: what a change overwrites, put aside on the host before it does."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from longlive_jax.config import StreamConfig
from longlive_jax.dit import cache as slots
from longlive_jax.rollout import Rollout

if TYPE_CHECKING:
    from longlive_jax.session import Position, State


@dataclasses.dataclass(frozen=True)
class Undo:
    """What one change overwrites.

    memory: the rollout without its bulk: labels and counters. taken, held: the slots of the cache
    and of the latents that are overwritten, and what they held. carry: the VAE's, if it moves on.
    """

    memory: Rollout
    taken: Int[Array, "rows f"]
    held: Int[Array, "b f"]
    bulk: dict[str, Any]
    carry: Any = None

    @classmethod
    def of_chunk(cls, state: State, stream: StreamConfig) -> Undo:
        """Before a chunk is made."""
        memory, sinks = state.rollout, (stream.sink, stream.shot_sink)
        taken = slots.choose(memory.cache, stream.chunk, *sinks)
        held = slots.choose(memory.held, stream.chunk, *sinks)
        return cls._take(memory, taken, held, carry=state.carry)

    @classmethod
    def of_memory(cls, state: State) -> Undo:
        """Before the whole window is re-read. The latents stay, whatever becomes of their
        labels.
        """
        rows, count = state.rollout.cache.frame.shape
        batch = state.rollout.frame.shape[0]
        taken = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (rows, count))
        return cls._take(state.rollout, taken, jnp.zeros((batch, 0), jnp.int32))

    @classmethod
    def of_labels(cls, state: State) -> Undo:
        """Before labels change, and nothing else."""
        memory = state.rollout
        rows, batch = memory.cache.frame.shape[0], memory.frame.shape[0]
        return cls._take(memory, jnp.zeros((rows, 0), jnp.int32), jnp.zeros((batch, 0), jnp.int32))

    @classmethod
    def _take(cls, memory: Rollout, taken: Array, held: Array, carry: Any = None) -> Undo:
        bulk = _gather(memory, taken, held)
        slim = dataclasses.replace(
            memory,
            cache=dataclasses.replace(memory.cache, k=None, v=None),
            held=dataclasses.replace(memory.held, latents=None),
            key=jax.random.key_data(memory.key),
        )
        # Copies: on a CPU the host's view of a buffer is the buffer, and that will be donated.
        parts = jax.tree.map(np.array, (slim, taken, held, bulk, carry))
        return cls(*parts)

    def apply(self, state: State) -> State:
        """The state before the change, given the one right after it."""
        memory = jax.tree.map(jnp.asarray, self.memory)
        cache, held = state.rollout.cache, state.rollout.held
        bulk = _scatter(
            dict(k=cache.k, v=cache.v, latents=held.latents), self.bulk, self.taken, self.held
        )
        memory = dataclasses.replace(
            memory,
            cache=dataclasses.replace(memory.cache, k=bulk["k"], v=bulk["v"]),
            held=dataclasses.replace(memory.held, latents=bulk["latents"]),
            key=jax.random.wrap_key_data(memory.key),
        )
        carry = state.carry
        if self.carry is not None:
            carry = jax.tree.map(
                lambda new, old: jax.device_put(new, old.sharding), self.carry, carry
            )
        return dataclasses.replace(state, rollout=memory, carry=carry)


@jax.jit
def _gather(memory: Rollout, taken: Array, held: Array) -> dict[str, Array]:
    rows, batch = (jnp.arange(x.shape[0])[:, None] for x in (taken, held))
    pick = lambda x: x[:, rows, taken]  # noqa: E731  layers rows f …
    latents = memory.held.latents[batch, held]
    return dict(k=pick(memory.cache.k), v=pick(memory.cache.v), latents=latents)


@functools.partial(jax.jit, donate_argnums=0)
def _scatter(
    bulk: dict[str, Array], old: dict[str, Array], taken: Array, held: Array
) -> dict[str, Array]:
    rows, batch = (jnp.arange(x.shape[0])[:, None] for x in (taken, held))
    back = {name: bulk[name].at[:, rows, taken].set(old[name]) for name in ("k", "v")}
    return back | dict(latents=bulk["latents"].at[batch, held].set(old["latents"]))


@dataclasses.dataclass(frozen=True)
class _Entry:
    """position: right after the chunk before. undos: of the changes since, and at last of the chunk
    itself.
    """

    position: Position
    undos: tuple[Undo, ...]


class Past:
    """The last `chunks` chunks, as what takes them back. Without chunks nothing is put aside."""

    def __init__(self, chunks: int):
        self.chunks = chunks
        self._entries: collections.deque[_Entry] = collections.deque(maxlen=chunks)
        self._open: tuple[Undo, ...] = ()
        self._since: Position | None = None

    @property
    def available(self) -> int:
        return len(self._entries)

    def remember(self, position: Position, undo: Callable[[], Undo]) -> None:
        """Before a change: what it overwrites, of a session that is at `position`."""
        if self.chunks:
            self._since = self._since or position
            self._open += (undo(),)

    def close_chunk(self) -> None:
        """What was remembered since the last call belongs to the chunk that is made now."""
        if self.chunks:
            self._entries.append(_Entry(self._since, self._open))
            self._open, self._since = (), None

    def take_back(self, chunks: int, state: State, position: Position) -> tuple[State, Position]:
        """The state and the position right after the chunk before the last `chunks`."""
        undos, position = self._open, self._since or position
        for _ in range(chunks):
            entry = self._entries.pop()
            undos, position = entry.undos + undos, entry.position
        for undo in reversed(undos):
            state = undo.apply(state)
        self._open, self._since = (), None
        return state, position

    def copy(self) -> Past:
        other = Past(self.chunks)
        other._entries, other._open, other._since = self._entries.copy(), self._open, self._since
        return other
