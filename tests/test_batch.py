"""Sessions that are made together get the frames that they would get alone, and leave each other
alone.
"""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from test_session import (
    BLUE,
    ELSEWHERE,
    GREEN,
    RED,
    assert_same,
    assert_same_leaves,
    begun,
    frames_of,
    leaves,
    levels,
    picture,
)
from test_session import tiny as tiny  # a fixture

import longlive_jax
from longlive_jax.batch import Batch
from longlive_jax.bench import CompileClock
from longlive_jax.errors import InputError, SessionError


@pytest.fixture
def guided(tiny):
    sampler = dataclasses.replace(tiny.config.sampler, guidance=3.0)
    return dataclasses.replace(tiny, config=dataclasses.replace(tiny.config, sampler=sampler))


class Pair:
    """A session for a batch, and the same one on its own."""

    def __init__(self, session):
        self.together, self.alone = session, session.fork()

    def both(self, act):
        act(self.together)
        act(self.alone)


def assert_close(one, two, what):
    """Up to rounding: programs for one row and for several add up in another order. Found here: one
    level of 255, on less than 0.1 % of the pixels.
    """
    assert levels(one, two) <= 2, what
    assert (one != two).any(-1).mean() < 0.01, what


def advance(batch, pairs):
    """The next chunk of every pair, in the batch and alone."""
    frames = batch.next_chunks()
    assert set(frames) == {pair.together for pair in pairs}
    seen = [chunk[-9:] for chunk in frames.values()]
    assert all((a != b).any(-1).mean() > 0.1 for a, b in itertools.combinations(seen, 2))
    for i, pair in enumerate(pairs):
        alone, there = pair.alone.next_chunk(), frames[pair.together]
        what = f"session {i} at frame {pair.alone.frame}"
        assert_close(there, alone, what)
        assert pair.together.progress.position == pair.alone.progress.position
        assert pair.together.frame == pair.alone.frame
        last = pair.together.last
        assert dataclasses.replace(last, denoise_s=pair.alone.last.denoise_s) == pair.alone.last
    return frames


@pytest.mark.parametrize("name", ["tiny", "guided"])
def test_each_gets_what_it_would_get_alone(name, request):
    """Prompts, seeds, positions, shots, changes at different times; one comes late, one leaves."""
    model = request.getfixturevalue(name)
    batch = Batch(model, 3, steps=1)
    far = Pair(begun(model, 5))
    new = Pair(model.session(GREEN, seed=1, steps=1))
    for pair in (far, new):
        batch.add(pair.together)
    advance(batch, [far, new])
    far.both(lambda s: s.switch(BLUE))
    advance(batch, [far, new])
    late = Pair(begun(model, 2))
    late.both(lambda s: s.cut(BLUE))
    batch.add(late.together)
    new.both(lambda s: s.cut(RED))
    advance(batch, [far, new, late])
    new.both(lambda s: s.switch(GREEN, "reset"))
    far.both(lambda s: s.cut(GREEN))
    advance(batch, [far, new, late])
    batch.remove(far.together)
    late.both(lambda s: s.switch(RED, "keep"))
    image = None if name == "guided" else picture()
    last = Pair(model.session(BLUE, seed=2, steps=1, image=image))
    batch.add(last.together)
    advance(batch, [new, late, last])
    for _ in range(2):
        advance(batch, [new, late, last])
        assert_close(far.together.next_chunk(), far.alone.next_chunk(), "the one that left")
    for pair in (new, late, last):
        batch.remove(pair.together)
        assert_close(pair.together.next_chunk(), pair.alone.next_chunk(), "at the end")
    assert len(batch) == 0 and batch.next_chunks() == {}


def test_coming_and_going_compiles_nothing(tiny):
    def come_and_go(batch, seed):
        sessions = [tiny.session(RED, seed=seed + i, steps=1, history=1) for i in range(3)]
        for session in sessions:
            batch.add(session)
            batch.next_chunks()
        sessions[1].switch(BLUE)
        batch.next_chunks()
        batch.remove(sessions[0])
        sessions[1].close()
        sessions[2].rewind()
        sessions[2].cut(GREEN)
        batch.next_chunks()
        sessions[0].next_chunk()
        batch.add(sessions[0])
        batch.next_chunks()
        sessions[0].fork().next_chunk()
        for session in (sessions[0], sessions[2]):
            batch.remove(session)

    batch = Batch(tiny, 3, steps=1)
    come_and_go(batch, 0)
    with CompileClock() as clock:
        come_and_go(batch, 7)
    assert clock.programs == 0


def test_what_one_does_is_nothing_to_the_others(tiny, tmp_path):
    """Bit-exact: in the same row of the same program, beside a quiet session and a lively one."""
    batches = [Batch(tiny, 3, steps=1) for _ in range(2)]
    watched = [begun(tiny, 2) for _ in batches]
    quiet, lively = (tiny.session(GREEN, seed=6, steps=1, history=9) for _ in batches)
    for batch, *sessions in zip(batches, watched, (quiet, lively), strict=True):
        for session in sessions:
            batch.add(session)

    def advance():
        frames = [batch.next_chunks() for batch in batches]
        np.testing.assert_array_equal(*(f[s] for f, s in zip(frames, watched, strict=True)))
        assert_same(*watched)
        return frames[1].get(lively)

    first = advance()
    place = lively.fork()
    second = advance()
    for act in (
        lambda: lively.switch(BLUE),
        lambda: lively.switch(RED, "reset"),
        lambda: lively.cut(BLUE),
        lambda: lively.save(tmp_path / "session"),
        lambda: lively.fork(3).next_chunk(),
    ):
        act()
        advance()
    restored = longlive_jax.restore(tmp_path / "session", model=tiny)
    lively.rewind(5)
    lively.rewind(1)
    assert_same(lively, place)
    np.testing.assert_array_equal(advance(), second)
    assert_close(place.next_chunk(), second, "alone from the same place")
    lively.rewind(2)  # to where its first chunk is made alone again
    assert lively.frame == 0
    np.testing.assert_array_equal(advance(), first)
    np.testing.assert_array_equal(advance(), second)
    fork = lively.fork()
    assert_same_leaves(leaves(fork), leaves(lively))
    assert_close(fork.next_chunk(), advance(), "a fork that went on alone")
    restored_frames = restored.next_chunk()
    batches[1].remove(lively)
    advance()
    again = longlive_jax.restore(tmp_path / "session", model=tiny)
    batches[1].add(again)
    frames = batches[1].next_chunks()[again]
    batches[0].next_chunks()
    assert_close(frames, restored_frames, "a restored one")
    again.close()
    advance()


def test_what_was_made_before_is_not_lost(tiny):
    """A session joins with a part of a chunk, and another on its way, not handed over."""
    session = begun(tiny, 0)
    pair = Pair(session)
    list(session.stream(0.25))
    session.begin_chunk()
    batch = Batch(tiny, 3, steps=1)
    batch.add(session)
    frames = batch.next_chunks()[session]
    assert_close(frames, frames_of(pair.alone, 3)[4:], "the rest, the one on its way, and the next")
    assert session.frame == pair.alone.frame
    waiting, later = Pair(begun(tiny, 0)), begun(tiny, 0)
    batch.add(waiting.together)
    np.testing.assert_array_equal(waiting.together.next_chunk(), waiting.alone.next_chunk())
    assert_close(batch.next_chunks()[waiting.together], waiting.alone.next_chunk(), "after one")
    batch.add(later)
    batch.remove(later)
    assert set(batch.next_chunks()) == {session, waiting.together}
    np.testing.assert_array_equal(later.next_chunk(), begun(tiny, 0).next_chunk())


def test_who_cannot_join_is_told_why(tiny):
    batch, other = Batch(tiny, 3, steps=1), Batch(tiny, 3, steps=1)
    session, waiting, third = begun(tiny, 1), begun(tiny, 0), begun(tiny, 0)
    closed = begun(tiny, 0)
    closed.close()
    other.add(session)
    other.add(waiting)
    apart = tiny.session(RED, steps=1, vae_device=ELSEWHERE)
    for stranger, match in (
        (tiny.streaming(sink=2).session(RED, steps=1), "another model than the batch"),
        (tiny.session(RED, steps=2), "takes 2 denoising steps, the batch 1"),
        (closed, "the session is closed"),
        (session, "in a batch already"),
        (waiting, "in a batch already"),
        (apart, "decodes on a device of its own"),
    ):
        with pytest.raises(SessionError, match=match):
            batch.add(stranger)
    assert len(batch) == 0
    for stranger in (session, waiting, apart, begun(tiny, 0)):
        with pytest.raises(SessionError, match="is not in this batch"):
            batch.remove(stranger)
    assert len(other) == 2
    for again in (session, waiting):
        with pytest.raises(SessionError, match="in a batch already"):
            other.add(again)
    other.add(third)
    with pytest.raises(SessionError, match="all 3 rows of the batch are taken"):
        other.add(begun(tiny, 0))
    assert set(other.next_chunks()) == {session, waiting, third}
    with pytest.raises(InputError, match="the size of a batch must be a whole number from 1 on"):
        Batch(tiny, 0)


def test_a_batch_tells_who_is_in_it(tiny):
    """By row, then who waits for a first chunk."""
    batch, other = Batch(tiny, 3, steps=1), Batch(tiny, 3, steps=1)
    waits, seated, left, elsewhere = (begun(tiny, chunks) for chunks in (0, 1, 1, 1))
    assert [*batch] == [] and waits not in batch and RED not in batch
    other.add(elsewhere)
    for session in (waits, seated, left):
        batch.add(session)
    assert [*batch] == [seated, left, waits] and len(batch) == 3
    members = iter(batch)
    batch.remove(left)
    assert [*members] == [seated, left, waits], "as it was when it was asked"
    assert left not in batch and elsewhere not in batch and elsewhere in other
    assert [*batch.next_chunks()] == [*batch] == [seated, waits]
    seated.close()
    assert [*batch] == [waits] and seated not in batch


@pytest.mark.parametrize("chunks", [0, 1])
def test_closing_a_session_frees_its_row(tiny, chunks):
    """At once, whether it waited for its first chunk or not."""
    batch = Batch(tiny, 3, steps=1)
    stays, too, goes = begun(tiny, 1), begun(tiny, 1), begun(tiny, chunks)
    for session in (stays, too, goes):
        batch.add(session)
    goes.close()
    assert len(batch) == 2
    with pytest.raises(SessionError, match="is not in this batch"):
        batch.remove(goes)
    for _ in range(2):
        comes = begun(tiny, chunks)
        alone = comes.fork()
        batch.add(comes)
        frames = batch.next_chunks()
        assert set(frames) == {stays, too, comes}
        assert_close(frames[comes], alone.next_chunk(), "the one that came")
        comes.close()


def test_its_device_memory_does_not_grow(tiny):
    batch = Batch(tiny, 3, steps=1)
    for chunks in (0, 2):
        batch.add(begun(tiny, chunks, history=2))

    def held():
        for _ in range(4):
            batch.next_chunks()
        return sum(x.nbytes for x in jax.live_arrays())

    held()
    assert held() == held()
