"""What changes while a video is made, as values that are replaced only as a whole.

A session is a `State` (arrays on devices) and a `Progress` (what the host knows). Where they are
held is its place: a `LocalState` of its own, or a row of a batch. Every change computes both anew
and commits them with one assignment, so a reader in another thread sees the session before the
change or after it, and an exception leaves it before or after.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, UInt8

from longlive_jax import interrupts, timeline
from longlive_jax.dit.model import TextKV
from longlive_jax.errors import NotFiniteError
from longlive_jax.rollout import Rollout
from longlive_jax.undo import Past, Undo
from longlive_jax.vae.vae import VAECarry

if TYPE_CHECKING:
    from longlive_jax.model import Model

Frames = UInt8[np.ndarray, "t H W 3"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that a video's next chunk depends on.

    Programs that move a video on take its buffers (donation): an earlier state cannot be read once
    the next one is there.
    """

    rollout: Rollout
    carry: VAECarry  # on the VAE's device
    text: TextKV


@dataclasses.dataclass(frozen=True)
class Receipt:
    """A change of prompt, and the first frame of the video that follows it."""

    kind: str  # "switch" or "cut"
    mode: str  # of a switch: what became of the memory
    prompt: str
    frame: int

    def seconds(self, fps: int) -> float:
        return self.frame / fps


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What the frames that were handed over last belong to."""

    index: int
    frame: int  # of the video, the first one of them
    prompt: str  # in force
    changes: tuple[Receipt, ...]  # that begin with them
    denoise_s: float  # seconds until its latents were there


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a session is, known on the host without asking a device."""

    chunk: int = 0
    latents: int = 0  # made so far
    prompt: str = ""  # as it was given
    whole: str = ""  # as the text encoder reads it
    changes: tuple[Receipt, ...] = ()  # since the last chunk

    @property
    def opens_shot(self) -> bool:
        """Whether the next chunk is the first one after a cut."""
        return self.whole != self.prompt


@dataclasses.dataclass(frozen=True)
class Arrived:
    """The frames of a chunk on the host, and the clock when its latents were there."""

    frames: Frames
    ready: float
    finite: bool  # the latents

    def check(self, position: Position) -> None:
        """Raises NotFiniteError if the chunk, which was begun at `position`, is not finite."""
        if not self.finite:
            raise NotFiniteError(
                f"chunk {position.chunk} of the video is not finite (it holds NaN or infinity):"
                " check the weights, the LoRA and the precision; the frames before it are good"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class PendingChunk:
    """A chunk that devices are working on. Its arrays are never donated, so any thread may wait
    for them without a lock.
    """

    position: Position  # when it was begun
    latents: Array  # b f h w c; there when denoising has ended
    pixels: Array  # b t H W 3
    finite: Bool[Array, " b"] | None  # the latents of each row; None: known to be, all of them
    row: int
    begun: float | None  # on the clock; None: in another process

    def wait(self) -> Arrived:
        jax.block_until_ready(self.latents)
        ready = time.perf_counter()
        finite = self.finite is None or bool(np.asarray(self.finite)[self.row])
        return Arrived(np.asarray(self.pixels)[self.row], ready, finite)


@dataclasses.dataclass(frozen=True)
class Progress:
    """All of a session that changes, but its `State`.

    Args:
      model: The weights in use.
      position: How many chunks were begun, and the prompt of the next one.
      frame: Frames of the video that were handed over.
      past: What `rewind` takes back.
      ahead: Chunks that were begun and not handed over, the oldest first.
      rest: The end of a chunk whose beginning was handed over.
      last: What was handed over last.
      ready: On the clock, when the latents of the last chunk were there.
    """

    model: Model
    position: Position
    frame: int
    past: Past
    ahead: tuple[PendingChunk, ...] = ()
    rest: Frames | None = None
    last: Chunk | None = None
    ready: float = 0.0

    @property
    def undelivered(self) -> int:
        """How many pieces `handed_over` has left."""
        return len(self.ahead) + (self.rest is not None)

    @property
    def upcoming(self) -> int:
        """The first frame of the next chunk that is begun."""
        return self.first_frame(self.position.latents)

    def first_frame(self, latent: int) -> int:
        """The first frame of a latent frame."""
        return timeline.first_frame(self.model.config, latent)

    # Making.

    def before_chunk(self, read: Callable[[], State]) -> Progress:
        """With what the next chunk overwrites put aside, where there is a history. `read` is called
        only then.
        """
        stream = self.model.config.stream
        past = self.past.remember(self.position, lambda: Undo.of_chunk(read(), stream))
        return dataclasses.replace(self, past=past.close_chunk())

    def begun(self, chunk: PendingChunk) -> Progress:
        """With a chunk on its way. The cut prefix is read once in a shot: by its first chunk."""
        position = dataclasses.replace(
            self.position,
            chunk=self.position.chunk + 1,
            latents=self.position.latents + chunk.latents.shape[1],
            whole=self.position.prompt,
            changes=(),
        )
        return dataclasses.replace(self, position=position, ahead=(*self.ahead, chunk))

    def changed(self, receipt: Receipt, whole: str, past: Past) -> Progress:
        """With another prompt, which the text encoder reads as `whole`."""
        changes = (*self.position.changes, receipt)
        position = dataclasses.replace(
            self.position, prompt=receipt.prompt, whole=whole, changes=changes
        )
        return dataclasses.replace(self, position=position, past=past)

    def rewound(self, position: Position, past: Past) -> Progress:
        """Where it was at `position`, with nothing on its way."""
        frame = self.first_frame(position.latents)
        return dataclasses.replace(
            self, position=position, frame=frame, past=past, ahead=(), rest=None
        )

    def closed(self) -> Progress:
        """Without anything that takes memory."""
        return dataclasses.replace(self, past=Past(0), ahead=(), rest=None)

    # Handing over.

    def wait(self) -> Arrived | None:
        """Waits for the oldest chunk that nobody has had; None where a rest comes first."""
        if self.rest is not None:
            return None
        arrived = self.ahead[0].wait()
        self.past.to_host(self.ahead[0].position.chunk)
        return arrived

    def wait_all(self) -> tuple[Arrived, ...]:
        """Waits for all chunks on their way."""
        arrived = tuple(chunk.wait() for chunk in self.ahead)
        self.past.to_host(self.position.chunk - 1)
        return arrived

    def has(self, seen: Progress, chunks: int) -> bool:
        """Whether the rest of `seen` and its first chunks are still to be handed over."""
        return self.rest is seen.rest and self.ahead[:chunks] == seen.ahead[:chunks]

    def handed_over(self, arrived: Arrived | None, limit: int | None) -> tuple[Progress, Frames]:
        """Without the oldest frames that nobody has had, at most `limit`; and these frames.

        Args:
          arrived: What `wait` of this value returned.
          limit: None is all frames of the chunk.

        Raises:
          NotFiniteError: the chunk holds NaN or infinity.
        """
        if arrived is not None:
            chunk, ahead = self.ahead[0], self.ahead[1:]
            arrived.check(chunk.position)
            at, frames, ready = chunk.position, arrived.frames, arrived.ready
            spent = 0.0
            if chunk.begun is not None:
                spent = max(0.0, ready - max(chunk.begun, self.ready))
            last = Chunk(at.chunk, self.first_frame(at.latents), at.prompt, at.changes, spent)
        else:
            ahead, frames, ready = self.ahead, self.rest, self.ready
            last = dataclasses.replace(self.last, frame=self.frame, changes=(), denoise_s=0.0)
        limit = len(frames) if limit is None else limit
        frames, rest = frames[:limit], frames[limit:]
        after = dataclasses.replace(
            self,
            frame=self.frame + len(frames),
            ahead=ahead,
            rest=rest if len(rest) else None,
            last=last,
            ready=ready,
        )
        return after, frames

    def all_handed_over(self, arrived: tuple[Arrived, ...]) -> tuple[Progress, Frames]:
        """Without the rest and the chunks that have arrived; and their frames, maybe none.

        Raises:
          NotFiniteError: one of the chunks holds NaN or infinity.
        """
        config = self.model.config
        pieces = [np.zeros((0, config.height, config.width, 3), np.uint8)]
        after = self
        for piece in (None, *arrived) if self.rest is not None else arrived:
            after, frames = after.handed_over(piece, None)
            pieces.append(frames)
        return after, pieces[1] if len(pieces) == 2 else np.concatenate(pieces)


class Lock:
    """A re-entrant lock whose holder no signal disturbs: neither between a program that takes the
    buffers of a state and the commit of the next state, nor inside JAX.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> Lock:
        # In this order: an interrupt between the two would leave the lock taken for ever.
        interrupts.hold.__enter__()
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        interrupts.hold.__exit__()


@runtime_checkable
class Place(Protocol):
    """Where a session's state and progress are.

    Lock order. A thread takes, of these, only what it needs, and always in this order:
    1. the writer's lock of `saved`, of which there is one;
    2. `turn`: of one place. Whoever hands frames over holds it, so that chunks come in order to
       several consumers. It is held while a device is waited for, and nothing that steers a
       session needs it.
    3. `lock`: of one place; for `Batch.add` a batch's and then a lone session's, of which no holder
       ever asks for another lock. It is held from reading state and progress to committing them,
       since programs take the buffers of the state they are given. It is not held while a chunk is
       waited for.
    The sessions of a batch share its `turn` and `lock`, for their states are rows of the same
    arrays. No thread ever holds two turns, or the locks of two batches. A session may have moved
    while a lock was waited for: whoever gets it looks whether the session still is in this place,
    and else asks for the lock of the new one.
    """

    lock: Lock
    turn: Lock

    @property
    def progress(self) -> Progress:
        """May be read without the lock by who looks afterwards that the session is still here."""
        ...

    def state(self) -> State: ...

    def commit(self, progress: Progress, state: State | None = None) -> None:
        """Replaces both by one assignment; without a state, it stays as it is."""

    def leave(self) -> None:
        """After the session got another place: what it held here may go."""

    def lost(self) -> bool:
        """Return whether a program took the buffers of the state without leaving another."""
        ...


def is_deleted(state: State) -> bool:
    """Return whether buffers of a state were donated."""
    leaves = jax.tree.leaves(state)
    return any(isinstance(x, jax.Array) and x.is_deleted() for x in leaves)


class LocalState:
    """The place of a session on its own."""

    def __init__(self, state: State, progress: Progress):
        self.lock, self.turn = Lock(), Lock()
        self._value = state, progress

    @property
    def progress(self) -> Progress:
        return self._value[1]

    def state(self) -> State:
        return self._value[0]

    def commit(self, progress: Progress, state: State | None = None) -> None:
        self._value = self._value[0] if state is None else state, progress

    def leave(self) -> None:
        pass

    def lost(self) -> bool:
        return is_deleted(self._value[0])


@dataclasses.dataclass(frozen=True)
class ClosedState:
    """The place of a closed session: how far it was."""

    progress: Progress
