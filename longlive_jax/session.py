"""A video that is alive: chunks come out, and between them the prompt may change.

A `Session` is a thin shell around a `State`, a pytree that goes into pure functions and comes out
of them. The same seed and the same changes make the same frames, however they are asked for: in one
go, forked, saved and restored, rewound, from one thread or from several.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from longlive_jax import arguments, interrupts, rollout, timeline
from longlive_jax.config import Recache
from longlive_jax.errors import SessionError, first_line
from longlive_jax.events import CUT_PREFIX, Event, check_mode, in_order
from longlive_jax.lora_files import Choice
from longlive_jax.progress import (
    Arrived,
    Chunk,
    ClosedState,
    Frames,
    LocalState,
    Lock,
    PendingChunk,
    Place,
    Progress,
    Receipt,
    State,
)
from longlive_jax.rollout import Latents
from longlive_jax.sampler import Solver
from longlive_jax.undo import Undo
from longlive_jax.vae.vae import VAECarry

if TYPE_CHECKING:
    from longlive_jax.model import Model

__all__ = ["Chunk", "Receipt", "Session", "State"]

# Called with a session's lock held. Makes sure that there is something to hand over; answers how
# many frames of it at most: None for all of a chunk, 0 where there shall be no more.
Ask = Callable[[Place], int | None]


class Session:
    """A video, made as it is asked for. `Model.session` begins one.

    Everything that a video depends on is in `state`; nothing is computed that nobody asked for.

    A session may be used from any thread. A change (`switch`, `cut`, `adapt`, `rewind`, `close`)
    takes effect at once for the next chunk that is begun, also while another thread waits for a
    chunk; the receipt names the first frame that follows it. Several threads that ask for chunks
    get different ones, in order. A chunk that was begun and is still waited for counts as begun
    ahead: `rewind` takes it back, and who waits for it gets the chunk that is made in its place.
    Where the session is closed meanwhile, they get a `SessionError`. `last` is of the frames that
    were handed over last, to whichever thread.

    As a context it closes at the end: `with model.session("a red circle") as session`.

    Args:
      state: Of one video.
      progress: How far it is, and the model.
      solver: How a chunk is denoised.
      given: Latents that the first chunk begins with.
      vae_device: Where chunks are decoded, while the next ones are denoised.
      vae: The decoder, where it is on that device already.
      notes: What was done to pictures that came in, and what of prompts the model does not read.
      seed: What the state's key was made of.
    """

    def __init__(
        self,
        state: State,
        progress: Progress,
        *,
        solver: Solver,
        given: Latents | None = None,
        vae_device: jax.Device | None = None,
        vae: Any = None,
        notes: tuple[str, ...] = (),
        seed: int = 0,
    ):
        self.solver, self.given, self.notes, self.seed = solver, given, notes, seed
        self.vae_device = vae_device
        if vae is None:
            vae = progress.model.vae
            vae = vae if vae_device is None else jax.device_put(vae, vae_device)
        self._vae = vae
        # Read and replaced here, in `batch` and in `saved`; see `Place` for how.
        self._place: Place | ClosedState = LocalState(state, progress)

    def __enter__(self) -> Session:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Asking. None of these waits for anything.

    @property
    def progress(self) -> Progress:
        """How far the session is, as one value."""
        while True:
            place = self._place
            progress = place.progress
            if place is self._place:  # else it moved to or from a batch
                return progress

    @property
    def model(self) -> Model:
        """The weights and the config in use."""
        return self.progress.model

    @model.setter
    def model(self, model: Model) -> None:
        with self._held() as place:
            self._check_alone()
            place.commit(dataclasses.replace(place.progress, model=model))

    @property
    def prompt(self) -> str:
        """In force for the next chunk that is begun."""
        return self.progress.position.prompt

    @property
    def frame(self) -> int:
        """Frames of the video that have been handed over."""
        return self.progress.frame

    @property
    def last(self) -> Chunk | None:
        """What was handed over last."""
        return self.progress.last

    @property
    def closed(self) -> bool:
        return isinstance(self._place, ClosedState)

    @property
    def state(self) -> State:
        """What the next chunk depends on. Its arrays can be read until the session moves on."""
        with self._held() as place:
            return place.state()

    # Making.

    def next_chunk(self) -> Frames:
        """The next frames: as many as a chunk has, the first chunk of a video three fewer.

        Ctrl-C loses nothing: it is raised when the chunk is there and not yet handed over, and the
        next call hands it over.

        Raises:
          SessionError: the session is closed.
          NotFiniteError: the chunk holds NaN or infinity, and so will all that follow it. `rewind`
            goes back to before it.
        """

        def ask(place: Place) -> None:
            if not place.progress.undelivered:
                self._begin(place)

        return self._consume(ask)

    def stream(
        self,
        seconds: float | int | None = None,
        *,
        events: Sequence[Event] = (),
        lookahead: int = 0,
    ) -> Iterator[Frames]:
        """Chunks, together exactly round(seconds * fps) frames, or without end. Frames that another
        thread takes meanwhile count among them.

        Args:
          events: Changes of prompt, timed from here: each applies at the first chunk whose first
            frame is at or after its time.
          lookahead: Chunks that are begun before they are asked for. With 0 a `switch` between two
            chunks is never late; with 1 a chunk is made while the one before is being used.

        Raises:
          InputError: the length or an event makes no sense.
          SessionError: the session is closed, now or later.
          NotFiniteError: a chunk holds NaN or infinity.
        """
        return self._stream(self._schedule(seconds, events, lookahead))

    def _stream(self, ask: Ask) -> Iterator[Frames]:
        while (frames := self._consume(ask)) is not None:
            yield frames

    def astream(
        self,
        seconds: float | int | None = None,
        *,
        events: Sequence[Event] = (),
        lookahead: int = 0,
    ) -> AsyncIterator[Frames]:
        """`stream` for `async for`: devices are waited for in a thread, so that the event loop goes
        on. Takes and raises the same.

        Leaving the loop and cancelling its task lose nothing: what was begun is handed over by the
        next call that asks for frames. Neither closes the session.
        """
        return self._astream(self._schedule(seconds, events, lookahead))

    async def _astream(self, ask: Ask) -> AsyncIterator[Frames]:
        def wait() -> tuple[Progress, Arrived | None, int | None] | None:
            with self._in_turn():
                return self._await(ask)

        while (waited := await asyncio.to_thread(wait)) is not None:
            # Not in the thread: that goes on where this task is cancelled, and what it handed over
            # would be lost.
            frames = self._hand_over(*waited)
            if frames is not None:
                yield frames

    def hand_over_all(self) -> Frames:
        """Hands over all frames that are made or on their way, maybe none; waits for them.

        Raises:
          SessionError: the session is closed.
        """
        while True:
            with self._in_turn():
                seen = self._open_progress()
                frames = self._hand_over_all(seen, seen.wait_all())
            if frames is not None:
                return frames

    def begin_chunk(self) -> None:
        """Starts the next chunk; devices go on by themselves.

        Raises:
          SessionError: the session is closed.
        """
        with self._held() as place:
            self._begin(place)

    def _schedule(
        self, seconds: float | int | None, events: Sequence[Event], lookahead: int
    ) -> Ask:
        """Asks for the chunks of a stream, which begins when it is called first."""
        config = self._open_progress().model.config
        lookahead = arguments.whole("lookahead", lookahead, 0, 1)
        limit = None
        if seconds is not None:
            limit = timeline.frame_count(config, seconds)
            events = in_order(events, seconds)
        waiting = collections.deque(sorted(events, key=lambda event: event.time_s))
        start = end = None

        def ask(place: Place) -> int | None:
            nonlocal start, end
            if start is None:
                start = place.progress.frame
                end = None if limit is None else start + limit
            if end is not None and place.progress.frame >= end:
                return 0
            while place.progress.undelivered <= lookahead:
                upcoming = place.progress.upcoming
                if end is not None and upcoming >= end:
                    break
                while waiting and waiting[0].time_s * config.fps <= upcoming - start:
                    self._apply(waiting.popleft())
                self._begin(place)
            return None if end is None else end - place.progress.frame

        return ask

    def _apply(self, event: Event) -> Receipt:
        if event.kind == "cut":
            return self.cut(event.prompt)
        return self.switch(event.prompt, event.mode)

    def _begin(self, place: Place) -> None:
        state = place.state()
        progress = place.progress.before_chunk(lambda: state)
        position, config, begun = progress.position, progress.model.config, time.perf_counter()
        noise = rollout.noise(state.rollout, config.stream.chunk)
        memory, latents = rollout.generate(
            progress.model.dit,
            state.rollout,
            state.text,
            noise,
            None if position.latents else self.given,
            stream=config.stream,
            solver=self.solver,
            guidance=config.sampler.guidance,
        )
        finite = rollout.finite(latents)
        carry, pixels = self._decode(state.carry, latents, first=position.latents == 0)
        text = state.text
        if position.opens_shot:
            text = progress.model.prompt_kv([position.prompt])
        chunk = PendingChunk(position, latents, pixels, finite, 0, begun)
        place.commit(progress.begun(chunk), State(memory, carry, text))

    def _decode(self, carry: VAECarry, latents: Latents, *, first: bool):
        if self.vae_device is not None:
            latents = jax.device_put(latents, self.vae_device)
        carry, pixels = rollout.decode(self._vae, carry, latents, first=first)
        pixels.copy_to_host_async()
        return carry, pixels

    # Handing over: begin what is asked for, wait without the lock, commit if it still is the next.

    def _consume(self, ask: Ask) -> Frames | None:
        """The next frames, or None where `ask` wants no more."""
        while True:
            interrupts.stop.check()
            with self._in_turn():
                waited = self._await(ask)
                if waited is None:
                    return None
                frames = self._hand_over(*waited)
            if frames is not None:
                return frames

    def _await(self, ask: Ask) -> tuple[Progress, Arrived | None, int | None] | None:
        """Waits for what `ask` wants; None where that is nothing."""
        with self._held() as place:
            limit, seen = ask(place), place.progress
        return None if limit == 0 else (seen, seen.wait(), limit)

    def _hand_over(
        self, seen: Progress, arrived: Arrived | None, limit: int | None
    ) -> Frames | None:
        """Hands over what was waited for, or None where that was taken or rewound meanwhile, or a
        signal waits, whose handler may raise: nobody would get the frames.
        """
        with self._held() as place:
            if not place.progress.has(seen, arrived is not None):
                return None
            progress, frames = place.progress.handed_over(arrived, limit)
            if interrupts.hold.pending:
                return None
            place.commit(progress)
            return frames

    def _hand_over_all(self, seen: Progress, arrived: tuple[Arrived, ...]) -> Frames | None:
        """Hands over all that was waited for; None as of `_hand_over`."""
        with self._held() as place:
            if not place.progress.has(seen, len(arrived)):
                return None
            progress, frames = place.progress.all_handed_over(arrived)
            if interrupts.hold.pending:
                return None
            place.commit(progress)
            return frames

    # Steering.

    def switch(self, prompt: str, mode: str = "recache", *, how: Recache | None = None) -> Receipt:
        """A new prompt in the same shot, from the next chunk on. One that begins with the cut
        prefix is a `cut`.

        Args:
          mode: What becomes of the memory: "recache" re-reads the window under the new prompt;
            "keep" leaves it, as the old prompt made it; "reset" empties it.
          how: The form of the recache; None is the model's own.

        Raises:
          SessionError: the session is closed.
          InputError: the prompt is empty, or there is no such mode.
        """
        prompt = self._checked(prompt)
        check_mode(mode)
        if f"{prompt} ".startswith(CUT_PREFIX):
            return self.cut(prompt)
        with self._held() as place:
            progress, state = place.progress, place.state()
            position, model = progress.position, progress.model
            whole = CUT_PREFIX + prompt if position.opens_shot else prompt  # of a cut to come
            text = model.prompt_kv([prompt])
            upcoming = model.prompt_kv([whole]) if position.opens_shot else text
            past = progress.past.remember(position, lambda: Undo.of_switch(state, mode))
            choices = dict(stream=model.config.stream, how=how, begun=position.latents > 0)
            memory = rollout.switched(model.dit, state.rollout, text, mode, **choices)
            receipt = Receipt("switch", mode, prompt, progress.upcoming)
            state = dataclasses.replace(state, rollout=memory, text=upcoming)
            place.commit(progress.changed(receipt, whole, past), state)
            self._take_notes(model.prompt_note(whole))
            return receipt

    def cut(self, prompt: str) -> Receipt:
        """A new shot from the next chunk on: its first chunk has `CUT_PREFIX` before the prompt,
        RoPE positions jump, and the shot gets a sink of its own (LongLive 2.0 section 4.2). Before
        the first chunk it only changes the prompt.

        Raises:
          SessionError: the session is closed.
          InputError: the prompt is empty.
        """
        prompt = self._checked(f"{self._checked(prompt)} ".removeprefix(CUT_PREFIX))
        with self._held() as place:
            progress, state = place.progress, place.state()
            begun, again = progress.position.latents > 0, progress.position.opens_shot
            whole = CUT_PREFIX + prompt if begun else prompt
            text = progress.model.prompt_kv([whole])
            past = progress.past.remember(progress.position, lambda: Undo.of_labels(state))
            shot = state.rollout.shot + int(begun and not again)  # one that nobody saw is no shot
            memory = dataclasses.replace(state.rollout, shot=shot)
            receipt = Receipt("cut", "keep", prompt, progress.upcoming)
            state = dataclasses.replace(state, rollout=memory, text=text)
            place.commit(progress.changed(receipt, whole, past), state)
            self._take_notes(progress.model.prompt_note(whole))
            return receipt

    def adapt(self, lora: Choice, mode: str = "keep") -> None:
        """Other LoRAs beside the weights from the next chunk on, or none. Those of the same ranks,
        and other strengths, need no compiling. `rewind` does not bring the old ones back.

        Args:
          lora: A file; or several, each a path or a pair of a path and a strength.
          mode: As in `switch`; "keep" leaves the memory as the old weights made it.

        Raises:
          SessionError: the session is closed, or shares its model with a batch.
          InputError: there is no such mode, no LoRA in a file, or one of another model.
        """
        check_mode(mode)
        while True:
            with self._held():
                self._check_alone()
                before = self.model
            model = before.adapted(lora)  # reads files: not with the lock
            with self._held() as place:
                self._check_alone()
                progress, state = place.progress, place.state()
                if progress.model is not before:
                    continue
                position = progress.position
                past = progress.past.remember(position, lambda s=state: Undo.of_switch(s, mode))
                text, upcoming = (model.prompt_kv([x]) for x in (position.prompt, position.whole))
                choices = dict(stream=model.config.stream, begun=position.latents > 0)
                memory = rollout.switched(model.dit, state.rollout, text, mode, **choices)
                state = dataclasses.replace(state, rollout=memory, text=upcoming)
                place.commit(dataclasses.replace(progress, model=model, past=past), state)
                self._take_notes(*model.notes)
                return

    def prepare(self, *modes: str) -> Session:
        """Compiles what switches need before the video plays, so that the first one is as fast as
        the next. Other threads' changes wait meanwhile.

        Raises:
          SessionError: the session is closed.
        """
        with self._held() as place:
            state, model, nobody = place.state(), place.progress.model, jnp.zeros(1, bool)
            stream, memory = model.config.stream, state.rollout
            if "recache" in modes:
                choices = dict(stream=stream, how=stream.recache)
                memory = rollout.recache(model.dit, memory, state.text, nobody, **choices)
            if "reset" in modes:
                memory = rollout.forget(memory, nobody)
            place.commit(place.progress, dataclasses.replace(state, rollout=memory))
        return self

    # Going elsewhere.

    def fork(self, seed: int | None = None) -> Session:
        """An independent continuation from here; without a seed, the same one.

        Raises:
          SessionError: the session is closed.
          InputError: the seed is not from 0 to 2**32 - 1.
        """
        self._check_open()
        seed = None if seed is None else arguments.seed(seed)
        with self._held() as place:
            progress, state = place.progress, jax.tree.map(jnp.copy, place.state())
        if seed is not None:
            key = jax.random.key(seed)[None]
            state = dataclasses.replace(state, rollout=dataclasses.replace(state.rollout, key=key))
        return Session(
            state,
            progress,
            solver=self.solver,
            given=self.given,
            vae_device=self.vae_device,
            vae=self._vae,
            notes=self.notes,
            seed=self.seed if seed is None else seed,
        )

    def rewind(self, chunks: int = 1) -> None:
        """Takes back the last chunks that were handed over, and the changes of prompt made since
        the ones before: the session is where it was right after them. What was begun ahead goes
        too.

        Raises:
          InputError: no chunk is to be taken back.
          SessionError: more chunks than `history` kept, or the session is closed.
        """
        self._check_open()
        chunks = arguments.whole("chunks to take back", chunks, 1)
        with self._held() as place:
            progress, past = place.progress, place.progress.past
            back = chunks + len(progress.ahead)
            if back > past.available:
                kept = max(0, past.available - len(progress.ahead))
                raise SessionError(
                    f"cannot rewind {chunks} chunks, {kept} are kept (history={past.chunks})"
                )
            position = past.before(back)
            text = progress.model.prompt_kv([position.whole])
            past, state = past.take_back(back, place.state())
            state = dataclasses.replace(state, text=text)
            place.commit(progress.rewound(position, past), state)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the session, to be continued with `longlive_jax.restore(folder)`: exactly, also
        in another process. Other threads' changes wait while the memory is copied to the host, not
        while it is written.

        Raises:
          InputError: the folder cannot be written, or holds something else.
          SessionError: the session is closed.
        """
        from longlive_jax import saved

        self._check_open()
        saved.write(self, folder)

    def close(self) -> None:
        """Gives the memory back. A closed session does nothing more."""
        with contextlib.suppress(SessionError), self._held() as place:
            self._place = ClosedState(place.progress.closed())
            place.leave()

    def _take_notes(self, *new: str) -> None:
        self.notes = tuple(dict.fromkeys(filter(None, (*self.notes, *new))))

    def _checked(self, prompt: str) -> str:
        self._check_open()
        return arguments.prompt(prompt)

    def _check_open(self) -> None:
        if self.closed:
            raise SessionError("the session is closed")

    def _check_alone(self) -> None:
        if type(self._place) is not LocalState:
            self._check_open()
            raise SessionError("a session in a batch has the batch's model: take it out first")

    # Locks; see `Place` for their order.

    def _open_progress(self) -> Progress:
        with self._held() as place:
            return place.progress

    @contextlib.contextmanager
    def _held(self) -> Iterator[Place]:
        """With the lock: from here on nobody else changes the session."""
        with self._locked(lambda place: place.lock) as place:
            try:
                yield place
            except Exception as error:
                self._end_if_lost(place, error)
                raise

    def _in_turn(self) -> contextlib.AbstractContextManager[Place]:
        """With the turn: from here on nobody else who hands over begins and waits."""
        return self._locked(lambda place: place.turn)

    @contextlib.contextmanager
    def _locked(self, lock_of: Callable[[Place], Lock]) -> Iterator[Place]:
        while True:
            place = self._place
            if isinstance(place, ClosedState):
                raise SessionError("the session is closed")
            with lock_of(place):
                if place is self._place:
                    yield place
                    return

    def _end_if_lost(self, place: Place, error: Exception) -> None:
        """Closes the session, with a SessionError, where a device failed, such as for want of
        memory, after a program had taken the buffers of the state.
        """
        if place is self._place and place.lost():
            self._place = ClosedState(place.progress.closed())
            place.leave()
            raise SessionError(f"the session is lost and closed: {first_line(error)}") from error
