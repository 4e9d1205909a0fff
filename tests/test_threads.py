"""Sessions and batches that several threads use at the same time."""

import collections
import contextlib
import queue
import sys
import threading
import time

import numpy as np
import pytest
from histories import PROMPTS, History, Recorder, Replay
from test_session import BLUE, ELSEWHERE, GREEN, RED, assert_same, begun, frames_of
from test_session import tiny as tiny  # a fixture

from longlive_jax import rollout
from longlive_jax.batch import Batch
from longlive_jax.errors import SessionError
from longlive_jax.progress import PendingChunk


@contextlib.contextmanager
def switching_often():
    """Threads take turns a hundred times as often as they do by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextlib.contextmanager
def in_thread(act):
    """`act` runs in a thread beside the block; what it returns or raises comes at the end."""
    found = queue.SimpleQueue()

    def run():
        try:
            found.put((act(), None))
        except BaseException as error:  # noqa: BLE001  # raised again below
            found.put((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    result = []
    yield result
    value, error = found.get(timeout=120)
    thread.join(60)
    if error is not None:
        raise error
    result.append(value)


# The faults that these tests began with.


def switches(session, count):
    """Switches at any moment; the receipts."""
    receipts = []
    for i in range(count):
        receipts.append(session.switch((BLUE, RED)[i % 2], "keep"))
        time.sleep(0.003 * (i % 5))
    return receipts


def prepared(session):
    """Nothing is compiled from here on."""
    other = session.fork()
    other.switch(BLUE, "keep")
    other.next_chunk()
    return session


def test_a_switch_beside_a_stream_is_not_lost(tiny):
    """Every receipt arrives with the frame that it names, and the video is the one that a single
    thread makes with these receipts.
    """
    session = prepared(begun(tiny, 1))
    twin, seen, made = session.fork(), [], []
    with switching_often(), in_thread(lambda: switches(session, 60)) as given:
        for chunk in session.stream(8.0):
            seen += session.last.changes
            made.append(chunk)
    session.next_chunk()
    seen += session.last.changes
    (receipts,) = given
    assert seen == receipts
    for receipt in receipts:
        while twin.frame < receipt.frame:
            np.testing.assert_array_equal(twin.next_chunk(), made.pop(0))
        assert twin.switch(receipt.prompt, receipt.mode) == receipt
    for chunk in made:
        np.testing.assert_array_equal(twin.next_chunk()[: len(chunk)], chunk)


def test_switches_beside_a_batch_are_not_lost(tiny):
    batch = Batch(tiny, 3, steps=1)
    sessions = [prepared(begun(tiny, 1)) for _ in range(2)]
    for session in sessions:
        batch.add(session)
    batch.next_chunks()
    seen = {session: [] for session in sessions}
    with contextlib.ExitStack() as stack:
        stack.enter_context(switching_often())
        given = {
            session: stack.enter_context(in_thread(lambda session=session: switches(session, 30)))
            for session in sessions
        }
        for _ in range(10):
            batch.next_chunks()
            for session in sessions:
                seen[session] += session.last.changes
    batch.next_chunks()
    for session in sessions:
        seen[session] += session.last.changes
        assert [seen[session]] == given[session]


# Waiting.


@pytest.fixture
def slow(monkeypatch):
    """Chunks arrive when they are let through; `slow.waits` is set once somebody waits for one."""

    class Gate:
        waits, open = threading.Event(), threading.Event()

    inner = PendingChunk.wait

    def wait(chunk):
        Gate.waits.set()
        assert Gate.open.wait(60)
        return inner(chunk)

    monkeypatch.setattr(PendingChunk, "wait", wait)
    yield Gate
    Gate.open.set()


def test_changes_do_not_wait_for_a_chunk(tiny, slow):
    """They begin with the next one, and what is asked is answered."""
    slow.open.set()
    session, twin = begun(tiny, 1), begun(tiny, 1)
    expected = [twin.next_chunk(), twin.switch(BLUE), twin.cut(GREEN), twin.next_chunk()]
    slow.open.clear(), slow.waits.clear()
    with in_thread(session.next_chunk) as got:
        assert slow.waits.wait(60)
        receipts = session.switch(BLUE), session.cut(GREEN)
        assert (session.frame, session.prompt, session.last.index) == (9, GREEN, 0)
        session.prepare("reset")
        fork = session.fork()
        slow.open.set()
    np.testing.assert_array_equal(got[0], expected[0])
    assert receipts == tuple(expected[1:3])
    np.testing.assert_array_equal(fork.next_chunk(), expected[0])
    for one in (session, fork):
        np.testing.assert_array_equal(one.next_chunk(), expected[3])


def test_who_waits_for_a_chunk_that_is_taken_back_gets_the_one_in_its_place(tiny, slow):
    slow.open.set()
    session, twin = (begun(tiny, 2, history=3) for _ in range(2))
    slow.open.clear(), slow.waits.clear()
    with in_thread(session.next_chunk) as got:
        assert slow.waits.wait(60)
        session.rewind()
        session.switch(GREEN, "reset")
        slow.open.set()
    twin.rewind()
    twin.switch(GREEN, "reset")
    np.testing.assert_array_equal(got[0], twin.next_chunk())
    assert_same(session, twin)


@pytest.mark.parametrize("ask", ["next_chunk", "stream", "hand_over_all", "next_chunks"])
def test_who_waits_for_a_session_that_is_closed_is_told(tiny, slow, ask):
    """In a batch the others go on."""
    slow.open.set()
    session, other, batch = begun(tiny, 1), begun(tiny, 1), Batch(tiny, 3, steps=1)
    if ask == "next_chunks":
        batch.add(session)
        batch.add(other)
    elif ask == "hand_over_all":
        session.begin_chunk()
    acts = {"next_chunks": batch.next_chunks, "stream": lambda: next(session.stream())}
    slow.open.clear(), slow.waits.clear()
    closed = pytest.raises(SessionError, match="the session is closed")
    with contextlib.nullcontext() if ask == "next_chunks" else closed:
        with in_thread(acts.get(ask) or getattr(session, ask)) as got:
            assert slow.waits.wait(60)
            session.close()
            slow.open.set()
    if ask == "next_chunks":
        assert got[0].keys() == {other} and [*batch] == [other]


def test_a_session_that_leaves_a_batch_meanwhile_keeps_its_frames(tiny, slow):
    slow.open.set()
    batch, session, other = Batch(tiny, 3, steps=1), begun(tiny, 1), begun(tiny, 1)
    late, twins = begun(tiny, 0), [begun(tiny, 1), begun(tiny, 1)]
    together = Batch(tiny, 3, steps=1)
    for one, twin in zip((session, other), twins, strict=True):
        batch.add(one)
        together.add(twin)
    expected = together.next_chunks()
    slow.open.clear(), slow.waits.clear()
    with in_thread(batch.next_chunks) as got:
        assert slow.waits.wait(60)
        batch.remove(session)
        batch.add(late)
        slow.open.set()
    assert got[0].keys() == {other}
    np.testing.assert_array_equal(got[0][other], expected[twins[1]])
    np.testing.assert_array_equal(session.next_chunk(), expected[twins[0]])
    assert batch.next_chunks().keys() == {other, late}


@pytest.mark.parametrize("device", [None, ELSEWHERE], ids=["here", "decoded elsewhere"])
def test_several_consumers_get_different_chunks_in_order(tiny, device):
    expected = frames_of(begun(tiny, 0), 24)
    session = begun(tiny, 0, vae_device=device)

    with switching_often(), contextlib.ExitStack() as stack:
        gots = [
            stack.enter_context(in_thread(lambda: [session.next_chunk() for _ in range(8)]))
            for _ in range(3)
        ]
    chunks = {0: expected[:9]} | {i: expected[12 * i - 3 : 12 * i + 9] for i in range(1, 24)}
    numbers = [
        [next(i for i, x in chunks.items() if np.array_equal(x, chunk)) for chunk in got[0]]
        for got in gots
    ]
    assert sorted(i for mine in numbers for i in mine) == [*range(24)]
    assert all(mine == sorted(mine) for mine in numbers)


def test_who_asks_a_session_of_a_batch_gets_the_chunk_after_that_of_the_batch(tiny, monkeypatch):
    batch, session, wait = Batch(tiny, 3, steps=1), begun(tiny, 1), PendingChunk.wait
    batch.add(session)
    first, waits, go_on = threading.Lock(), threading.Event(), threading.Event()

    def held_up(chunk):
        """Only who comes first waits long."""
        if first.acquire(blocking=False):
            waits.set()
            assert go_on.wait(60)
        return wait(chunk)

    monkeypatch.setattr(PendingChunk, "wait", held_up)
    with in_thread(batch.next_chunks) as together:
        assert waits.wait(60)
        with in_thread(session.next_chunk) as alone:
            time.sleep(2)  # it comes to where it has to wait
            go_on.set()
    assert together[0].keys() == {session}
    assert session.last.index == 2 and len(alone[0]) == 12
    assert (alone[0] != together[0][session]).any()


def test_who_waits_for_a_session_that_moves_finds_it_where_it_went(tiny):
    """Into a batch and out of it again, each while another thread asks for a change."""
    batch, session, twin = Batch(tiny, 3, steps=1), begun(tiny, 1), begun(tiny, 1)
    moves = ((lambda: batch.add(session), BLUE), (lambda: batch.remove(session), GREEN))
    for move, prompt in moves:
        with session._held() as place:
            with in_thread(lambda prompt=prompt: session.switch(prompt, "reset")) as got:
                time.sleep(0.2)  # it waits for the lock of the place that the session leaves
                move()
                assert session._place is not place and not got
                place.lock.__exit__()
            place.lock.__enter__()
        assert got[0] == twin.switch(prompt, "reset") and session.prompt == prompt
    assert_same(session, twin)
    np.testing.assert_array_equal(session.next_chunk(), twin.next_chunk())


def test_a_session_joins_a_batch_with_the_change_that_is_under_way(tiny, monkeypatch):
    batch, session, forget = Batch(tiny, 3, steps=1), begun(tiny, 1), rollout.forget
    under_way, go_on = threading.Event(), threading.Event()

    def slowly(*arguments):
        under_way.set()
        assert go_on.wait(60)
        return forget(*arguments)

    monkeypatch.setattr(rollout, "forget", slowly)
    with in_thread(lambda: session.switch(BLUE, "reset")) as got:
        assert under_way.wait(60)
        with in_thread(lambda: batch.add(session)):
            time.sleep(0.2)
            assert session not in batch
            go_on.set()
    assert session in batch and session.prompt == BLUE
    assert batch.next_chunks().keys() == {session}
    assert session.last.changes == (got[0],)


def test_sessions_that_change_batches_do_not_block_each_other(tiny):
    """Each way at the same time, while both batches go on."""
    batches = [Batch(tiny, 3, steps=1) for _ in range(2)]
    sessions = [begun(tiny, 1) for _ in range(2)]

    def wander(session, first):
        for i in range(12):
            batch = batches[(first + i) % 2]
            batch.add(session)
            session.switch(PROMPTS[i % 3], "keep")
            session.next_chunk()
            assert session in batch and session in [*batch]
            batch.remove(session)

    with switching_often(), contextlib.ExitStack() as stack:
        for first, session in enumerate(sessions):
            stack.enter_context(in_thread(lambda s=session, f=first: wander(s, f)))
        for batch in batches:
            stack.enter_context(in_thread(lambda b=batch: [b.next_chunks() for _ in range(12)]))
    assert [len(batch) for batch in batches] == [0, 0]
    assert all(session.progress.position.chunk >= 13 for session in sessions)


# Anything.


def play(model, folder, seed, *, threads, together, length):
    """A random history of `length` operations, compared with the same one in one thread; what was
    done, how often.
    """
    recorder = Recorder(pytest.MonkeyPatch())
    twins = {}
    try:
        for i in range(4 if together else 2):
            session = model.session(PROMPTS[i % 3], seed=seed + i, steps=1, history=3)
            for _ in range((seed + i) % 3):
                session.next_chunk()
            twins[session] = session.fork()
        sessions, batches = [*twins], []
        recorder.effects.clear()
        for session in sessions:
            recorder.watch(session)
        for _ in range(1 + (seed % 3 == 0) if together else 0):
            batches.append(Batch(model, 3, steps=1))
            twins[batches[-1]] = Batch(model, 3, steps=1)
            batches[-1].add(sessions[len(batches)])
        history = History(recorder, folder, sessions, batches)
        with switching_often() if seed % 2 else contextlib.nullcontext():
            history.run(seed, threads, length // threads)
    finally:
        recorder.patch.undo()
    Replay(twins).run(recorder.effects)
    return history.done


def play_many(model, folder, seeds, length):
    """Half of them on batches, half of them with three threads; all together what was done."""
    done = collections.Counter()
    for seed in seeds:
        choices = dict(threads=2 + seed % 2, together=seed // 2 % 2 == 1, length=length)
        try:
            done.update(play(model, folder / str(seed), seed, **choices))
        except BaseException as error:
            error.add_note(f"history {seed}, {choices}")
            raise
    return done


def test_some_histories(tiny, tmp_path):
    done = play_many(tiny, tmp_path, range(20), 18)
    assert {name.split(":")[0] for name in done} >= {"next", "stream", "switch", "chunks", "rewind"}


@pytest.mark.long
@pytest.mark.parametrize("part", range(2))
def test_longer_histories(tiny, tmp_path, part):
    done = play_many(tiny, tmp_path, range(500 + 10 * part, 510 + 10 * part), 36)
    assert sum(done.values()) == 10 * 36


@pytest.mark.named
@pytest.mark.parametrize("part", range(4))
def test_two_hundred_histories(tiny, tmp_path, part):
    done = play_many(tiny, tmp_path, range(1000 + 50 * part, 1050 + 50 * part), 36)
    assert sum(done.values()) == 50 * 36
