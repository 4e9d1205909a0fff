"""A video that is alive: forks, rewinding, streams, images and clips, another device for decoding.

Bit-exact means: uint8 frames, and every leaf of the state. The same seed and the same changes make
the same frames, however they are asked for.
"""

import asyncio
import contextlib
import dataclasses
import fractions
import functools
import gzip
import json
import threading

import av
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import streams

import longlive_jax
from longlive_jax import rollout, timeline
from longlive_jax.bench import CompileClock
from longlive_jax.config import Recache, TAEConfig
from longlive_jax.errors import InputError, SessionError
from longlive_jax.events import CUT_PREFIX, Event
from longlive_jax.progress import PendingChunk
from longlive_jax.undo import Undo
from longlive_jax.vae import vae as coder
from longlive_jax.vae.tae import TAE

RED = "a red circle moves left over a black background"
BLUE = "a blue circle moves left over a black background"
GREEN = "a green square bounces over a grey background"
ELSEWHERE = jax.devices()[1]  # of the CPU devices that the tests have


@functools.cache
def loaded():
    return longlive_jax.load("tiny")


@pytest.fixture
def tiny():
    return loaded()


def frames_of(session, chunks):
    return np.concatenate([session.next_chunk() for _ in range(chunks)])


def leaves(session):
    """Every number of the state, copied: what is donated may be written over."""
    state = session.state
    memory = dataclasses.replace(state.rollout, key=jax.random.key_data(state.rollout.key))
    paths, _ = jax.tree.flatten_with_path((memory, state.carry, state.text))
    return {jax.tree_util.keystr(path): np.array(x) for path, x in paths}


def assert_same_leaves(one, two):
    assert one.keys() == two.keys()
    for path, x in one.items():
        np.testing.assert_array_equal(x, two[path], err_msg=path)


def assert_same(one, two):
    """Two sessions are at the same place, with the same memory."""
    assert one.progress.position == two.progress.position and one.frame == two.frame
    assert_same_leaves(leaves(one), leaves(two))


def assert_go_on_the_same(one, two, chunks=2):
    """Two sessions are the same, and so is what comes of them. Both move on."""
    assert_same(one, two)
    for _ in range(chunks):
        np.testing.assert_array_equal(one.next_chunk(), two.next_chunk())
        assert dataclasses.replace(one.last, denoise_s=two.last.denoise_s) == two.last
    assert_same(one, two)


def begun(model, chunks=2, **options):
    session = model.session(RED, seed=3, steps=1, **options)
    for _ in range(chunks):
        session.next_chunk()
    return session


def picture():
    """A blue disc on black."""
    y, x = np.mgrid[:64, :64]
    disc = (x - 40) ** 2 + (y - 24) ** 2 < 100
    return (disc[..., None] * np.array([40, 80, 220])).astype(np.uint8)


def switched(session):
    session.switch(BLUE)


def cut(session):
    session.cut(GREEN)


def cut_and_switched(session):
    session.cut(GREEN)
    session.switch(BLUE, "keep")


def past_a_cut(session):
    session.cut(GREEN)
    session.next_chunk()


def under_way(session):
    """Two chunks are made, one is handed over; a change begins with the other one."""
    session.switch(GREEN, "keep")
    session.begin_chunk()
    session.switch(BLUE, "keep")
    session.begin_chunk()
    session.next_chunk()


def half_handed_over(session):
    """A part of one chunk is handed over, nothing of the one after, and a cut is to come."""
    for _ in session.stream(0.25):
        pass
    session.begin_chunk()
    session.cut(GREEN)


SITUATIONS = {
    "nothing made": lambda model: begun(model, 0),
    "an image, nothing made": lambda model: begun(model, 0, image=picture()),
    "a full window": lambda model: begun(model, 6),
}


def in_situation(change):
    def make(model):
        session = begun(model, history=2)
        change(session)
        return session

    return make


CHANGES = (switched, cut, cut_and_switched, past_a_cut, under_way, half_handed_over)
SITUATIONS |= {change.__name__: in_situation(change) for change in CHANGES}
every_situation = pytest.mark.parametrize("situation", SITUATIONS.values(), ids=SITUATIONS)


# Forks.


@every_situation
def test_a_fork_goes_on_as_the_session_does(tiny, situation):
    session = situation(tiny)
    fork = session.fork()
    assert fork.prompt == session.prompt and fork.seed == session.seed
    assert_go_on_the_same(fork, session, chunks=3)
    for other in (fork, session):
        if other.progress.past.chunks:
            other.rewind(2)
    assert_go_on_the_same(fork, session)


def test_a_fork_with_a_seed_is_another_video(tiny):
    session = begun(tiny, history=1)
    one, two, same = session.fork(7), session.fork(7), session.fork()
    assert (one.seed, two.seed, same.seed) == (7, 7, 3)
    assert_go_on_the_same(one, two)
    first = session.next_chunk()
    np.testing.assert_array_equal(first, same.next_chunk())
    other = session.fork(7)
    other.rewind()  # also of a chunk that the other seed made: it is made anew
    again = other.next_chunk()
    assert (again != first).any()
    np.testing.assert_array_equal(again, begun(tiny).fork(7).next_chunk())


@pytest.mark.parametrize("mode", ["recache", "keep", "reset"])
def test_forks_do_not_touch_each_other(tiny, mode):
    session, untouched = (begun(tiny, 5, history=2) for _ in range(2))
    fork, before = session.fork(), leaves(session)
    fork.switch(BLUE, mode)
    fork.next_chunk()
    fork.cut(GREEN)
    fork.next_chunk()
    fork.rewind(2)
    fork.next_chunk()
    fork.close()
    assert_same_leaves(leaves(session), before)
    assert_go_on_the_same(session, untouched)
    for other in (session, untouched):
        other.rewind(2)
    assert_go_on_the_same(session, untouched)


# Switches and cuts.


@pytest.mark.parametrize("situation", [*SITUATIONS][:-2] + ["half_handed_over"])
def test_keeping_the_same_prompt_changes_nothing(tiny, situation):
    session = SITUATIONS[situation](tiny)
    other = session.fork()
    receipt = other.switch(other.prompt, "keep")
    assert other.progress.position.changes == (*session.progress.position.changes, receipt)
    with other._held() as place:
        plain = dataclasses.replace(
            other.progress.position, changes=session.progress.position.changes
        )
        place.commit(dataclasses.replace(other.progress, position=plain))
    assert_go_on_the_same(session, other, chunks=3)


def test_a_shot_opens_with_the_prefix_once(tiny):
    """Whatever is changed before its first chunk, and it is one shot."""
    session = begun(tiny)
    session.cut(BLUE)
    session.cut(CUT_PREFIX + RED)
    session.switch(GREEN, "keep")
    assert session.prompt == GREEN and session.progress.position.whole == CUT_PREFIX + GREEN
    assert session.state.rollout.shot.tolist() == [1]
    other = begun(tiny)
    receipt = other.switch(CUT_PREFIX + GREEN)
    assert (receipt.kind, receipt.prompt, receipt.frame) == ("cut", GREEN, 21)
    assert_same_leaves(leaves(session), leaves(other))
    np.testing.assert_array_equal(session.next_chunk(), other.next_chunk())
    assert session.progress.position.whole == GREEN
    said, plain = (tiny.prompt_kv([prompt]) for prompt in (CUT_PREFIX + GREEN, GREEN))
    assert (said.k != plain.k).any()
    np.testing.assert_array_equal(session.state.text.k, plain.k)


def test_a_session_has_a_note_for_each_prompt(tiny):
    """Also of switches and cuts, whose prefix takes tokens; one note where a prompt comes again."""
    note, long = tiny.prompt_note, ", then ".join([RED] * 13)
    session = tiny.session("a fluffy circle", seed=3, steps=1)
    assert session.notes == (note("a fluffy circle"),) and "fluffy" in session.notes[0]
    session.next_chunk()
    session.switch(BLUE)
    assert len(session.notes) == 1
    session.switch(long, "keep")
    assert session.notes[1:] == (note(long),)
    session.cut("red " * 38)  # 41 words with the prefix
    assert "only 39 of its 41 tokens" in session.notes[2]
    session.next_chunk()
    session.switch(long, "keep")
    session.switch("a fluffy circle", "keep")
    assert len(session.notes) == 3
    assert session.fork().notes == session.notes
    assert not tiny.session(RED, steps=1).notes


def test_preparing_changes_nothing(tiny):
    session = begun(tiny, 6)
    before = leaves(session)
    assert session.prepare("recache", "reset") is session
    assert_same_leaves(leaves(session), before)


def test_what_cannot_be_asked_for_changes_nothing(tiny):
    session = begun(tiny, history=1)
    other = session.fork()
    for ask in (
        lambda: session.switch("  "),
        lambda: session.cut(CUT_PREFIX),
        lambda: session.switch(CUT_PREFIX),
        lambda: session.switch(BLUE, "forget"),
        lambda: session.rewind(0),
        lambda: session.stream(0),
        lambda: session.stream(1, lookahead=2),
        lambda: session.stream(1, events=[Event(1.5, "cut", BLUE)]),
        lambda: tiny.session(" "),
        lambda: tiny.session(RED, history=-1),
    ):
        with pytest.raises(InputError):
            ask()
    assert_go_on_the_same(session, other)


def test_a_closed_session_does_nothing(tiny):
    session = begun(tiny, history=1)
    stream = session.stream(5)
    next(stream)
    unasked = session.stream(5)
    session.close()
    session.close()
    assert session.closed
    for ask in (
        session.next_chunk,
        session.stream,
        session.begin_chunk,
        session.hand_over_all,
        session.prepare,
        session.fork,
        session.rewind,
        lambda: session.switch(BLUE),
        lambda: session.switch(CUT_PREFIX + BLUE),
        lambda: session.cut(BLUE),
        lambda: session.save("nowhere"),
        lambda: next(stream),
        lambda: next(unasked),
    ):
        with pytest.raises(SessionError, match="the session is closed"):
            ask()


# Rewinding.

FORMS = [Recache("causal", "first"), Recache("bidirectional", "keep"), Recache("causal", "window")]
SCRIPT = [
    *["next"] * 5,  # the window is full, and frames have left it
    *[change for how in FORMS for change in (lambda s, how=how: s.switch(BLUE, how=how), "next")],
    lambda s: s.switch(RED, "keep"),
    "next",
    cut,
    "next",
    "next",
    lambda s: s.switch(BLUE, how=FORMS[2]),
    lambda s: s.switch(RED, "reset"),
    "next",
    cut_and_switched,
    "next",
]


def acted(session, script):
    """Does what a script says; the chunks, and forks right after each."""
    chunks, places = [], []
    for act in script:
        if act == "next":
            chunks.append(session.next_chunk())
            places.append(session.fork())
        else:
            act(session)
    return chunks, places


def after(script, chunks):
    """What comes after so many chunks of a script."""
    nexts = [i for i, act in enumerate(script) if act == "next"]
    return script[nexts[chunks - 1] + 1 if chunks else 0 :]


@pytest.mark.parametrize("options", [{}, {"image": picture()}], ids=["prompt", "image"])
def test_what_is_rewound_comes_again(tiny, options):
    """Over every kind of change, back to the first chunk. Forks share what takes them back."""
    total = SCRIPT.count("next")
    session = tiny.session(RED, seed=5, steps=1, history=total, **options)
    start = session.fork()
    chunks, places = acted(session, SCRIPT)
    for back in range(1, total + 1):
        kept = total - back
        other = session.fork()
        other.rewind(back)
        assert_same(other, places[kept - 1] if kept else start)
        again, _ = acted(other, after(SCRIPT, kept)[: 8 if kept else None])
        for chunk, expected in zip(again, chunks[kept:], strict=False):
            np.testing.assert_array_equal(chunk, expected, err_msg=f"{back} taken back")
    assert len(again) == total
    assert_same(other, session)


def test_changes_since_the_last_chunk_are_taken_back_with_it(tiny):
    session = begun(tiny, 1, history=3)
    before = session.fork()
    chunk = session.next_chunk()
    session.switch(BLUE)
    session.switch(GREEN, "reset")
    session.cut(RED)
    for other in (session.fork(), session):  # they share what takes them back
        other.rewind()
        assert_same(other, before)
        np.testing.assert_array_equal(other.next_chunk(), chunk)


@pytest.mark.parametrize("change", [under_way, half_handed_over])
def test_chunks_under_way_are_taken_back_too(tiny, change):
    session = begun(tiny, 1, history=4)
    before = session.fork()
    frames = session.next_chunk()
    change(session)
    session.rewind(2)
    assert_same(session, before)
    np.testing.assert_array_equal(session.next_chunk(), frames)


@pytest.mark.parametrize("history", [0, 2])
def test_rewinding_too_far_changes_nothing(tiny, history):
    session = begun(tiny, 3, history=history)
    session.switch(BLUE, "keep")
    session.begin_chunk()
    session.cut(GREEN)
    other = session.fork()
    kept = max(0, history - 1)
    with pytest.raises(SessionError, match=rf"cannot rewind {kept + 1} chunks, {kept} are kept"):
        session.rewind(kept + 1)
    assert session.progress.past.available == history
    assert_go_on_the_same(session, other)


def test_nothing_is_compiled_after_rewinding(tiny):
    """What is bound to a device, and what is not, are two programs."""
    session = begun(tiny, 3, history=3)
    session.switch(BLUE)
    session.next_chunk()
    bound = [x.committed for x in jax.tree.leaves(session.state)]
    session.fork().rewind(2)
    with CompileClock() as clock:
        session.rewind(2)
        assert [x.committed for x in jax.tree.leaves(session.state)] == bound
        session.switch(GREEN)
        session.next_chunk()
    assert clock.programs == 0


# Streams.


def test_streams_follow_each_other_without_a_gap(tiny):
    """What is cut off at the end of one comes first in the next."""
    whole, session, made = frames_of(begun(tiny, 0), 6), begun(tiny, 0), []
    for seconds, lookahead in [(0.7, 0), (0.2, 1), (0.06, 0), (1.3, 1), (0.75, 1), (0.4, 0)]:
        before = session.frame
        for frames in session.stream(seconds, lookahead=lookahead):
            assert session.last.frame == sum(map(len, made))
            made.append(frames)
            assert session.frame == sum(map(len, made))
        assert session.frame == before + round(seconds * 16)
    made = np.concatenate(made)
    np.testing.assert_array_equal(made, whole[: len(made)])


TIMES = st.one_of(
    st.sampled_from([0.0, 9 / 16, 9 / 16 + 1e-9, 10 / 16, 11 / 16, 21 / 16, 33 / 16, 2.4]),
    st.floats(0, 2.4),
)
KINDS = st.sampled_from([("switch", "recache"), ("switch", "keep"), ("switch", "reset"), ("cut",)])


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(
    st.lists(st.tuples(TIMES, KINDS), max_size=4, unique_by=lambda event: event[0]),
    st.sampled_from([0.0, 0.7]),
)
def test_events_begin_with_the_first_chunk_at_or_after_their_time(events, before):
    """Counted from where the stream begins, also in the middle of a chunk, and the same with a
    chunk ahead.
    """
    model, made, first = loaded(), {}, round(before * 16)
    events = [
        Event(time, kind[0], (BLUE, GREEN)[i % 2], *kind[1:])
        for i, (time, kind) in enumerate(events)
    ]
    starts = [start - first for start in (0, 9, 21, 33, 45) if start >= first]
    for lookahead in (0, 1):
        session = begun(model, 0)
        if before:
            list(session.stream(before))
        chunks, begins = [], {}
        for chunk in session.stream(2.5, events=events, lookahead=lookahead):
            chunks.append(chunk)
            begins |= {change.frame: session.last.prompt for change in session.last.changes}
        made[lookahead] = np.concatenate(chunks)
        expected = {}
        for event in sorted(events, key=lambda event: event.time_s):
            due = [start for start in starts if start >= event.time_s * 16]
            expected |= {due[0] + first: event.prompt} if due and due[0] < 40 else {}
        assert begins == expected
    assert len(made[0]) == 40
    np.testing.assert_array_equal(made[0], made[1])


def test_a_stream_that_is_left_loses_nothing(tiny):
    whole, session = frames_of(begun(tiny, 0), 6), begun(tiny, 0)
    made = []
    for chunk in session.stream(lookahead=1):
        made.append(chunk)
        if len(made) == 2:
            break
    assert session.frame == 21 and session.progress.position.latents == 9
    made.append(session.next_chunk())
    made.append(next(session.stream(0.25, lookahead=1)))
    made += [next(session.stream(lookahead=1)) for _ in range(2)]
    made = np.concatenate(made)
    assert len(made) == 57
    np.testing.assert_array_equal(made, whole[: len(made)])


def test_a_switch_is_never_late_without_lookahead(tiny):
    """And a chunk late with it, as its receipt says."""
    for lookahead, frame in ((0, 21), (1, 33)):
        session = begun(tiny, 0)
        stream = session.stream(lookahead=lookahead)
        next(stream), next(stream)
        receipt = session.switch(BLUE, "keep")
        assert receipt.frame == frame and receipt.seconds(16) == frame / 16
        for _ in range(lookahead):
            next(stream)
            assert session.last.prompt == RED and not session.last.changes
        next(stream)
        assert session.last.changes == (receipt,) and session.last.frame == frame


def test_an_async_stream_is_the_same_stream(tiny):
    """With the same events, and with other tasks that go on while a chunk is waited for."""
    events = [Event(0.5, "cut", GREEN), Event(1.2, "switch", BLUE)]
    session, twin = begun(tiny, 1), begun(tiny, 1)

    async def follow():
        ticks = asyncio.create_task(count())
        made = []
        async for chunk in session.astream(2.3, events=events, lookahead=1):
            made.append((chunk, session.last.changes))
        ticks.cancel()
        return made

    counted = []

    async def count():
        while True:
            counted.append(session.frame)
            await asyncio.sleep(0)

    made = asyncio.run(follow())
    for chunk in twin.stream(2.3, events=events, lookahead=1):
        frames, changes = made.pop(0)
        np.testing.assert_array_equal(frames, chunk)
        assert changes == twin.last.changes
    assert not made and len(set(counted)) > 3
    assert_go_on_the_same(session, twin)
    for wrong in (dict(seconds=0), dict(lookahead=2)):
        with pytest.raises(InputError):
            session.astream(**wrong)


def test_a_cancelled_async_stream_loses_nothing(tiny, monkeypatch):
    """Neither what it waits for, nor what it has begun ahead."""
    session, twin = begun(tiny, 1), begun(tiny, 1)
    waiting, wait = threading.Event(), PendingChunk.wait

    def noted(chunk):
        waiting.set()
        return wait(chunk)

    async def follow(made):
        async for chunk in session.astream(lookahead=1):
            made.append(chunk)
            waiting.clear()

    async def cancel():
        made = []
        task = asyncio.create_task(follow(made))
        while not made:
            await asyncio.sleep(0)
        await asyncio.to_thread(waiting.wait, 60)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return made

    monkeypatch.setattr(PendingChunk, "wait", noted)
    made = asyncio.run(cancel())
    made.append(session.switch(BLUE, "keep") and session.next_chunk())
    np.testing.assert_array_equal(np.concatenate(made), frames_of(twin, len(made)))
    assert not session.closed

    async def leave():
        async for chunk in session.astream():
            return chunk

    while session.progress.undelivered:  # what was begun before the switch
        np.testing.assert_array_equal(session.next_chunk(), twin.next_chunk())
    twin.switch(BLUE, "keep")
    np.testing.assert_array_equal(asyncio.run(leave()), twin.next_chunk())
    assert session.prompt == BLUE and session.last.prompt == BLUE


def test_a_session_as_a_context_is_closed_at_its_end(tiny):
    with tiny.session(RED, steps=1) as session:
        assert len(session.next_chunk()) == 9 and not session.closed
    assert session.closed and session.frame == 9
    with pytest.raises(ZeroDivisionError), tiny.session(RED, steps=1) as other:
        assert 1 / 0
    assert other.closed
    with pytest.raises(SessionError, match="the session is closed"), session:
        pass


def test_what_is_interrupted_before_devices_are_asked_changes_nothing(tiny, monkeypatch):
    session = begun(tiny, 2, history=2)
    session.cut(GREEN)
    session.begin_chunk()
    session.cut(RED)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    places = {"prompt": (type(tiny), "prompt_kv"), "noise": (rollout, "noise")}
    places |= {"labels": (Undo, "of_labels"), "slots": (Undo, "of_chunk")}
    for act, places_of in (
        (lambda session: session.switch(BLUE, "keep"), ("prompt", "labels")),
        (cut, ("prompt", "labels")),
        (lambda session: session.rewind(), ("prompt",)),
        (lambda session: session.begin_chunk(), ("noise", "slots")),
        (lambda session: session.adapt(None), ("prompt",)),
    ):
        for place in places_of:
            trial = session.fork()
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(*places[place], interrupted)
                act(trial)
            assert_same(trial, session)
            trial.rewind()


def test_what_fails_while_a_chunk_is_waited_for_loses_no_frames(tiny, monkeypatch):
    session, other = begun(tiny, 1), begun(tiny, 1)
    wait = PendingChunk.wait

    def fail(chunk):
        wait(chunk)
        raise KeyboardInterrupt

    for ask in (session.next_chunk, session.hand_over_all, lambda: next(session.stream())):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(PendingChunk, "wait", fail)
            ask()
    assert session.frame == other.frame
    np.testing.assert_array_equal(session.hand_over_all(), other.next_chunk())
    assert session.hand_over_all().shape == (0, 64, 64, 3)
    assert_go_on_the_same(session, other)


@pytest.fixture
def made(monkeypatch):
    """The latents of every chunk that is made from now on."""
    latents, generate = [], rollout.generate

    def counted(*arguments, **options):
        memory, chunk = generate(*arguments, **options)
        latents.append(chunk)
        return memory, chunk

    monkeypatch.setattr(rollout, "generate", counted)
    return latents


def test_nothing_is_made_that_nobody_asked_for(tiny, made, tmp_path):
    session = begun(tiny, 0, history=3)
    session.prepare("recache", "reset")
    stream = session.stream(1.0)
    session.stream(2.0, lookahead=1)
    assert len(made) == 0
    next(stream)
    assert len(made) == 1
    assert [len(chunk) for chunk in stream] == [7] and len(made) == 2
    list(session.stream(5 / 16, lookahead=1))  # what the last one left
    assert len(made) == 2 and session.frame == 21
    assert [len(chunk) for chunk in session.stream(1.0, lookahead=1)] == [12, 4]
    assert len(made) == 4
    next(session.stream(lookahead=1))  # of the last chunk, 8 frames; the next is begun
    assert len(made) == 5 and session.frame == 45
    session.switch(BLUE)
    session.cut(GREEN)
    session.fork(1)
    session.save(tmp_path / "session")
    longlive_jax.restore(tmp_path / "session", model=tiny)
    assert len(made) == 5
    session.next_chunk()
    assert len(made) == 5
    session.next_chunk()
    assert len(made) == 6
    session.rewind(2)
    assert len(made) == 6


# Any sequence of them.


@dataclasses.dataclass
class Slots:
    """What the memory holds, in a list: (frame, chunk, shot), in order of time."""

    window: int
    sink: int
    shot_sink: int
    cache: list = dataclasses.field(default_factory=list)
    held: list = dataclasses.field(default_factory=list)
    frame: int = 0
    chunk: int = 0
    shot: int = 0
    opens: bool = False

    def make(self):
        new = [(self.frame + i, self.chunk, self.shot) for i in range(3)]
        for table, room in (
            (self.cache, self.window),
            (self.held, self.window + self.sink + self.shot_sink),
        ):
            sinks = table[: self.sink]
            if table:
                sinks = sinks + [x for x in table if x[2] == table[-1][2]][: self.shot_sink]
            for old in [x for x in table if x not in sinks][: max(0, len(table) + 3 - room)]:
                table.remove(old)
            table += new
        self.frame, self.chunk, self.opens = self.frame + 3, self.chunk + 1, False

    def cut(self):
        self.shot += bool(self.frame and not self.opens)
        self.opens = self.frame > 0

    def switch(self, mode, sinks):
        if mode == "reset":
            self.cache, self.held = [], []
        if mode == "recache" and sinks == "window":
            self.cache, self.held = self.held[-self.window :], self.held[-self.window :]

    def copy(self):
        return dataclasses.replace(self, cache=[*self.cache], held=[*self.held])


def assert_holds(session, expected, latents):
    """The tables say what the list says, and the latents of a frame are those that were made."""
    memory = session.state.rollout
    for table, held in ((memory.cache, expected.cache), (memory.held, expected.held)):
        columns = (np.asarray(x[0]).tolist() for x in (table.frame, table.chunk, table.shot))
        rows = zip(*columns, strict=True)
        assert sorted(row for row in rows if row[0] >= 0) == held
    counters = [int(x[0]) for x in (memory.frame, memory.chunk, memory.shot)]
    assert counters == [expected.frame, expected.chunk, expected.shot]
    for slot, frame in enumerate(np.asarray(memory.held.frame[0]).tolist()):
        if frame >= 0:
            made = latents[frame // 3][0, frame % 3]
            np.testing.assert_array_equal(memory.held.latents[0, slot], made)


HOWS = st.sampled_from(FORMS)
ACTS = st.one_of(
    st.just(("next",)),
    st.just(("begin",)),
    st.tuples(st.just("switch"), st.sampled_from(["recache", "keep", "reset"]), HOWS),
    st.just(("cut",)),
    st.tuples(st.just("rewind"), st.integers(1, 4)),
    st.just(("fork",)),
    st.just(("save",)),
)


class Player:
    """Does what it is told to a session, and to a list."""

    def __init__(self, model, made, folder):
        self.model, self.made, self.folder = model, made, folder
        self.session = model.session(RED, seed=9, steps=1, history=3)
        stream = model.config.stream
        self.slots = Slots(stream.window, stream.sink, stream.shot_sink)
        self.chunks, self.latents, self.ahead = [], [], []
        self.done, self.kept = [], 0  # what was done, and how many chunks can be taken back
        self.places = [(self.slots.copy(), 0, RED)]  # right after each chunk was made

    def first_frame(self):
        return timeline.first_frame(self.model.config, self.slots.frame)

    def begin(self):
        """A chunk is on its way, if none is."""
        if not self.ahead:
            changes = self.session.progress.position.changes
            assert all(change.frame == self.first_frame() for change in changes)
            self.ahead.append((self.slots.chunk, self.first_frame(), self.session.prompt, changes))
            self.session.begin_chunk()
            self.latents.append(self.made[-1])
            self.done.append(("next",))
            self.kept = min(3, self.kept + 1)
            self.slots.make()
            self.places.append((self.slots.copy(), len(self.done), self.session.prompt))

    def next(self):
        self.begin()
        last = self.ahead.pop()
        assert self.session.frame == last[1] == sum(map(len, self.chunks))
        self.chunks.append(self.session.next_chunk())
        assert len(self.chunks[-1]) == (12 if last[0] else 9)
        assert dataclasses.astuple(self.session.last)[:3] == last[:3]
        assert self.session.last.changes == last[3]

    def switch(self, mode, how):
        """Nothing changes before the frame that the receipt names, and all from there on."""
        prompt = RED if self.session.prompt == BLUE else BLUE
        other = self.session.fork()
        receipt = self.session.switch(prompt, mode, how=how)
        self.slots.switch(mode if self.slots.frame else "keep", how.sinks)
        self.done.append(("switch", prompt, mode, how))
        assert receipt.frame == self.first_frame()
        if mode == "recache":
            this = self.session.fork()
            while this.frame < receipt.frame:
                np.testing.assert_array_equal(this.next_chunk(), other.next_chunk())
            assert this.frame == receipt.frame
            assert (this.next_chunk() != other.next_chunk()).any((1, 2, 3)).all()

    def cut(self):
        self.session.cut(GREEN)
        self.slots.cut()
        self.done.append(("cut", GREEN))

    def rewind(self, count):
        back = count + len(self.ahead)
        if back > self.kept:
            with pytest.raises(SessionError):
                self.session.rewind(count)
            return
        self.session.rewind(count)
        del self.chunks[-count:], self.latents[-back:], self.places[-back:]
        self.ahead.clear()
        self.kept -= back
        slots, done, prompt = self.places[-1]
        self.slots = slots.copy()
        del self.done[done:]
        assert self.session.prompt == prompt

    def fork(self):
        self.session = self.session.fork()

    def save(self):
        self.session.save(self.folder)
        self.session, self.kept = longlive_jax.restore(self.folder, model=self.model), 0

    def replay(self):
        """From the seed, what was done and not taken back."""
        session, chunks = self.model.session(RED, seed=9, steps=1), []
        for name, *what in self.done:
            if name == "next":
                chunks.append(session.next_chunk())
            elif name == "cut":
                session.cut(*what)
            else:
                prompt, mode, how = what
                session.switch(prompt, mode, how=how)
        assert len(chunks) == len(self.chunks) + len(self.ahead)
        for chunk, expected in zip(chunks, self.chunks, strict=False):
            np.testing.assert_array_equal(chunk, expected)
        assert session.progress.position == self.session.progress.position
        assert_same_leaves(leaves(session), leaves(self.session))


def test_any_sequence_of_acts(tiny, tmp_path_factory, monkeypatch):
    """Sinks of both kinds and a window that they nearly fill."""
    model = tiny.streaming(window=9, sink=2, shot_sink=3)
    made, generate = [], rollout.generate

    def noted(*arguments, **options):
        memory, latents = generate(*arguments, **options)
        made.append(latents)
        return memory, latents

    monkeypatch.setattr(rollout, "generate", noted)
    cuts = [("cut",), ("next",), ("begin",), ("cut",), ("next",), ("next",)]
    window = [("switch", "recache", FORMS[2]), ("next",), ("begin",), ("save",), ("next",)]

    @hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
    @hypothesis.given(st.lists(ACTS, min_size=4, max_size=12))
    @hypothesis.example([("next",)] * 4 + cuts + window)
    @hypothesis.example([("next",)] * 5 + window[:3] + [("rewind", 2), ("fork",), ("next",)])
    def play(acts):
        player = Player(model, made, tmp_path_factory.mktemp("acts") / "session")
        for name, *what in acts:
            getattr(player, name)(*what)
            assert_holds(player.session, player.slots, player.latents)
        player.replay()

    play()


# Another device for decoding.


def where(session):
    """The devices of the carry, and those of everything else."""
    state = session.state
    return tuple(
        set().union(*(x.devices() for x in jax.tree.leaves(part)))
        for part in (state.carry, (state.rollout, state.text))
    )


def test_decoding_elsewhere_makes_the_same_frames(tiny, tmp_path):
    """Bit-exact on devices of one kind. The carry lives there, whatever becomes of the session."""
    here, there = (begun(tiny, history=3, vae_device=at) for at in (None, ELSEWHERE))
    home = where(here)[1]
    for session in (here, there):
        session.switch(BLUE)
    fork = there.fork()
    assert jax.tree.leaves(fork._vae)[0] is jax.tree.leaves(there._vae)[0], "one copy is enough"
    there.save(tmp_path / "session")
    restored = longlive_jax.restore(tmp_path / "session", model=tiny, vae_device=ELSEWHERE)
    assert_same(here, there)
    for session in (there, fork, restored):
        assert where(session) == ({ELSEWHERE}, home)
    expected = frames_of(here, 3)
    for session in (there, fork, restored):
        np.testing.assert_array_equal(frames_of(session, 3), expected)
        assert where(session) == ({ELSEWHERE}, home)
    for session in (there, fork):  # they share what takes them back
        session.rewind(3)
        assert where(session) == ({ELSEWHERE}, home)
        session.switch(BLUE)
        np.testing.assert_array_equal(frames_of(session, 3), expected)
    again = longlive_jax.restore(tmp_path / "session", model=tiny)
    assert where(again) == (home, home)
    np.testing.assert_array_equal(frames_of(again, 3), expected)


@pytest.mark.parametrize("history", [0, 4])
def test_a_chunk_is_decoded_while_the_next_one_is_denoised(tiny, tmp_path, history):
    """In a trace of the operations on all devices, some of decoding run at the same time as some of
    denoising. On one chunk they follow each other, so these belong to two. What `rewind` needs is
    put aside without waiting.
    """
    session = tiny.session(RED, vae_device=ELSEWHERE, history=history)
    stream = session.stream(lookahead=1)
    for _ in range(4):  # nothing is compiled after that
        next(stream)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(tmp_path), profiler_options=options):
        for _ in range(6):
            next(stream)
    decoding, denoising = (spans(tmp_path, name) for name in ("jit_decode", "jit_generate"))
    assert len(decoding) and len(denoising)
    starts, ends = decoding[:, :1], decoding[:, 1:]
    together = (starts < denoising[:, 1]) & (denoising[:, 0] < ends)
    assert together.any()


def spans(folder, program):
    """Begin and end of every operation of a program that a trace has, in microseconds. Of the files
    of a trace this is the one that every version of JAX can read.
    """
    (path,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    found = [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("args", {}).get("hlo_module") == program
    ]
    return np.array(found).reshape(-1, 2)


# Images and clips.


def levels(one, two):
    """The largest difference, in levels of 255."""
    assert one.shape == two.shape
    return np.abs(one.astype(int) - two).max()


encode, decode = streams.jit(coder.encode), streams.jit(coder.decode)


def encoded(model, frames):
    return encode(model.vae, jnp.asarray(frames[None], jnp.float32) / 127.5 - 1)


def decoded(model, latents):
    return np.round((np.asarray(decode(model.vae, latents)[0]) + 1) * 127.5)


def held(session):
    """The latents that are held, in order of time."""
    table = session.state.rollout.held
    order = np.argsort(table.frame[0])[-int((table.frame[0] >= 0).sum()) :]
    return np.asarray(table.latents[0, order])


def test_a_video_begins_with_an_image(tiny, tmp_path):
    """Its latent is held clean: the first frame is what the VAE makes of the image."""
    image = picture()
    session = tiny.session(RED, seed=1, steps=1, image=image)
    first = session.next_chunk()
    assert len(first) == 9 and not session.notes
    latent = encoded(tiny, image[None])
    assert latent.shape[1] == 1
    np.testing.assert_allclose(held(session)[0], latent[0, 0], atol=1e-5)
    assert levels(first[0], decoded(tiny, latent)[0]) <= 1
    far = np.abs(first[0].astype(int) - image).mean()
    without = tiny.session(RED, seed=1, steps=1).next_chunk()
    assert 3 * far < np.abs(without[0].astype(int) - image).mean()
    assert (frames_of(session, 1) != without[:1]).any()

    path = tmp_path / "image.png"
    write_png(path, image)
    np.testing.assert_array_equal(
        tiny.session(RED, seed=1, steps=1, image=path).next_chunk(), first
    )
    wide = tiny.session(RED, steps=1, image=np.zeros((64, 96, 3), np.uint8))
    assert len(wide.notes) == 1


def write_png(path, pixels):
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    png = av.CodecContext.create("png", "w")
    png.width, png.height, png.pix_fmt = frame.width, frame.height, "rgb24"
    png.time_base = fractions.Fraction(1, 25)
    path.write_bytes(b"".join(bytes(packet) for packet in png.encode(frame) + png.encode(None)))


@pytest.mark.parametrize("extra", [0, 2])
def test_a_clip_is_continued(tiny, made, extra):
    """From its last frame on, as if it had been made here: the latents, their labels, and what the
    decoder remembers. What does not fill a chunk is left out at its start.
    """
    clip = frames_of(begun(tiny, 0), 3 + bool(extra))[-33 - extra :]
    made.clear()
    session = tiny.session(RED, seed=8, steps=1, video=clip)
    assert len(made) == 0 and len(session.notes) == bool(extra)
    position = session.progress.position
    assert (session.frame, position.chunk, position.latents) == (33, 3, 9)
    latents = encoded(tiny, clip[extra:])
    np.testing.assert_allclose(held(session), latents[0], atol=1e-4)
    memory = session.state.rollout
    assert sorted(memory.cache.frame[0].tolist())[3:] == list(range(9))
    assert (int(memory.frame[0]), int(memory.chunk[0])) == (9, 3)
    chunk = session.next_chunk()
    assert (session.last.index, session.last.frame, len(chunk)) == (3, 33, 12)
    whole = decoded(tiny, jnp.concatenate([latents, made[0]], 1))
    assert levels(chunk, whole[-12:]) <= 1
    assert np.abs(chunk[0].astype(int) - clip[-1]).mean() < 5


def test_pictures_and_clips_of_python_are_those_of_uint8(tiny):
    """The latents are the same to the bit, whatever the pictures come as."""
    image = picture()
    clear = np.concatenate([image, np.full_like(image[..., :1], 255)], -1)
    told = np.asarray(tiny.session(RED, steps=1, image=image).given)
    for same in (image / 255.0, jnp.asarray(image), clear):
        session = tiny.session(RED, steps=1, image=same)
        np.testing.assert_array_equal(session.given, told)
        assert not session.notes
    hidden = tiny.session(RED, steps=1, image=np.tile(clear // 2, (2, 1, 1)))
    assert hidden.notes == ("transparent parts made black, 64 rows cropped",)
    clip = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
    videos = (clip, [*(clip / 255.0)])
    latents = [held(tiny.session(RED, steps=1, video=video)) for video in videos]
    np.testing.assert_array_equal(*latents)


def test_a_video_begins_with_an_image_of_pillow(tiny):
    pil = parity.needed("PIL.Image")
    image = picture()
    sessions = [tiny.session(RED, steps=1, image=x) for x in (image, pil.fromarray(image))]
    np.testing.assert_array_equal(*(session.given for session in sessions))


def test_only_the_end_of_a_long_clip_is_continued(tiny):
    """Twice what a chunk attends to; the state is that after a clip of this length."""
    noise = np.random.default_rng(0).integers(0, 256, (130, 64, 64, 3), np.uint8)
    session = tiny.session(RED, seed=8, steps=1, video=noise)
    assert session.notes == ("only the last 5.812 s of its 8.125 s are used",)
    assert (session.frame, session.progress.position.latents) == (93, 24)
    short = tiny.session(RED, seed=8, steps=1, video=noise[-93:])
    assert short.notes == ()
    np.testing.assert_array_equal(held(session), held(short))


def test_pictures_that_cannot_be_used_are_refused(tiny, tmp_path):
    clip = np.zeros((9, 64, 64, 3), np.uint8)
    with pytest.raises(InputError, match="at least 9 frames at 16 FPS, this one has 8"):
        tiny.session(RED, video=clip[1:])
    with pytest.raises(InputError, match="not both"):
        tiny.session(RED, video=clip, image=clip[0])
    wide = clip.astype(np.int64)
    for options in ({"video": wide}, {"image": wide[0]}, {"video": clip[0]}):
        with pytest.raises(InputError, match="is uint8"):
            tiny.session(RED, **options)
    with pytest.raises(InputError, match="cannot read .*no such file"):
        tiny.session(RED, image=tmp_path / "none.png")
    cfg = TAEConfig(16, patch=2, encoder_dim=8, decoder_dims=(8, 8, 8, 8))
    blind = dataclasses.replace(tiny, vae=streams.randomly(lambda rngs: TAE(cfg, rngs=rngs)))
    with pytest.raises(InputError, match="whole clips only"):
        blind.session(RED, video=clip)
