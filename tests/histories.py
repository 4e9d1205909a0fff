"""Random histories of several threads on sessions and batches, recorded and played again in one.

Whatever a thread does takes effect when a value is replaced under a lock: the state and progress of
a session, the rows of a batch, the place of a session. There the order is noted, so it is one that
a single thread could have followed, and `Replay` follows it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from test_session import assert_same

import longlive_jax
from longlive_jax import saved
from longlive_jax.batch import Batch, BatchRow
from longlive_jax.config import Recache
from longlive_jax.errors import InputError, SessionError
from longlive_jax.events import Event
from longlive_jax.progress import ClosedState, LocalState, Progress
from longlive_jax.session import Session

PROMPTS = (
    "a red circle moves left over a black background",
    "a blue circle moves left over a black background",
    "a green square bounces over a grey background",
)
WAYS = (("recache", None), ("recache", Recache("bidirectional", "keep")), ("keep", None))
WAYS += (("reset", None),)

# What may be said, and of which operations.
DOCUMENTED = {
    "the session is closed": "any",
    "cannot rewind": "rewind",
    "in a batch already": "add",
    "is not in this batch": "remove",
    "rows of the batch are taken": "add",
    "another model than the batch": "add",
    "has the batch's model": "adapt",
}


@dataclasses.dataclass(eq=False)
class Effect:
    """One step that took effect.

    after: The progress of every session that it changed. frames: what it handed over.
    """

    kind: str
    what: Any
    arguments: tuple = ()
    after: dict[Session, Progress] = dataclasses.field(default_factory=dict)
    frames: np.ndarray | None = None


class Recorder:
    """Notes effects in order, from any thread, while its patches are in place."""

    def __init__(self, patch):
        self.effects: list[Effect] = []
        self.mine = threading.local()
        self.patch = patch
        for place in (LocalState, BatchRow):
            self._around(place, "commit", self._commit)
        self._around(Session, "__setattr__", self._set)
        self._around(Batch, "_begin", self._begin)
        self._around(Batch, "_take_in", self._take_in)
        self._around(saved, "_arrays", self._arrays)

    def _around(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        inner = getattr(owner, name)
        self.patch.setattr(owner, name, lambda *a, **k: wrapper(inner, *a, **k))

    @property
    def inside(self) -> int:
        return getattr(self.mine, "inside", 0)

    def watch(self, session: Session) -> None:
        """Begins with a session that is on its own."""
        session._place.owner = session
        self.note(Effect("nothing", session, (), {session: session.progress}))

    def note(self, effect: Effect) -> None:
        """Called before anybody else can go on from there."""
        if not self.inside:
            self.effects.append(effect)
            self.mine.effects = [*getattr(self.mine, "effects", ()), effect]

    @contextlib.contextmanager
    def as_one(self):
        """What is replaced inside belongs to one step, which is noted by who calls this."""
        self.mine.inside = self.inside + 1
        try:
            yield
        finally:
            self.mine.inside -= 1

    def _commit(self, inner, place, progress, state=None):
        before = place.progress
        inner(place, progress, state)
        if not self.inside:
            kind, arguments = self._kind(before, progress)
            self.note(Effect(kind, place.owner, arguments, {place.owner: progress}))

    def _kind(self, before: Progress, after: Progress) -> tuple[str, tuple]:
        """What lies between two values. A thread has noted what they do not tell."""
        asked = getattr(self.mine, "asked", ())
        if len(after.ahead) > len(before.ahead):
            return "begin", ()
        if len(after.position.changes) > len(before.position.changes):
            receipt = after.position.changes[-1]
            return receipt.kind, (receipt, asked[0] if receipt.kind == "switch" and asked else None)
        if after.frame > before.frame:
            return "hand over", (after.frame - before.frame,)
        if after.model is not before.model:
            return "adapt", ()
        if after.position != before.position or after.ahead != before.ahead:
            return "rewind", asked
        return "nothing", ()

    def _set(self, inner, session, name, value):
        before = session.__dict__.get("_place")
        if name == "_place" and isinstance(value, ClosedState):
            self.note(Effect("close", session, (), {session: value.progress}))
        elif name == "_place":
            value.owner = session
            if before is not None and type(value) is LocalState:
                after = {session: value.progress}
                self.note(Effect("remove", session, (before.batch,), after))
        inner(session, name, value)

    def _begin(self, inner, batch):
        with self.as_one():
            inner(batch)
        self.note(Effect("begin all", batch, (), {s: s.progress for s in batch}))

    def _take_in(self, inner, batch, session, place):
        with self.as_one():
            inner(batch, session, place)
        self.note(Effect("add", session, (batch,), {session: session.progress}))

    def _arrays(self, inner, given, progress, state):
        tree = inner(given, progress, state)
        self.mine.saved = progress
        return tree

    def after(self, session: Session, progress: Progress, effect: Effect) -> None:
        """Puts a step that changes nothing to where a session came to that progress."""
        had = (i for i, e in enumerate(self.effects) if e.after.get(session) is progress)
        self.effects.insert(next(had) + 1, effect)


class Replay:
    """Does what was done, in one thread and in that order, to `twins` of what was there at the
    start, and compares: frames, receipts, and in the end all that is left.
    """

    def __init__(self, twins: dict[Any, Any]):
        self.twins, self.saves = twins, {}

    def run(self, effects: list[Effect]) -> None:
        for effect in effects:
            act = getattr(self, effect.kind.replace(" ", "_"))
            act(self.twins[effect.what], effect, *effect.arguments)
        for folder, twin in self.saves.items():
            same_ending(longlive_jax.restore(folder, model=twin.model), twin)
        for one, twin in self.twins.items():
            if isinstance(one, Session):
                assert one.closed == twin.closed
                if not one.closed:
                    same_ending(one, twin)

    def nothing(self, twin, effect):
        pass

    def begin(self, twin, effect):
        twin.begin_chunk()

    def begin_all(self, twin, effect):
        with twin._lock:
            twin._begin()

    def hand_over(self, twin, effect, count):
        np.testing.assert_array_equal(handed_over(twin, count), effect.frames)

    def switch(self, twin, effect, receipt, how):
        assert twin.switch(receipt.prompt, receipt.mode, how=how) == receipt

    def cut(self, twin, effect, receipt, _):
        assert twin.cut(receipt.prompt) == receipt

    def rewind(self, twin, effect, chunks):
        twin.rewind(chunks)

    def adapt(self, twin, effect):
        twin.adapt(None)

    def add(self, twin, effect, batch):
        self.twins[batch].add(twin)

    def remove(self, twin, effect, batch):
        self.twins[batch].remove(twin)

    def close(self, twin, effect):
        twin.close()

    def fork(self, twin, effect, fork, seed):
        self.twins[fork] = twin.fork(seed)

    def save(self, twin, effect, folder):
        self.saves[folder] = twin.fork()


def handed_over(session: Session, count: int) -> np.ndarray:
    """So many frames that were begun."""
    pieces = []
    while count:
        seen = session.progress
        pieces.append(session._hand_over(seen, seen.wait(), count))
        count -= len(pieces[-1])
    return np.concatenate(pieces)


def same_ending(one: Session, two: Session) -> None:
    """Bit-exact: what was begun, and all that the next chunk depends on."""
    np.testing.assert_array_equal(one.hand_over_all(), two.hand_over_all())
    assert one.prompt == two.prompt
    assert_same(one, two)


@dataclasses.dataclass
class History:
    """Threads that do at random what can be done.

    sessions, batches: what there is; forks are added. done: how often what was done, and said.
    """

    recorder: Recorder
    folder: Any
    sessions: list[Session]
    batches: list[Batch]
    done: dict[str, int] = dataclasses.field(default_factory=dict)
    receipts: list = dataclasses.field(default_factory=list)
    forks: list = dataclasses.field(default_factory=list)
    saves: list = dataclasses.field(default_factory=list)
    failures: list = dataclasses.field(default_factory=list)
    counting: Any = dataclasses.field(default_factory=threading.Lock)

    def run(self, seed: int, threads: int, length: int) -> None:
        start = threading.Barrier(threads)
        players = [
            threading.Thread(target=self._play, args=(seed, i, length, start), daemon=True)
            for i in range(threads)
        ]
        for player in players:
            player.start()
        for player in players:
            player.join(300)
            assert not player.is_alive(), "the threads wait for each other"
        if self.failures:
            raise self.failures[0]
        for source, progress, effect in (*self.forks, *self.saves):
            self.recorder.after(source, progress, effect)
        given = [e.arguments[0] for e in self.recorder.effects if e.kind in ("switch", "cut")]
        for receipt in self.receipts:
            assert any(receipt is x for x in given), "a receipt of what did not happen"

    def _play(self, seed: int, thread: int, length: int, start: threading.Barrier) -> None:
        player = Player(self, np.random.default_rng((seed, thread)))
        start.wait(60)
        try:
            for _ in range(length):
                player.act()
        except BaseException as error:  # noqa: BLE001  # raised again by `run`
            self.failures.append(error)


class Player:
    """One thread of a history."""

    # How often each is chosen.
    ALONE = dict(next=6, stream=6, switch=6, cut=2, rewind=2, fork=1, save=1, adapt=1, all=1)
    ALONE |= dict(prepare=1, look=2, close=0.2)
    TOGETHER = dict(chunks=8, add=3, remove=2, members=1)

    def __init__(self, history: History, random: np.random.Generator):
        self.history, self.random = history, random
        self.recorder, self.mine = history.recorder, history.recorder.mine
        self.session: Session = history.sessions[0]
        self.streams: dict[Session, Any] = {}

    def act(self) -> None:
        """One operation on anything. What is said must be documented for it."""
        weights = self.ALONE | (self.TOGETHER if self.history.batches else {})
        odds = np.array([*weights.values()]) / sum(weights.values())
        name = self.random.choice([*weights], p=odds)
        self.session = self.pick(self.history.sessions)
        self.mine.effects, self.mine.asked = [], ()
        said = ""
        try:
            getattr(self, f"do_{name}")()
        except (InputError, SessionError) as error:
            said = next((s for s in DOCUMENTED if s in str(error)), None)
            assert said is not None and DOCUMENTED[said] in ("any", name), f"{name}: {error}"
        with self.history.counting:
            key = f"{name}: {said}" if said else str(name)
            self.history.done[key] = self.history.done.get(key, 0) + 1

    def pick(self, choices):
        return choices[self.random.integers(len(choices))]

    def prompt(self) -> str:
        return self.pick(PROMPTS)

    def took(self, frames: np.ndarray) -> None:
        """Frames that were handed over to this thread."""
        effects = [e for e in self.mine.effects if e.kind == "hand over"]
        if len(frames):
            effects[-1].frames = frames

    def do_next(self):
        self.took(self.session.next_chunk())

    def do_stream(self):
        """One step of a stream of this thread."""
        stream = self.streams.pop(self.session, None)
        if stream is None:
            events = [Event(0.1, "cut", self.prompt()), Event(0.6, "switch", self.prompt(), "keep")]
            seconds = self.random.choice([0.4, 0.9, 1.6])
            events = [event for event in events if event.time_s < seconds]
            lookahead = int(self.random.integers(2))
            stream = self.session.stream(float(seconds), events=events, lookahead=lookahead)
        frames = next(stream, None)
        if frames is not None:
            self.took(frames)
            self.streams[self.session] = stream

    def do_all(self):
        self.took(self.session.hand_over_all())

    def do_switch(self):
        mode, how = self.pick(WAYS)
        self.mine.asked = (how,)
        self.history.receipts.append(self.session.switch(self.prompt(), mode, how=how))

    def do_cut(self):
        self.history.receipts.append(self.session.cut(self.prompt()))

    def do_rewind(self):
        chunks = int(self.random.integers(1, 3))
        self.mine.asked = (chunks,)
        self.session.rewind(chunks)

    def do_adapt(self):
        self.session.adapt(None)

    def do_prepare(self):
        self.session.prepare("recache", "reset")

    def do_fork(self):
        seed = self.pick([None, 7])
        fork = self.session.fork(seed)
        effect = Effect("fork", self.session, (fork, seed))
        effect.after = {fork: fork.progress}
        self.history.forks.append((self.session, fork.progress, effect))
        self.history.sessions.append(fork)

    def do_save(self):
        folder = self.history.folder / f"{self.random.integers(2**40)}"
        self.session.save(folder)
        effect = Effect("save", self.session, (folder,))
        self.history.saves.append((self.session, self.mine.saved, effect))

    def do_look(self):
        session = self.session
        assert session.frame >= 0 and session.prompt in PROMPTS
        assert session.last is None or session.last.frame >= 0
        assert session.closed or session.state.rollout.frame.shape == (1,)

    def do_close(self):
        self.session.close()
        assert self.session.closed

    def do_add(self):
        self.pick(self.history.batches).add(self.session)

    def do_remove(self):
        self.pick(self.history.batches).remove(self.session)

    def do_members(self):
        batch = self.pick(self.history.batches)
        assert len([*batch]) <= batch.size and 0 <= len(batch) <= batch.size
        assert (self.session in batch) in (False, True)

    def do_chunks(self):
        frames = self.pick(self.history.batches).next_chunks()
        effects = {e.what: e for e in self.mine.effects if e.kind == "hand over"}
        assert frames.keys() == effects.keys()
        for session, chunk in frames.items():
            effects[session].frames = chunk
