"""A video that is alive: chunks come out, and between them the prompt may change.

A `Session` is a thin shell around a `State`, a pytree that goes into pure functions and comes out
of them. The same seed and the same changes make the same frames, however they are asked for: in one
go, forked, saved and restored, rewound.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from longlive_jax import rollout, timeline
from longlive_jax.config import Recache
from longlive_jax.dit.model import TextKV
from longlive_jax.errors import InputError, SessionError
from longlive_jax.events import CUT_PREFIX, MODES, Event, in_order
from longlive_jax.rollout import Latents, Rollout
from longlive_jax.sampler import Solver
from longlive_jax.undo import Past, Undo
from longlive_jax.vae.vae import VAECarry

if TYPE_CHECKING:
    from longlive_jax.model import Model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that a video's next chunk depends on."""

    rollout: Rollout
    carry: VAECarry  # on the VAE's device
    text: TextKV


@dataclasses.dataclass
class Home:
    """Where a session's state lives: here, or in a row of a batch."""

    state: State

    def read(self) -> State:
        return self.state

    def write(self, state: State) -> None:
        self.state = state


class Gone:
    """The home of a closed session."""

    def read(self) -> State:
        raise SessionError("the session is closed")

    def write(self, state: State) -> None:
        self.read()


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


@dataclasses.dataclass(frozen=True)
class Made:
    """A chunk that is on its way."""

    position: Position  # when it was begun
    latents: Array  # b f h w c; there when denoising has ended
    pixels: Array  # b t H W 3
    row: int
    begun: float


class Session:
    """A video, made as it is asked for. `Model.session` begins one.

    Everything that a video depends on is in `state`; nothing is computed that nobody asked for.

    Args:
      model: The weights.
      state: Of one video.
      position: How far it is.
      solver: How a chunk is denoised.
      given: Latents that the first chunk begins with.
      history: Chunks that `rewind` can take back; their memory is kept on the host.
      vae_device: Where chunks are decoded, while the next ones are denoised.
      notes: What was done to pictures that came in.
      seed: What the state's key was made of.
    """

    def __init__(
        self,
        model: Model,
        state: State,
        position: Position,
        *,
        solver: Solver,
        given: Latents | None = None,
        history: int = 0,
        vae_device: jax.Device | None = None,
        notes: tuple[str, ...] = (),
        seed: int = 0,
    ):
        self.model, self.solver, self.notes, self.seed = model, solver, notes, seed
        self.home: Any = Home(state)  # or what else reads and writes a state
        self.vae_device = vae_device
        self.position = position
        self.last: Chunk | None = None
        self.past = Past(history)
        self.given = given
        self._vae = model.vae if vae_device is None else jax.device_put(model.vae, vae_device)
        self.ahead: collections.deque[Made] = collections.deque()
        self.rest: UInt8[np.ndarray, "t H W 3"] | None = None
        self._ready = 0.0
        self._closed = False

    # Asking.

    @property
    def prompt(self) -> str:
        """In force for the next chunk that is begun."""
        return self.position.prompt

    @property
    def frame(self) -> int:
        """Frames of the video that have been handed over."""
        rest = 0 if self.rest is None else len(self.rest)
        return self._frame_of(self.position.latents) - rest - sum(map(_length, self.ahead))

    @property
    def closed(self) -> bool:
        return self._closed

    def next_chunk(self) -> UInt8[np.ndarray, "t H W 3"]:
        """The next frames: as many as a chunk has, the first chunk of a video three fewer."""
        self._check_open()
        if self.rest is None and not self.ahead:
            self.begin_chunk()
        return self._hand_over(None)

    def stream(
        self,
        seconds: float | int | None = None,
        *,
        events: Sequence[Event] = (),
        lookahead: int = 0,
    ) -> Iterator[UInt8[np.ndarray, "t H W 3"]]:
        """Chunks, together exactly round(seconds * fps) frames, or without end.

        Args:
          events: Changes of prompt, timed from here: each applies at the first chunk whose first
            frame is at or after its time.
          lookahead: Chunks that are begun before they are asked for. With 0 a `switch` between two
            chunks is never late; with 1 a chunk is made while the one before is being used.

        Raises:
          InputError: the length or an event makes no sense.
        """
        self._check_open()
        if not 0 <= lookahead <= 1:
            raise InputError(f"lookahead is 0 or 1 chunks, not {lookahead}")
        config, limit = self.model.config, None
        if seconds is not None:
            limit = timeline.frame_count(config, seconds)
            events = in_order(events, seconds)
        waiting = collections.deque(sorted(events, key=lambda event: event.time_s))
        return self._stream(limit, waiting, lookahead)

    def _stream(self, limit, waiting, lookahead) -> Iterator[UInt8[np.ndarray, "t H W 3"]]:
        start, fps = self.frame, self.model.config.fps
        while limit is None or self.frame < start + limit:
            while self._undelivered() <= lookahead:
                upcoming = self._frame_of(self.position.latents)
                if limit is not None and upcoming >= start + limit:
                    break
                while waiting and waiting[0].time_s * fps <= upcoming - start:
                    self._apply(waiting.popleft())
                self.begin_chunk()
            yield self._hand_over(None if limit is None else start + limit - self.frame)
            self._check_open()

    def _apply(self, event: Event) -> Receipt:
        if event.kind == "cut":
            return self.cut(event.prompt)
        return self.switch(event.prompt, event.mode)

    def _undelivered(self) -> int:
        return len(self.ahead) + (self.rest is not None)

    # Making.

    def begin_chunk(self) -> None:
        """Starts the next chunk; devices go on by themselves."""
        self._check_open()
        config, position = self.model.config, self.position
        self.remember_chunk()
        state, begun = self.home.read(), time.perf_counter()
        noise = rollout.noise(state.rollout, config.stream.chunk)
        memory, latents = rollout.generate(
            self.model.dit,
            state.rollout,
            state.text,
            noise,
            None if position.latents else self.given,
            stream=config.stream,
            solver=self.solver,
            guidance=config.sampler.guidance,
        )
        carry, pixels = self._decode(state.carry, latents)
        self.home.write(State(memory, carry, state.text))
        self.began(Made(position, latents, pixels, 0, begun))

    def _decode(self, carry: VAECarry, latents: Latents):
        if self.vae_device is not None:
            latents = jax.device_put(latents, self.vae_device)
        carry, pixels = rollout.decode(self._vae, carry, latents, first=self.position.latents == 0)
        pixels.copy_to_host_async()
        return carry, pixels

    def remember_chunk(self) -> None:
        stream = self.model.config.stream
        self.past.remember(self.position, lambda: Undo.of_chunk(self.home.read(), stream))
        self.past.close_chunk()

    def began(self, made: Made) -> None:
        """Notes that a chunk is on its way."""
        self.ahead.append(made)
        self.position = dataclasses.replace(
            self.position,
            chunk=self.position.chunk + 1,
            latents=self.position.latents + made.latents.shape[1],
            changes=(),
        )
        if self._opens_shot():  # the prefix is said once in a shot
            self.position = dataclasses.replace(self.position, whole=self.position.prompt)
            text = self.model.prompt_kv([self.position.whole])
            self.home.write(dataclasses.replace(self.home.read(), text=text))

    def _hand_over(self, limit: int | None) -> UInt8[np.ndarray, "t H W 3"]:
        """The oldest frames that nobody has had, at most `limit`; waits for them."""
        if self.rest is None:
            made = self.ahead[0]
            jax.block_until_ready(made.latents)
            started, self._ready = max(made.begun, self._ready), time.perf_counter()
            self.rest = np.asarray(made.pixels)[made.row]
            self.ahead.popleft()
            at = made.position
            first = self._frame_of(at.latents)
            spent = self._ready - started
            self.last = Chunk(at.chunk, first, at.prompt, at.changes, spent)
        else:  # the end of a chunk whose beginning is gone
            self.last = dataclasses.replace(self.last, frame=self.frame, changes=(), denoise_s=0.0)
        limit = len(self.rest) if limit is None else limit
        frames, rest = self.rest[:limit], self.rest[limit:]
        self.rest = rest if len(rest) else None
        return frames

    def _frame_of(self, latent: int) -> int:
        """The first frame of a latent frame."""
        return timeline.first_frame(self.model.config, latent)

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
        if mode not in MODES:
            raise InputError(f'there is no mode "{mode}" of a switch: say {", ".join(MODES)}')
        if f"{prompt} ".startswith(CUT_PREFIX):
            return self.cut(prompt)
        everyone, state = jnp.ones(1, bool), self.home.read()
        text, memory, whole = self.model.prompt_kv([prompt]), state.rollout, prompt
        undo = Undo.of_memory if mode == "recache" else Undo.of_labels
        self.past.remember(self.position, lambda: undo(state))
        if mode == "recache" and self.position.latents:
            stream = self.model.config.stream
            choices = dict(stream=stream, how=how or stream.recache)
            memory = rollout.recache(self.model.dit, memory, text, everyone, **choices)
        elif mode == "reset":
            memory = rollout.forget(memory, everyone)
        if self._opens_shot():  # the cut is still to come, with its prefix
            whole = CUT_PREFIX + prompt
            text = self.model.prompt_kv([whole])
        self.home.write(dataclasses.replace(state, rollout=memory, text=text))
        return self._changed("switch", mode, prompt, whole)

    def cut(self, prompt: str) -> Receipt:
        """A new shot from the next chunk on: its first chunk has `CUT_PREFIX` before the prompt,
        RoPE positions jump, and the shot gets a sink of its own (LongLive 2.0 section 4.2). Before
        the first chunk it only changes the prompt.

        Raises:
          SessionError: the session is closed.
          InputError: the prompt is empty.
        """
        prompt = self._checked(f"{self._checked(prompt)} ".removeprefix(CUT_PREFIX))
        begun, again = self.position.latents > 0, self._opens_shot()
        whole = CUT_PREFIX + prompt if begun else prompt
        text, state = self.model.prompt_kv([whole]), self.home.read()
        self.past.remember(self.position, lambda: Undo.of_labels(state))
        shot = state.rollout.shot + int(begun and not again)  # one that nobody saw is no shot
        memory = dataclasses.replace(state.rollout, shot=shot)
        self.home.write(dataclasses.replace(state, rollout=memory, text=text))
        return self._changed("cut", "keep", prompt, whole)

    def adapt(self, lora: str | os.PathLike | None) -> None:
        """Another LoRA beside the model's weights from the next chunk on, or none. The memory stays
        as it was made; a `switch` to the same prompt reads it anew. The first LoRA of a rank is
        compiled for; others of that rank take its place at once.

        Raises:
          SessionError: the session is closed, or shares its model with a batch.
          InputError: there is no LoRA in the file, or it is of another model.
        """
        self._check_open()
        if type(self.home) is not Home:
            raise SessionError("a session in a batch has the batch's model: take it out first")
        self.model = self.model.adapted(lora)
        text = self.model.prompt_kv([self.position.whole])
        self.home.write(dataclasses.replace(self.home.read(), text=text))

    def _opens_shot(self) -> bool:
        """Whether the next chunk is the first one after a cut."""
        return self.position.whole != self.position.prompt

    def _changed(self, kind: str, mode: str, prompt: str, whole: str) -> Receipt:
        receipt = Receipt(kind, mode, prompt, self._frame_of(self.position.latents))
        changes = (*self.position.changes, receipt)
        self.position = dataclasses.replace(
            self.position, prompt=prompt, whole=whole, changes=changes
        )
        return receipt

    def prepare(self, *modes: str) -> Session:
        """Compiles what switches need before the video plays, so that the first one is as fast as
        the next.
        """
        self._check_open()
        state, nobody = self.home.read(), jnp.zeros(1, bool)
        stream, memory = self.model.config.stream, state.rollout
        if "recache" in modes:
            choices = dict(stream=stream, how=stream.recache)
            memory = rollout.recache(self.model.dit, memory, state.text, nobody, **choices)
        if "reset" in modes:
            memory = rollout.forget(memory, nobody)
        self.home.write(dataclasses.replace(state, rollout=memory))
        return self

    # Going elsewhere.

    def fork(self, seed: int | None = None) -> Session:
        """An independent continuation from here; without a seed, the same one."""
        self._check_open()
        state = jax.tree.map(jnp.copy, self.home.read())
        if seed is not None:
            key = jax.random.key(seed)[None]
            state = dataclasses.replace(state, rollout=dataclasses.replace(state.rollout, key=key))
        seed = self.seed if seed is None else seed
        choices = dict(solver=self.solver, given=self.given, vae_device=self.vae_device)
        other = Session(self.model, state, self.position, notes=self.notes, seed=seed, **choices)
        other.past = self.past.copy()
        other.last, other.rest, other.ahead = self.last, self.rest, self.ahead.copy()
        other._vae = self._vae  # not another copy on its device
        return other

    def rewind(self, chunks: int = 1) -> None:
        """Takes back the last chunks that were handed over, and the changes of prompt made since
        the ones before: the session is where it was right after them. What was begun ahead goes
        too.

        Raises:
          SessionError: more chunks than `history` kept.
        """
        self._check_open()
        if chunks < 1:
            raise InputError(f"rewinding takes back at least 1 chunk, not {chunks}")
        back = chunks + len(self.ahead)
        if back > self.past.available:
            kept = max(0, self.past.available - len(self.ahead))
            raise SessionError(
                f"cannot rewind {chunks} chunks, {kept} are kept (history={self.past.chunks})"
            )
        self.ahead.clear()
        self.rest = None
        state, self.position = self.past.take_back(back, self.home.read(), self.position)
        text = self.model.prompt_kv([self.position.whole])
        self.home.write(dataclasses.replace(state, text=text))

    def save(self, folder) -> None:
        """Writes the session, to be continued with `longlive_jax.restore(folder)`: exactly, also
        in another process.

        Raises:
          InputError: the folder cannot be written, or holds something else.
        """
        from longlive_jax import saved

        self._check_open()
        saved.write(self, folder)

    def hand_over_all(self) -> UInt8[np.ndarray, "t H W 3"]:
        """Hands over all frames that are made or on their way; waits for them."""
        self._check_open()
        frames = [self._hand_over(None) for _ in range(self._undelivered())]
        return frames[0] if len(frames) == 1 else np.concatenate(frames)

    def close(self) -> None:
        """Gives the memory back. A closed session does nothing more."""
        self._closed = True
        self.ahead.clear()
        self.rest = None
        self.past = Past(0)
        self.home = Gone()

    def _checked(self, prompt: str) -> str:
        self._check_open()
        if not prompt.strip():
            raise InputError("the prompt is empty")
        return prompt.strip()

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError("the session is closed")


def _length(made: Made) -> int:
    return made.pixels.shape[1]
