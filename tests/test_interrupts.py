"""Signals at the worst moments: nothing is lost, and what was begun goes on."""

import os
import random
import signal
import threading

import numpy as np
import pytest
import scripts
from test_session import tiny as tiny  # a fixture

import longlive_jax
from longlive_jax import interrupts, rollout, saved
from longlive_jax.batch import Batch
from longlive_jax.errors import SessionError
from longlive_jax.progress import Progress
from longlive_jax.undo import Past

RED = "a red circle moves left over a black background"
BLUE = "a blue circle moves left over a black background"


def press(number=signal.SIGINT):
    os.kill(os.getpid(), number)


def test_a_signal_waits_for_the_end_of_the_outermost_block():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with interrupts.hold:
            with interrupts.hold:
                press()
                done.append("inner")
            assert interrupts.hold.pending
            done.append("outer")
        pytest.fail("the interrupt was lost")
    assert done == ["inner", "outer"]
    assert not interrupts.hold.pending
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_handlers_that_raise_wait_too():
    def leave(*_):
        raise SystemExit(3)

    done, before = [], signal.signal(signal.SIGTERM, leave)
    try:
        with pytest.raises(SystemExit):
            with interrupts.hold:
                press(signal.SIGTERM)
                done.append("all")
            pytest.fail("the signal was lost")
        assert done == ["all"] and signal.getsignal(signal.SIGTERM) is leave
    finally:
        signal.signal(signal.SIGTERM, before)


def test_each_of_several_signals_is_handled_though_one_raises():
    seen = []

    def note(number, _):
        seen.append(number)
        raise RuntimeError(number)

    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(RuntimeError), interrupts.hold:
            press(signal.SIGTERM)
            press(signal.SIGINT)
        assert sorted(seen) == [signal.SIGINT, signal.SIGTERM]
        assert {signal.getsignal(n) for n in before} == {note}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_other_threads_hold_nothing_back():
    inside, done = threading.Event(), threading.Event()

    def hold():
        with interrupts.hold:
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(60)
    with pytest.raises(KeyboardInterrupt):
        press()
        pytest.fail("the interrupt was lost")
    done.set()
    thread.join()


def test_what_ignores_signals_goes_on_doing_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.hold:
            press()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def begun(tiny):
    session = tiny.session(RED, history=4)
    session.next_chunk()
    session.next_chunk()
    return session


def is_same(one, other):
    return np.array_equal(one.next_chunk(), other.next_chunk())


# What is pressed after, of what is called: each is a moment at which a state is between two places.
AFTER = {
    "generate": (rollout, "generate"),
    "decode": (rollout, "decode"),
    "finite": (rollout, "finite"),
    "recache": (rollout, "recache"),
    "forget": (rollout, "forget"),
    "take back": (Past, "take_back"),
    "frames": (Progress, "handed_over"),
    "begun": (Progress, "begun"),
}
CALLS = {
    "next_chunk": (lambda x: x.next_chunk(), ("generate", "decode", "finite", "begun", "frames")),
    "stream": (lambda x: next(x.stream(9.0)), ("generate", "decode", "frames")),
    "begin_chunk": (lambda x: x.begin_chunk(), ("generate", "decode", "begun")),
    "hand_over_all": (lambda x: (x.begin_chunk(), x.hand_over_all()), ("generate", "frames")),
    "switch": (lambda x: x.switch(BLUE), ("recache",)),
    "reset": (lambda x: x.switch(BLUE, "reset"), ("forget",)),
    "rewind": (lambda x: x.rewind(), ("take back",)),
    "prepare": (lambda x: x.prepare("recache", "reset"), ("recache", "forget")),
}


@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_leaves_the_session_before_or_after(tiny, monkeypatch, call):
    act, moments = CALLS[call]
    for moment in moments:
        session, place = begun(tiny), AFTER[moment]
        do = getattr(*place)

        def pressed(*arguments, do=do, **options):
            result = do(*arguments, **options)
            press()
            return result

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(*place, pressed)
            act(session)
        assert interrupts.hold._depth == 0
        twin = begun(tiny)
        if session.prompt == BLUE:
            act(twin)
        if session.frame < twin.frame:  # the rewind was done
            twin.rewind()
        assert session.frame == twin.frame, "a chunk was handed over to nobody"
        assert is_same(session, twin), moment
        assert is_same(session, twin), moment


@pytest.mark.parametrize("moment", ["generate", "decode", "begun", "frames"])
def test_ctrl_c_leaves_a_batch_before_or_after(tiny, monkeypatch, moment):
    place, batch = AFTER[moment], Batch(tiny, 2)
    sessions = [begun(tiny), begun(tiny)]
    for session in sessions:
        batch.add(session)
    wanted = {session: session.fork().next_chunk() for session in sessions}
    do = getattr(*place)

    def pressed(*arguments, **options):
        result = do(*arguments, **options)
        press()
        return result

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*place, pressed)
        batch.next_chunks()
    frames = batch.next_chunks()
    for session in sessions:
        first = frames[session][: len(wanted[session])].astype(int)
        assert np.abs(first - wanted[session]).max() <= 1, "a chunk was lost"


def test_ctrl_c_during_a_save_comes_after_it(tiny, tmp_path, monkeypatch):
    folder, session = tmp_path / "session", begun(tiny)
    session.save(folder)
    session.next_chunk()
    write = saved._write_arrays

    def pressed(*arguments):
        press()
        write(*arguments)
        press()

    monkeypatch.setattr(saved, "_write_arrays", pressed)
    with pytest.raises(KeyboardInterrupt):
        session.save(folder)
    assert is_same(longlive_jax.restore(folder, model=tiny), session)
    assert len(os.listdir(folder)) == 2


@pytest.fixture(scope="module")
def attack():
    return scripts.load("attack_interrupts")


@pytest.mark.parametrize("kind", ["next_chunk", "switch", "save"])
def test_random_moments_of_calls(attack, kind):
    seen = attack.calls(kind, 6, random.Random(1))
    assert sum(seen.values()) == 6
    assert not [name for name in seen if name.startswith("FAULT")], seen


@pytest.mark.long
@pytest.mark.parametrize("kind", ["generate", "quantize", "convert"])
def test_random_moments_of_commands(attack, kind):
    seen = attack.commands(kind, 4, random.Random(2))
    assert sum(seen.values()) == 4
    assert not [name for name in seen if name.startswith("FAULT")], seen


def failed(*_, **__):
    raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand a page more")


def test_a_device_that_fails_before_the_state_is_taken_changes_nothing(tiny, monkeypatch):
    session, twin = begun(tiny), begun(tiny)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="RESOURCE"):
        patch.setattr(rollout, "generate", failed)
        session.next_chunk()
    assert is_same(session, twin)


def test_a_device_that_fails_after_it_ends_the_session_with_a_sentence(tiny, monkeypatch):
    session = begun(tiny)
    with monkeypatch.context() as patch:
        patch.setattr(rollout, "decode", failed)
        with pytest.raises(
            SessionError, match="^the session is lost and closed: RESOURCE.*memory$"
        ):
            session.next_chunk()
    assert session.closed and session.frame == begun(tiny).frame
    with pytest.raises(SessionError, match="the session is closed"):
        session.next_chunk()


def test_a_device_that_fails_in_a_batch_ends_it_with_a_sentence(tiny, monkeypatch):
    batch, sessions = Batch(tiny, 2), [begun(tiny), begun(tiny)]
    for session in sessions:
        batch.add(session)
    with monkeypatch.context() as patch:
        patch.setattr(rollout, "decode", failed)
        with pytest.raises(SessionError, match="^the batch is lost: RESOURCE.*memory$"):
            batch.next_chunks()
    with pytest.raises(SessionError, match="the batch is lost"):
        batch.next_chunks()
    with pytest.raises(SessionError, match="the session is lost and closed"):
        sessions[0].switch(BLUE)
    assert sessions[0].closed and sessions[0] not in batch
