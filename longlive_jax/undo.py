"""Taking chunks back: what a change overwrites, put aside on the host before it does."""

from __future__ import annotations

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
    from longlive_jax.progress import Position, State


Anywhere = Array | np.ndarray  # on a device, or on the host


@dataclasses.dataclass(frozen=True)
class Undo:
    """What one change overwrites.

    labels: of the cache, of the latents and of the rollout. taken, held: the slots of the cache and
    of the latents that are overwritten. bulk: what these held. carry: the VAE's, if it moves on.
    """

    labels: dict[str, dict[str, Anywhere]]
    taken: Int[Anywhere, "rows f"]
    held: Int[Anywhere, "b g"]
    bulk: dict[str, Any]
    carry: Any = None

    @classmethod
    def of_chunk(cls, state: State, stream: StreamConfig) -> Undo:
        """Before a chunk is made."""
        taken, held = _chosen(state.rollout, stream)
        return cls._take(state.rollout, taken, held, carry=state.carry)

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
    def of_switch(cls, state: State, mode: str) -> Undo:
        """Keep what a switch of that mode will change."""
        return cls.of_memory(state) if mode == "recache" else cls.of_labels(state)

    @classmethod
    def _take(cls, memory: Rollout, taken: Array, held: Array, carry: Any = None) -> Undo:
        bulk, parts = _gather(memory, taken, held), dict(cache=memory.cache, held=memory.held)
        labels = {name: _labels(part) for name, part in (parts | dict(rollout=memory)).items()}
        # Copies, for these buffers will be donated. Nobody waits for them here: that would keep
        # the next chunk from being begun before the last one is decoded.
        fields = _copied(labels), taken, held, bulk, _copied(carry)
        jax.tree.map(lambda x: x.copy_to_host_async(), fields)
        return cls(*fields)

    def on_host(self) -> Undo:
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Undo(*jax.tree.map(np.asarray, tuple(fields)))

    def apply(self, state: State) -> State:
        """The state before the change, given the one right after it. Copies are taken here too:
        other sessions may go back the same way.
        """
        labels, memory = jax.tree.map(jnp.array, self.labels), state.rollout
        bulk = dict(k=memory.cache.k, v=memory.cache.v, latents=memory.held.latents)
        bulk = _scatter(bulk, self.bulk, self.taken, self.held)
        latents = bulk.pop("latents")
        cache = dataclasses.replace(memory.cache, **labels["cache"], **bulk)
        held = dataclasses.replace(memory.held, **labels["held"], latents=latents)
        memory = dataclasses.replace(memory, cache=cache, held=held, **labels["rollout"])
        carry = state.carry
        if self.carry is not None:
            carry = jax.tree.map(_put_back, self.carry, carry)
        return dataclasses.replace(state, rollout=memory, carry=carry)


def _put_back(new: Anywhere, old: Array) -> Array:
    """On the device of `old`, but bound to it only if that was: else all that follows would be
    compiled once more.
    """
    new = np.array(new)
    return jax.device_put(new, old.sharding) if old.committed else jnp.array(new)


def _labels(part: slots.Table | Rollout) -> dict[str, Array]:
    return {name: getattr(part, name) for name in ("frame", "chunk", "shot")}


@functools.partial(jax.jit, static_argnames="stream")
def _chosen(memory: Rollout, stream: StreamConfig) -> tuple[Array, Array]:
    """The slots that the next chunk takes. One program: the many steps of it, each on its own,
    would fill the queue of a device, and wait.
    """
    tables, sinks = (memory.cache, memory.held), (stream.sink, stream.shot_sink)
    taken, held = (slots.choose(table, stream.chunk, *sinks) for table in tables)
    return taken, held


@jax.jit
def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


@jax.jit
def _gather(memory: Rollout, taken: Array, held: Array) -> dict[str, Any]:
    rows, batch = (jnp.arange(x.shape[0])[:, None] for x in (taken, held))
    kept = dict(k=memory.cache.k, v=memory.cache.v)
    bulk = jax.tree.map(lambda x: x[:, rows, taken], kept)  # layers rows f …
    return bulk | dict(latents=memory.held.latents[batch, held])


@functools.partial(jax.jit, donate_argnums=0)
def _scatter(
    bulk: dict[str, Any], old: dict[str, Any], taken: Array, held: Array
) -> dict[str, Any]:
    rows, batch = (jnp.arange(x.shape[0])[:, None] for x in (taken, held))
    latents, was = bulk.pop("latents"), old["latents"]
    kept = {name: old[name] for name in bulk}
    back = jax.tree.map(lambda x, y: x.at[:, rows, taken].set(y), bulk, kept)
    return back | dict(latents=latents.at[batch, held].set(was))


@dataclasses.dataclass
class _Entry:
    """position: right after the chunk before. undos: of the changes since, and at last of the chunk
    itself.

    Forks share entries. `to_host` replaces arrays by the same numbers in the host's memory, which
    any thread may do at any time.
    """

    position: Position
    undos: tuple[Undo, ...]
    on_host: bool = False

    def to_host(self) -> None:
        if not self.on_host:
            self.undos = tuple(undo.on_host() for undo in self.undos)
            self.on_host = True


@dataclasses.dataclass(frozen=True)
class Past:
    """The last `chunks` chunks, as what takes them back. Without chunks nothing is put aside.

    What is put aside is on its way to the host until the chunk is handed over, and there from then
    on.

    Args:
      chunks: How many can be taken back at most.
      entries: Of the chunks, the oldest first.
      open: What was remembered since the last chunk.
      since: Where the first of that was remembered.
    """

    chunks: int
    entries: tuple[_Entry, ...] = ()
    open: tuple[Undo, ...] = ()
    since: Position | None = None

    @property
    def available(self) -> int:
        return len(self.entries)

    def remember(self, position: Position, undo: Callable[[], Undo]) -> Past:
        """Before a change: with what it overwrites, of a session that is at `position`."""
        if not self.chunks:
            return self
        since = self.since or position
        return dataclasses.replace(self, open=(*self.open, undo()), since=since)

    def close_chunk(self) -> Past:
        """What was remembered since the last call belongs to the chunk that is made now."""
        if not self.chunks:
            return self
        entries = (*self.entries, _Entry(self.since, self.open))[-self.chunks :]
        return Past(self.chunks, entries)

    def to_host(self, chunk: int) -> None:
        """Moves what was put aside up to that chunk. Waits only for what was there before it."""
        for entry in self.entries:
            if entry.position.chunk <= chunk:
                entry.to_host()

    def before(self, chunks: int) -> Position:
        """The position right after the chunk before the last `chunks`, of which there is one."""
        return self.entries[-chunks].position

    def take_back(self, chunks: int, state: State) -> tuple[Past, State]:
        """The past and the state right after the chunk before the last `chunks`."""
        kept = len(self.entries) - chunks
        undos = [undo for entry in self.entries[kept:] for undo in entry.undos]
        for undo in reversed((*undos, *self.open)):
            state = undo.apply(state)
        return Past(self.chunks, self.entries[:kept]), state
