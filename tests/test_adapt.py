"""A LoRA that changes places in a running session."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import longlive_jax
from longlive_jax import cli, generate, lora, saved, weights
from longlive_jax.batch import Batch
from longlive_jax.bench import CompileClock
from longlive_jax.config import folder_of
from longlive_jax.errors import InputError, SessionError
from longlive_jax.lora_files import LoraFile
from longlive_jax.session import Session

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


def test_several_with_strengths(tiny, adapters, tmp_path):
    """Those of a session are those of `load`; other strengths compile nothing; a saved session
    comes back with them, a fork has them, and one file twice is one of twice the strength.
    """
    one, two = (adapters / f"{name}.safetensors" for name in ("one", "two"))
    session = tiny.session(RED, seed=3)
    session.adapt([(one, 0.5), (two, -0.25)])
    like = longlive_jax.load("tiny", lora=[(one, 0.5), (str(two), -0.25)])
    assert session.model.origin == like.origin and session.model.fingerprint == like.fingerprint
    np.testing.assert_array_equal(session.next_chunk(), like.session(RED, seed=3).next_chunk())
    with CompileClock() as clock:
        session.adapt([(one, 1.5), (two, 0.5)])
        forked = session.fork()
        changed = session.next_chunk()
    assert clock.programs == 0
    assert np.abs(changed.astype(int) - forked.next_chunk()).max() == 0
    session.save(tmp_path / "saved")
    again = longlive_jax.restore(tmp_path / "saved")
    assert again.model.origin.lora == session.model.origin.lora
    np.testing.assert_array_equal(again.next_chunk(), session.next_chunk())
    session.adapt([(one, 0.0)])
    pairs = zip(jax.tree.leaves(session.model.dit), jax.tree.leaves(tiny.dit), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)


@pytest.mark.parametrize("mode", ["recache", "reset"])
def test_the_memory_is_what_the_mode_says(tiny, adapters, mode):
    """As after a switch to the same prompt; and `rewind` brings the memory back."""
    session = tiny.session(RED, seed=3, history=2)
    session.next_chunk()
    other = session.fork()
    session.adapt(adapters / "one.safetensors", mode)
    other.adapt(adapters / "one.safetensors")
    other.switch(RED, mode)
    first = session.next_chunk()
    np.testing.assert_array_equal(first, other.next_chunk())
    for alike in (session, other):
        alike.rewind()
        alike.switch(RED, mode)
        np.testing.assert_array_equal(alike.next_chunk(), first)
    with pytest.raises(InputError, match='no mode "again" of a switch: say recache'):
        session.adapt(None, "again")


def test_what_is_left_out_is_noted(tiny, adapters, tmp_path):
    tensors = load_file(adapters / "one.safetensors")
    names = [f"diffusion_model.blocks.0.cross_attn.k_img.lora_{side}.weight" for side in "AB"]
    tensors |= {names[0]: np.zeros((2, 4), np.float32), names[1]: np.zeros((4, 2), np.float32)}
    path = tmp_path / "i2v.safetensors"
    save_file(tensors, path)
    said = f"{path}: skipped 2 tensors of modules that only an image-to-video model has: "
    session = tiny.session(RED)
    session.adapt([path])
    session.adapt(path)
    for notes in (session.notes, longlive_jax.load("tiny", lora=path).session(RED).notes):
        assert [note for note in notes if note.startswith(said)] == [said + ", ".join(names)]


def test_merge_lora_adds_several(adapters, tmp_path):
    files = [f"{adapters}/one.safetensors=0.5", f"{adapters}/two.safetensors=-0.25"]
    flags = [f"--lora={file}" for file in files]
    assert cli.run(["merge-lora", *flags, f"--output={tmp_path}/merged"]) == 0
    before, after = (weights.read(f, "dit") for f in (folder_of("tiny"), tmp_path / "merged"))
    one, two = (lora.read(adapters / f"{name}.safetensors") for name in ("one", "two"))
    for path in before:
        old, linear = np.float32(before[path]), path.removesuffix(".kernel")
        if path != linear and linear in one.a:
            parts = ((s, x.a[linear], x.b[linear]) for s, x in ((0.5, one), (-0.25, two)))
            old += sum(s * np.einsum("lri,lor->lio", a, b) for s, a, b in parts)
            assert np.abs(old - np.float32(before[path])).max() > 1e-3
        np.testing.assert_allclose(np.float32(after[path]), old, rtol=1e-2, atol=1e-6)


def test_a_session_of_a_version_with_one_lora_is_read(tiny, adapters, tmp_path):
    session = longlive_jax.load("tiny", lora=adapters / "one.safetensors").session(RED)
    session.save(tmp_path / "saved")
    file = tmp_path / "saved" / "session.json"
    facts = json.loads(file.read_text())
    facts["model"]["lora"] = str(adapters / "one.safetensors")
    file.write_text(json.dumps(facts))
    assert saved.origin(tmp_path / "saved") == session.model.origin


def test_a_resumed_session_adapts_to_what_is_asked_for(tiny, adapters, tmp_path, monkeypatch):
    tiny.session(RED).save(tmp_path / "saved")
    adapted = []
    monkeypatch.setattr(Session, "adapt", lambda _, lora: adapted.append(lora))
    monkeypatch.setattr(generate, "_make", lambda *_: None)
    flags = [f"--resume={tmp_path}/saved", f"--output={tmp_path}/a.mp4"]
    flags.append(f"--lora={adapters}/one.safetensors=2")
    assert cli.run(["generate", *flags], load=longlive_jax.load) == 0
    assert adapted == [(LoraFile(f"{adapters}/one.safetensors", 2),)]


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
