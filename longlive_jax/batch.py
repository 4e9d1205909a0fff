"""Several sessions that advance in one forward: a fixed number of rows, which sessions come to and
leave without anything being compiled again.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from longlive_jax import rollout
from longlive_jax.errors import SessionError
from longlive_jax.session import Home, Made, Session, State
from longlive_jax.vae import vae as coder

if TYPE_CHECKING:
    from longlive_jax.model import Model


@dataclasses.dataclass
class Seat:
    """A row of a batch as the home of a session."""

    batch: Batch
    row: int

    def read(self) -> State:
        return _take(self.batch.state, self.row)

    def write(self, state: State) -> None:
        self.batch.state = _put(self.batch.state, self.row, state)


@dataclasses.dataclass
class Lobby(Home):
    """The home of a session that waits for its first chunk, which is made alone."""

    batch: Batch


class Batch:
    """Sessions with prompts, positions, shots and switches of their own, made together.

    Each gets the frames that it would get alone, up to rounding. While a session is in a batch it
    is advanced by `next_chunks`; `switch`, `cut`, `fork`, `save` and `rewind` are its own as ever.

    Args:
      model: Whose sessions they are.
      size: How many there can be; one program serves any number of them.
      steps: Denoising steps, the same for all; None is the model's own number.
    """

    def __init__(self, model: Model, size: int, *, steps: int | None = None):
        if size < 1:
            raise SessionError(f"a batch has at least 1 row, not {size}")
        self.model, self.size, self.solver = model, size, model.solver(steps)
        text = model.prompt_kv([""] * size)
        carry = coder.init_carry(model.vae, size, model.config.height, model.config.width)
        self.state = State(rollout.begin(model.config, [0] * size, text.k.dtype), carry, text)
        self._seated: dict[int, Session] = {}
        self._waiting: list[Session] = []  # in the lobby

    def __len__(self) -> int:
        self._drop_closed()
        return len(self._seated) + len(self._waiting)

    def add(self, session: Session) -> None:
        """From the next call of `next_chunks` on the session advances with the others.

        Raises:
          SessionError: it cannot, and why; it stays as it was.
        """
        if session.closed:
            raise SessionError("the session is closed")
        if session.model is not self.model:
            raise SessionError("the session belongs to another model than the batch")
        if session.solver != self.solver:
            steps = (len(solver.steps) for solver in (session.solver, self.solver))
            raise SessionError("the session takes {} denoising steps, the batch {}".format(*steps))
        if session.vae_device is not None:
            raise SessionError("the session decodes on a device of its own, a batch does not")
        if isinstance(session.home, (Seat, Lobby)):
            raise SessionError("the session is in a batch already")
        if len(self) == self.size:
            raise SessionError(f"all {self.size} rows of the batch are taken")
        if session.position.latents:
            self._seat(session)
        else:
            self._wait(session)

    def remove(self, session: Session) -> None:
        """The session goes on alone, from where it is.

        Raises:
          SessionError: it is not in this batch.
        """
        home = session.home
        if not isinstance(home, (Seat, Lobby)) or home.batch is not self:
            raise SessionError("the session is not in this batch")
        self._let_go(session)
        session.home = Home(home.read())

    def next_chunks(self) -> dict[Session, UInt8[np.ndarray, "t H W 3"]]:
        """The next frames of every session: one forward for all, but for first chunks."""
        self._drop_closed()
        for session in [s for s in self._seated.values() if not s.position.latents]:
            self._let_go(session)  # it was rewound to its beginning
            self._wait(session)
        seated, waiting = list(self._seated.values()), self._waiting
        if seated:
            self._advance(seated)
        for session in waiting:
            session.begin_chunk()
        frames = {session: session.hand_over_all() for session in (*seated, *waiting)}
        self._waiting = []
        for session in waiting:
            self._seat(session)
        return frames

    def _advance(self, sessions: list[Session]) -> None:
        config, begun = self.model.config, time.perf_counter()
        for session in sessions:
            session.remember_chunk()
        state = self.state
        memory, latents = rollout.generate(
            self.model.dit,
            state.rollout,
            state.text,
            rollout.noise(state.rollout, config.stream.chunk),
            stream=config.stream,
            solver=self.solver,
            guidance=config.sampler.guidance,
        )
        carry, pixels = rollout.decode(self.model.vae, state.carry, latents, first=False)
        pixels.copy_to_host_async()
        self.state = State(memory, carry, state.text)
        for session in sessions:
            session.began(Made(session.position, latents, pixels, session.home.row, begun))

    def _seat(self, session: Session) -> None:
        row = next(row for row in range(self.size) if row not in self._seated)
        seat = Seat(self, row)
        seat.write(session.home.read())
        session.home = seat
        self._seated[row] = session

    def _wait(self, session: Session) -> None:
        session.home = Lobby(session.home.read(), self)
        self._waiting.append(session)

    def _let_go(self, session: Session) -> None:
        self._seated = {row: s for row, s in self._seated.items() if s is not session}
        self._waiting = [s for s in self._waiting if s is not session]

    def _drop_closed(self) -> None:
        for session in [s for s in (*self._seated.values(), *self._waiting) if s.closed]:
            self._let_go(session)


_LAYERS_FIRST = (".rollout.cache.k", ".rollout.cache.v", ".text")


def _axes(state: State) -> list[int]:
    """The axis of rows of every leaf."""
    paths, _ = jax.tree.flatten_with_path(state)
    return [int(jax.tree_util.keystr(path).startswith(_LAYERS_FIRST)) for path, _ in paths]


def _rows(axis: int, size: int, x: Any, row: Any) -> Any:
    """Index of a video's rows in a leaf: one, or two under guidance."""
    rows = row + size * jnp.arange(x.shape[axis] // size)
    return (slice(None),) * axis + (rows,)


@jax.jit
def _take(state: State, row: int | Int[Array, ""]) -> State:
    size = state.rollout.frame.shape[0]
    leaves, structure = jax.tree.flatten(state)
    pairs = zip(_axes(state), leaves, strict=True)
    return structure.unflatten([x[_rows(axis, size, x, row)] for axis, x in pairs])


@functools.partial(jax.jit, donate_argnums=0)
def _put(state: State, row: int | Int[Array, ""], one: State) -> State:
    size = state.rollout.frame.shape[0]
    leaves, structure = jax.tree.flatten(state)
    triples = zip(_axes(state), leaves, jax.tree.leaves(one), strict=True)
    return structure.unflatten([x.at[_rows(axis, size, x, row)].set(y) for axis, x, y in triples])
