"""Chunks that hold NaN or infinity end a video with a sentence; what came before stays."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_session import tiny as tiny  # a fixture
from test_video import read

import longlive_jax
from longlive_jax import arguments, cli, rollout
from longlive_jax.batch import Batch
from longlive_jax.errors import InputError, NotFiniteError

RED = "a red circle moves left over a black background"


def broken(model, value=np.nan):
    """The model with one number of its last layer that is not finite."""
    kernel = model.dit.head.kernel[...]
    leaves, structure = jax.tree.flatten(model.dit)
    spoilt = [x.at[(0,) * x.ndim].set(value) if x is kernel else x for x in leaves]
    assert any(x is kernel for x in leaves)
    return dataclasses.replace(model, dit=structure.unflatten(spoilt))


@pytest.fixture
def third(monkeypatch):
    """The third chunk that is made from now on is not finite, in one number of one video."""
    generate, made = rollout.generate, []

    def spoilt(*arguments, **options):
        memory, latents = generate(*arguments, **options)
        made.append(None)
        if len(made) == 3:
            latents = latents.at[0, -1, 0, 0, 0].set(jnp.inf)
        return memory, latents

    monkeypatch.setattr(rollout, "generate", spoilt)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_make_no_video(tiny, value):
    session = broken(tiny, value).session(RED)
    for ask in (session.next_chunk, session.hand_over_all, lambda: next(session.stream(1.0))):
        with pytest.raises(NotFiniteError, match="chunk 0 of the video is not finite"):
            ask()
    assert session.frame == 0 and session.last is None


def test_what_came_before_stays_and_rewind_goes_back(tiny, third, tmp_path):
    session, twin = tiny.session(RED, history=3), tiny.session(RED)
    session.next_chunk()
    session.next_chunk()
    earlier = session.frame
    for _ in range(2):
        with pytest.raises(NotFiniteError, match="chunk 2"):
            session.next_chunk()
    with pytest.raises(InputError, match="chunk 2"):
        session.save(tmp_path / "session")
    assert session.frame == earlier and not list(tmp_path.iterdir())
    session.rewind()  # the last chunk that was handed over, and what was begun after it
    twin.next_chunk()
    for _ in range(2):
        np.testing.assert_array_equal(session.next_chunk(), twin.next_chunk())


def test_a_batch_names_the_session_and_loses_nothing_of_the_others(tiny, third):
    batch, sessions = Batch(tiny, 2), [tiny.session(RED, seed=seed) for seed in range(2)]
    for session in sessions:
        batch.add(session)
    batch.next_chunks()  # each makes its first chunk alone
    wanted = sessions[1].fork().next_chunk  # made before the third
    with pytest.raises(NotFiniteError, match="chunk 1") as caught:
        batch.next_chunks()
    assert caught.value.session is sessions[0]
    batch.remove(sessions[0])
    frames = batch.next_chunks()
    assert list(frames) == [sessions[1]]
    first = wanted()
    assert np.abs(frames[sessions[1]][: len(first)].astype(int) - first).max() <= 1


def test_the_command_keeps_what_is_finished(tiny, third, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["generate", "--prompt", RED, "--seconds=4", "--json=report.json", "--save-session=s"]
    assert cli.run(words, load=lambda *_: tiny) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("longlive: chunk 2 of the video is not finite")
    assert "stopped early, 21 frames" in " ".join(said)
    assert len(read("out.mp4")) == 21
    assert json.loads((tmp_path / "report.json").read_text())["frames"] == 21
    assert not (tmp_path / "s").exists()


def test_nothing_to_hand_over_is_no_frames(tiny):
    session = tiny.session(RED)
    assert session.hand_over_all().shape == (0, 64, 64, 3)
    session.next_chunk()
    assert session.hand_over_all().shape == (0, 64, 64, 3)


WRONG = {
    "blank": (lambda m, s: m.session(" "), "the prompt is empty"),
    "blank switch": (lambda m, s: s.switch(""), "the prompt is empty"),
    "no steps": (lambda m, s: m.session(RED, steps=0), "steps must be a whole number from 1"),
    "many steps": (lambda m, s: m.session(RED, steps=1001), "from 1 to 1000, not 1001"),
    "a seed": (lambda m, s: m.session(RED, seed=-1), "the seed must be a whole number from 0"),
    "a fork's": (lambda m, s: s.fork(2**70), "the seed must be a whole number from 0"),
    "history": (lambda m, s: m.session(RED, history=-1), "history must be a whole number"),
    "rewind": (lambda m, s: s.rewind(0), "chunks to take back must be a whole number from 1 on"),
    "lookahead": (lambda m, s: s.stream(1.0, lookahead=2), "lookahead must be a whole number"),
    "batch": (lambda m, s: longlive_jax.Batch(m, 0), "the size of a batch"),
    "batch steps": (lambda m, s: longlive_jax.Batch(m, 1, steps=0), "steps must be"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_one_sentence(tiny, case):
    act, said = WRONG[case]
    with pytest.raises(InputError, match=said):
        act(tiny, tiny.session(RED))


# Of other types than are annotated, which the checks of types in tests would refuse before.
@pytest.mark.parametrize(
    ("check", "value", "said"),
    [
        (arguments.prompt, None, "a prompt is a string, not None"),
        (arguments.prompt, b"x", "a prompt is a string, not b'x'"),
        (arguments.seed, "x", "the seed must be a whole number from 0 to 4294967295, not 'x'"),
        (arguments.seed, 1.0, "the seed must be a whole number"),
        (arguments.steps, [1], "steps must be a whole number from 1 to 1000"),
        (arguments.steps, 10**5000, "steps must be a whole number from 1 to 1000"),
    ],
    ids=range(6),
)
def test_values_of_other_types_are_one_sentence(check, value, said):
    with pytest.raises(InputError, match=said):
        check(value)


def test_integers_of_numpy_are_integers():
    assert arguments.seed(np.uint32(7)) == 7 and type(arguments.steps(np.int64(4))) is int
