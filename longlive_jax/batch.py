"""Several sessions that advance in one forward: a fixed number of rows, which sessions come to and
leave without anything being compiled again.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from longlive_jax import arguments, interrupts, rollout
from longlive_jax.errors import NotFiniteError, SessionError, first_line
from longlive_jax.progress import (
    Arrived,
    ClosedState,
    Frames,
    LocalState,
    Lock,
    PendingChunk,
    Place,
    Progress,
    State,
    is_deleted,
)
from longlive_jax.session import Session
from longlive_jax.vae import vae as coder

if TYPE_CHECKING:
    from longlive_jax.model import Model


@dataclasses.dataclass(frozen=True)
class Occupant:
    """A session in a row of a batch, and how far it is."""

    session: Session
    place: BatchRow
    progress: Progress


@dataclasses.dataclass(frozen=True)
class Rows:
    """All that changes in a batch, replaced as one: the state of all rows, and who is in them."""

    state: State
    occupants: tuple[Occupant | None, ...]

    def having(self, row: int, occupant: Occupant | None) -> Rows:
        occupants = (*self.occupants[:row], occupant, *self.occupants[row + 1 :])
        return dataclasses.replace(self, occupants=occupants)


class BatchRow:
    """A row of a batch as the place of a session."""

    def __init__(self, batch: Batch, session: Session, row: int):
        self.batch, self.session, self.row = batch, session, row
        self.lock, self.turn = batch._lock, batch._turn

    @property
    def progress(self) -> Progress | None:
        """None: the session is no more here."""
        occupant = self.batch._rows.occupants[self.row]
        return occupant.progress if occupant and occupant.place is self else None

    def state(self) -> State:
        return _take(self.batch._rows.state, self.row)

    def commit(self, progress: Progress, state: State | None = None) -> None:
        rows = self.batch._rows
        if state is not None:
            rows = dataclasses.replace(rows, state=_put(rows.state, self.row, state))
        self.batch._rows = rows.having(self.row, Occupant(self.session, self, progress))

    def leave(self) -> None:
        self.batch._rows = self.batch._rows.having(self.row, None)

    def lost(self) -> bool:
        return is_deleted(self.batch._rows.state)


class PendingRow(LocalState):
    """The place of a session that waits for its first chunk, which is made alone."""

    def __init__(self, batch: Batch, state: State, progress: Progress):
        super().__init__(state, progress)
        self.batch, self.lock, self.turn = batch, batch._lock, batch._turn


class Batch:
    """Sessions with prompts, positions, shots and switches of their own, made together.

    Each gets the frames that it would get alone, up to rounding. While a session is in a batch it
    is advanced by `next_chunks`; `switch`, `cut`, `fork`, `save` and `rewind` are its own as ever.
    `len(batch)`, `session in batch` and `for session in batch` tell who is in it.

    A batch may be used from any thread, and so may its sessions. No change waits for a chunk that
    is being made; it takes effect with the next one that is begun.

    Args:
      model: Whose sessions they are.
      size: How many there can be; one program serves any number of them.
      steps: Denoising steps, the same for all; None is the model's own number.

    Raises:
      InputError: a number is out of range.
    """

    def __init__(self, model: Model, size: int, *, steps: int | None = None):
        size = arguments.whole("the size of a batch", size, 1)
        self.model, self.size, self.solver = model, size, model.solver(steps)
        text = model.prompt_kv([""] * size)
        carry = coder.init_carry(model.vae, size, model.config.height, model.config.width)
        state = State(rollout.begin(model.config, [0] * size, text.k.dtype), carry, text)
        # What the places of its sessions read and replace; see `Place` for how.
        self._lock, self._turn = Lock(), Lock()
        self._rows = Rows(state, (None,) * size)
        self._pending: tuple[Session, ...] = ()

    def __len__(self) -> int:
        return len(self._sessions())

    def __iter__(self) -> Iterator[Session]:
        return iter(self._sessions())

    def __contains__(self, session: object) -> bool:
        if not isinstance(session, Session):
            return False
        place = session._place
        return isinstance(place, (BatchRow, PendingRow)) and place.batch is self

    def add(self, session: Session) -> None:
        """From the next call of `next_chunks` on the session advances with the others.

        Raises:
          SessionError: it cannot, and why; it stays as it was.
        """
        with self._lock:
            while True:
                place = session._place
                if isinstance(place, (BatchRow, PendingRow)):
                    raise SessionError("the session is in a batch already")
                if isinstance(place, ClosedState):
                    raise SessionError("the session is closed")
                with place.lock:
                    if place is session._place:
                        self._check_joins(session, place.progress)
                        self._take_in(session, place)
                        return

    def _check_joins(self, session: Session, progress: Progress) -> None:
        if progress.model is not self.model:
            raise SessionError("the session belongs to another model than the batch")
        if session.solver != self.solver:
            steps = (len(solver.steps) for solver in (session.solver, self.solver))
            raise SessionError("the session takes {} denoising steps, the batch {}".format(*steps))
        if session.vae_device is not None:
            raise SessionError("the session decodes on a device of its own, a batch does not")
        if len(self) == self.size:
            raise SessionError(f"all {self.size} rows of the batch are taken")

    def remove(self, session: Session) -> None:
        """The session goes on alone, from where it is. What it has on its way goes with it.

        Raises:
          SessionError: it is not in this batch.
        """
        with self._lock:
            if session not in self:
                raise SessionError("the session is not in this batch")
            place = session._place
            session._place = LocalState(place.state(), place.progress)
            place.leave()

    def next_chunks(self) -> dict[Session, Frames]:
        """The next frames of every session: one forward for all, but for first chunks.

        Sessions that another thread closes, takes out or rewinds while this waits for their frames
        are left out. One that was taken out has its frames still to hand over.

        Raises:
          SessionError: a device failed while the state of all sessions was replaced.
          NotFiniteError: a chunk holds NaN or infinity; the error's `session` is whose. Nothing is
            handed over: take that session out, and the next call returns the others' frames.
        """
        while True:
            interrupts.stop.check()
            with self._turn:
                frames = self._next_chunks()
            if frames is not None:
                return frames

    def _next_chunks(self) -> dict[Session, Frames] | None:
        """None where a signal waits, whose handler may raise: nobody would get the frames."""
        with self._lock:
            try:
                self._begin()
            except Exception as error:
                if is_deleted(self._rows.state):
                    raise SessionError(f"the batch is lost: {first_line(error)}") from error
                raise
            seen = {session: session.progress for session in self._sessions()}
        arrived = {session: progress.wait_all() for session, progress in seen.items()}
        handed = {}
        with self._lock:
            for session in filter(self.__contains__, seen):
                progress = session.progress
                if progress.has(seen[session], len(arrived[session])):
                    handed[session] = _handed_over(session, progress, arrived[session])
            if interrupts.hold.pending:
                return None
            # All or none: a signal or an error comes before the first is committed.
            for session, (progress, _) in handed.items():
                session._place.commit(progress)
        return {session: frames for session, (_, frames) in handed.items()}

    def _sessions(self) -> list[Session]:
        """Who is in it, by row, then who waits for a first chunk."""
        with self._lock:
            seated = [occupant.session for occupant in self._occupants()]
            places = (session._place for session in self._pending)
            self._pending = tuple(
                session
                for session, place in zip(self._pending, places, strict=True)
                if isinstance(place, PendingRow) and place.batch is self
            )
            return [*seated, *self._pending]

    def _occupants(self) -> list[Occupant]:
        """Who has a row. A session that moved elsewhere and was interrupted then, before it emptied
        its row, has none.
        """
        found = filter(None, self._rows.occupants)
        return [occupant for occupant in found if occupant.session._place is occupant.place]

    def _begin(self) -> None:
        """Starts the next chunk of every session."""
        for occupant in self._occupants():
            if not occupant.progress.position.latents:  # it was rewound to its beginning
                self._wait(occupant.session, occupant.place)
        pending = [session for session in self if isinstance(session._place, PendingRow)]
        if len(pending) < len(self):
            self._advance()
        for session in pending:
            session.begin_chunk()
            self._seat(session, session._place)

    def _advance(self) -> None:
        """One forward for all rows."""
        config, state, begun = self.model.config, self._rows.state, time.perf_counter()
        before = {
            occupant.place.row: occupant.progress.before_chunk(occupant.place.state)
            for occupant in self._occupants()
        }
        memory, latents = rollout.generate(
            self.model.dit,
            state.rollout,
            state.text,
            rollout.noise(state.rollout, config.stream.chunk),
            stream=config.stream,
            solver=self.solver,
            guidance=config.sampler.guidance,
        )
        finite = rollout.finite(latents)
        carry, pixels = rollout.decode(self.model.vae, state.carry, latents, first=False)
        pixels.copy_to_host_async()
        rows = dataclasses.replace(self._rows, state=State(memory, carry, state.text))
        for row, progress in before.items():
            position, occupant = progress.position, rows.occupants[row]
            if position.opens_shot:
                text = self.model.prompt_kv([position.prompt])
                one = dataclasses.replace(_take(rows.state, row), text=text)
                rows = dataclasses.replace(rows, state=_put(rows.state, row, one))
            chunk = PendingChunk(position, latents, pixels, finite, row, begun)
            rows = rows.having(row, dataclasses.replace(occupant, progress=progress.begun(chunk)))
        self._rows = rows

    def _take_in(self, session: Session, place: Place) -> None:
        if place.progress.position.latents:
            self._seat(session, place)
        else:
            self._wait(session, place)

    def _seat(self, session: Session, place: Place) -> None:
        """Moves a session to the first row that is free."""
        taken = {occupant.place.row for occupant in self._occupants()}
        row = next(row for row in range(self.size) if row not in taken)
        seat = BatchRow(self, session, row)
        seat.commit(place.progress, place.state())
        session._place = seat
        place.leave()

    def _wait(self, session: Session, place: Place) -> None:
        """Moves a session to where it waits for its first chunk."""
        pending = PendingRow(self, place.state(), place.progress)
        others = (other for other in self._pending if other is not session)
        self._pending = (*others, session)
        session._place = pending
        place.leave()


def _handed_over(
    session: Session, progress: Progress, arrived: tuple[Arrived, ...]
) -> tuple[Progress, Frames]:
    try:
        return progress.all_handed_over(arrived)
    except NotFiniteError as error:
        raise NotFiniteError(str(error), session) from None


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
