"""A LoRA that changes places in a running session."""

import jax
import numpy as np
import pytest

import longlive_jax
from longlive_jax import lora
from longlive_jax.batch import Batch
from longlive_jax.bench import CompileClock
from longlive_jax.errors import InputError, SessionError

RED = "a red circle moves left over a black background"


@pytest.fixture(scope="module")
def tiny():
    return longlive_jax.load("tiny")


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    """Two files with LoRAs of one rank that change the model."""
    folder, made = tmp_path_factory.mktemp("loras"), lora.init(tiny.dit, 2, jax.random.key(0))
    a = {path: np.asarray(x) for path, x in made.a.items()}
    for name, seed in (("one", 1), ("two", 2)):
        draw = np.random.default_rng(seed).normal
        b = {path: (draw(size=x.shape) / 10).astype(np.float32) for path, x in made.b.items()}
        lora.save(folder / f"{name}.safetensors", lora.Lora(a, b))
    return folder


def frames_of(session, chunks):
    return np.concatenate([session.next_chunk() for _ in range(chunks)])


def test_it_applies_from_the_next_chunk_on(tiny, adapters):
    """Asked for at the start it is that of a model which was loaded with it; another of its rank
    compiles nothing; without one the model is the one that it was, over the memory that was made.
    """
    one, two = (adapters / f"{name}.safetensors" for name in ("one", "two"))
    session, like = tiny.session(RED, seed=3), longlive_jax.load("tiny", lora=one)
    session.adapt(one)
    again = like.session(RED, seed=3)
    np.testing.assert_array_equal(frames_of(session, 2), frames_of(again, 2))
    assert session.model.origin == like.origin
    plain = session.fork()
    with CompileClock() as clock:
        session.adapt(two)
        changed = session.next_chunk()
    assert clock.programs == 0
    assert np.abs(changed.astype(int) - again.next_chunk()).max() > 8
    plain.adapt(None)
    pairs = zip(jax.tree.leaves(plain.model.dit), jax.tree.leaves(tiny.dit), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)
    assert np.any(plain.next_chunk() != changed)


def test_what_cannot_be_is_refused(tiny, adapters, tmp_path):
    session = tiny.session(RED)
    with pytest.raises(InputError, match=r"none\.safetensors"):
        session.adapt(tmp_path / "none.safetensors")
    other = lora.Lora({"blocks.ffn_in": np.ones((4, 1, 8))}, {"blocks.ffn_in": np.ones((4, 8, 1))})
    lora.save(tmp_path / "other.safetensors", other)
    with pytest.raises(InputError, match=r"of another model: blocks\.ffn_in is 4 x 8 x 8 there"):
        session.adapt(tmp_path / "other.safetensors")
    batch = Batch(tiny, 1)
    batch.add(session)
    with pytest.raises(SessionError, match="a session in a batch has the batch's model"):
        session.adapt(adapters / "one.safetensors")
    batch.remove(session)
    session.close()
    with pytest.raises(SessionError, match="closed"):
        session.adapt(None)
