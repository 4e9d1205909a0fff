"""Sessions on disk: what is restored goes on as if it had never stopped, and what is broken says
so.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_session import (
    BLUE,
    RED,
    SITUATIONS,
    assert_go_on_the_same,
    assert_same,
    begun,
    every_situation,
    frames_of,
    leaves,
    loaded,
)
from test_session import tiny as tiny  # a fixture

import longlive_jax
from longlive_jax import saved
from longlive_jax.errors import InputError, SessionError

# Goes on with saved sessions. The first one loads its own model.
GO_ON = """
import pathlib, sys
import numpy as np
import longlive_jax
model = None
for folder in map(pathlib.Path, sys.argv[1:]):
    session = longlive_jax.restore(folder, model=model)
    model = session.model
    chunks = [session.next_chunk() for _ in range(3)]
    last = session.last
    np.savez(folder / "next.npz", frames=np.concatenate(chunks), last=[last.index, last.frame])
"""

# Compares saved sessions with the first one.
SAME = """
import sys
import jax, numpy as np
import longlive_jax
model = longlive_jax.load("tiny")
def leaves(folder):
    session = longlive_jax.restore(folder, model=model)
    memory, carry = session.state.rollout, session.state.carry
    numbers = jax.random.key_data(memory.key), memory.cache, memory.held, carry, session.given
    return [np.asarray(x) for x in jax.tree.leaves(numbers)]
whole = leaves(sys.argv[1])
for folder in sys.argv[2:]:
    try:
        same = all(np.array_equal(a, b) for a, b in zip(whole, leaves(folder), strict=True))
        print("the same" if same else "another")
    except longlive_jax.InputError as error:
        print(error)
"""

# Saves with no room for larger files than it is told.
RUN_OUT = """
import resource, signal, sys
import longlive_jax
session = longlive_jax.load("tiny").session("a red circle", seed=2, steps=1)
session.save(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
session.switch("a blue square", "keep")
for size in map(int, sys.argv[2:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        session.save(sys.argv[1])
    except longlive_jax.InputError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(longlive_jax.restore(sys.argv[1], model=session.model).prompt)
session.save(sys.argv[1])
print(longlive_jax.restore(sys.argv[1], model=session.model).prompt)
"""


def python(program, *arguments):
    """What a process of its own prints, with the settings of the tests."""
    settings = {
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_THREEFRY_PARTITIONABLE": "true",
    }
    command = [sys.executable, "-W", "error", "-c", program, *map(str, arguments)]
    environment = {**os.environ, **settings}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_a_fresh_process_goes_on_with_it(tiny, tmp_path):
    sessions = {name: situation(tiny) for name, situation in SITUATIONS.items()}
    for name, session in sessions.items():
        session.save(tmp_path / name)
    python(GO_ON, *(tmp_path / name for name in sessions))
    for name, session in sessions.items():
        with np.load(tmp_path / name / "next.npz") as made:
            np.testing.assert_array_equal(made["frames"], frames_of(session, 3), err_msg=name)
            assert made["last"].tolist() == [session.last.index, session.last.frame]


@every_situation
def test_a_restored_session_is_the_one_that_was_saved(tiny, tmp_path, situation):
    session = situation(tiny)
    before = leaves(session)
    session.save(tmp_path / "session")
    assert all((x == before[path]).all() for path, x in leaves(session).items())
    restored = longlive_jax.restore(tmp_path / "session", model=tiny)
    assert restored.last == session.last
    assert restored.progress.past.chunks == session.progress.past.chunks
    assert (restored.seed, restored.solver) == (session.seed, session.solver)
    assert (restored.notes, restored.prompt) == (session.notes, session.prompt)
    with pytest.raises(SessionError, match="0 are kept"):
        restored.rewind()
    assert_go_on_the_same(restored, session, chunks=3)
    if restored.progress.past.chunks:
        restored.next_chunk()
        restored.rewind()
        assert_go_on_the_same(restored, session)


def test_a_chunk_that_another_process_made_takes_no_time(tiny, tmp_path):
    session = begun(tiny, 1)
    session.begin_chunk()
    session.save(tmp_path / "session")
    restored = longlive_jax.restore(tmp_path / "session", model=tiny)
    restored.next_chunk()
    assert restored.last.denoise_s == 0
    restored.next_chunk()
    assert 0 < restored.last.denoise_s < 60


def test_a_session_saved_again_is_replaced_whole(tiny, tmp_path):
    """Nothing of the earlier one is left, nor of runs that were killed; what is not ours stays."""
    folder, link = tmp_path / "session", tmp_path / "link"
    link.symlink_to(folder)
    session = begun(tiny, 0)
    session.begin_chunk()
    (tmp_path / ".session.0123abcd.part" / "arrays").mkdir(parents=True)
    session.save(folder)
    (folder / "mine").touch()
    for name in ("arrays-0123abcd", "arrays-4567abcd.orbax-checkpoint-tmp"):
        (folder / name).mkdir()
        (folder / name / "file").touch()
    (folder / ".session.json.0123abcd.part").touch()
    session.next_chunk()
    for name in (folder, link, link):
        session.switch(BLUE, "keep")
        session.save(name)
        restored = longlive_jax.restore(name, model=tiny)
        assert_same(restored, session)
        assert not restored.progress.ahead
    arrays, *others = sorted(path.name for path in folder.iterdir())
    assert others == ["mine", "session.json"]
    assert json.loads((folder / "session.json").read_text())["arrays"] == arrays
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "session"]
    assert link.is_symlink()


def test_a_session_saved_twice_in_a_row_is_saved_the_same(tiny, tmp_path):
    """Also where the first of them was restored, and from a restored one."""
    session = SITUATIONS["half_handed_over"](tiny)
    session.save(tmp_path / "one")
    longlive_jax.restore(tmp_path / "one", model=tiny).save(tmp_path / "two")
    restored = longlive_jax.restore(tmp_path / "two", model=tiny)
    facts = [json.loads((tmp_path / name / "session.json").read_text()) for name in ("one", "two")]
    assert facts[0] == facts[1]
    assert_go_on_the_same(restored, session, chunks=3)


def test_the_model_is_loaded_as_it_was(tiny, tmp_path):
    """With its streaming options and the type of its weights."""
    half = longlive_jax.load("tiny", dtype=jnp.bfloat16)
    model = half.streaming(rope="relative", recache=longlive_jax.Recache(sinks="keep"))
    session = model.session(RED, seed=3, steps=1)
    session.switch(BLUE, "keep")
    session.seed = np.int64(3)  # as NumPy draws it
    session.save(tmp_path / "session")
    restored = longlive_jax.restore(tmp_path / "session")
    assert restored.model.config == model.config
    assert restored.model.fingerprint == model.fingerprint != tiny.fingerprint
    assert_same(restored, session)
    assert restored.seed == 3
    path = tmp_path / "session" / "session.json"
    facts = json.loads(path.read_text())
    del facts["keys"]  # as it was written when keys were kept another way
    path.write_text(json.dumps(facts))
    with pytest.raises(InputError, match="kept keys of relative positions another way"):
        longlive_jax.restore(tmp_path / "session")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved session; tests copy it."""
    folder = tmp_path_factory.mktemp("saved") / "session"
    begun(loaded(), 1, image=np.zeros((64, 64, 3), np.uint8)).save(folder)
    return folder


def test_another_model_is_refused(tiny, folder):
    others = {
        "config": tiny.streaming(sink=2),
        "weights": dataclasses.replace(tiny, vae=jax.tree.map(lambda x: x + 1, tiny.vae)),
        "type": longlive_jax.load("tiny", dtype=jnp.bfloat16),
    }
    for what, model in others.items():
        with pytest.raises(SessionError, match='belongs to another model: it was made with "tiny"'):
            longlive_jax.restore(folder, model=model)
        assert model.fingerprint != tiny.fingerprint, what
    assert dataclasses.replace(tiny).fingerprint == tiny.fingerprint


def refuses(folder, model, match):
    """One sentence says what is wrong, to what asks for the model as well where that is it."""
    with pytest.raises(InputError, match=match) as raised:
        longlive_jax.restore(folder, model=model)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 160 + len(str(folder))
    return raised.type


def test_a_folder_without_a_session_is_refused(tiny, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "none", tmp_path / "file", tmp_path / "file" / "below"):
        refuses(path, tiny, "there is no session in")
        with pytest.raises(InputError, match="there is no session in"):
            saved.origin(path)


def without(name):
    return lambda facts: {k: v for k, v in facts.items() if k != name}


BROKEN_FACTS = {
    "cut short": lambda text: text[: len(text) // 2],
    "not text": lambda text: "\x00\x01",
    "empty": lambda text: "",
    "a list": lambda text: "[1, 2]",
    "nothing": lambda text: "null",
    **{
        f"no {name}": lambda text, name=name: json.dumps(without(name)(json.loads(text)))
        for name in ("model", "position", "solver", "fingerprint", "last", "ahead", "stream")
    },
    "odd steps": lambda text: json.dumps(json.loads(text) | {"solver": {"steps": [[1, 2]]}}),
    "odd position": lambda text: json.dumps(json.loads(text) | {"position": {"chunk": 1}}),
    "a newer position": lambda text: text.replace('"whole"', '"wholly"'),
}


@pytest.mark.parametrize("damage", BROKEN_FACTS.values(), ids=BROKEN_FACTS)
def test_broken_facts_are_refused(tiny, folder, tmp_path, damage):
    broken = shutil.copytree(folder, tmp_path / "broken")
    facts = broken / "session.json"
    facts.write_text(damage(facts.read_text()))
    kind = refuses(broken, tiny, "the session in .* (cannot be read|is broken): .*")
    assert kind is InputError


def test_broken_arrays_are_refused(tiny, folder, tmp_path):
    """Any of the files, gone or cut short: either it does not matter, or it is said. In a process
    of its own, for Orbax stops at the first array that cannot be read, and the others are still
    heard of when it is too late.
    """
    files = [path for path in sorted((folder / "arrays").rglob("*")) if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    damaged = []
    for i, (path, left) in enumerate(itertools.product(files, (None, 0.5))):
        damaged.append(shutil.copytree(folder, tmp_path / str(i)))
        copy = damaged[-1] / path.relative_to(folder)
        copy.unlink()
        if left is not None:
            copy.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    lines = python(SAME, folder, *damaged)
    said = dict(zip(itertools.product(files, (None, 0.5)), lines, strict=True))
    broken = [f"the session in {copy} is broken: arrays cannot be read" for copy in damaged]
    assert set(said.values()) <= {"the same", *broken}
    for left in (None, 0.5):
        assert said[largest, left] in broken
    shutil.rmtree(damaged[0] / "arrays")
    refuses(damaged[0], tiny, "is broken: arrays cannot be read")


def test_arrays_that_lack_something_are_refused(tiny, tmp_path, monkeypatch):
    session = SITUATIONS["under_way"](tiny)
    arrays = saved._arrays
    carry = next(iter(arrays(None, session.progress, session.state)["carry"]))

    def lack(*names):
        def some(*parts):
            tree = arrays(*parts)
            part = tree
            for name in names[:-1]:
                part = part[name]
            del part[names[-1]]
            return tree

        return some

    for names, match in (
        (("carry",), "is broken: it has no carry"),
        (("rollout",), "is broken: it has no rollout"),
        (("ahead_0",), "is broken: it has no ahead_0"),
        (("rollout", ".cache.k"), "is broken: its rollout is of another shape"),
        (("carry", carry), "its carry is of another shape"),
    ):
        monkeypatch.setattr(saved, "_arrays", lack(*names))
        session.save(tmp_path / "session")
        refuses(tmp_path / "session", tiny, match)


def test_a_folder_that_is_something_else_stays(tiny, tmp_path):
    session, other = (begun(tiny, 1) for _ in range(2))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "photo").write_text("of mine")
    (tmp_path / "file").write_text("a file")
    for path in (mine, tmp_path / "file"):
        with pytest.raises(InputError, match="is there already and holds no session"):
            session.save(path)
    for path in (tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="cannot write"):
            session.save(path)
    assert (mine / "photo").read_text() == "of mine"
    assert (tmp_path / "file").read_text() == "a file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]
    empty = tmp_path / "empty"
    empty.mkdir()
    session.save(empty)
    assert_same(longlive_jax.restore(empty, model=tiny), session)
    assert_go_on_the_same(session, other)


STEPS = {  # of a save: what is done to which path, by whom
    "the check": (pathlib.Path, "iterdir", lambda path: path.name == "session"),
    "the arrays": (saved, "_write_arrays", lambda path: path.name.startswith("arrays")),
    "a place for the facts": (pathlib.Path, "touch", lambda path: "json" in path.name),
    "the facts": (pathlib.Path, "write_text", lambda path: "json" in path.name),
    "the exchange": (os, "replace", lambda path: "json" in path.name),
}


def test_a_save_that_fails_leaves_the_earlier_one(tiny, tmp_path, monkeypatch):
    """Whichever step it fails at. The session goes on."""
    folder = tmp_path / "saved" / "session"
    session = begun(tiny, 1)
    earlier = session.fork()
    session.save(folder)
    session.next_chunk()
    other = session.fork()

    def assert_earlier(step):
        assert_same(longlive_jax.restore(folder, model=tiny), earlier)
        assert [path.name for path in folder.parent.iterdir()] == ["session"], step
        assert sorted(path.name for path in folder.iterdir()) == ["arrays", "session.json"], step

    for step, (place, name, concerns) in STEPS.items():
        do, failed = getattr(place, name), []

        def fail(path, *arguments, do=do, concerns=concerns, failed=failed, **options):
            if concerns(path):
                failed.append(path)
                raise PermissionError(1, "not permitted")
            return do(path, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(place, name, fail)
            with pytest.raises(InputError, match="cannot write .*: not permitted"):
                session.save(folder)
        assert failed, step
        assert_earlier(step)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(saved, "_write_arrays", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.save(folder)
    assert_earlier("interrupted")
    assert_go_on_the_same(session, other)
    session.save(folder)
    assert_same(longlive_jax.restore(folder, model=tiny), session)


def test_a_full_disk_leaves_the_earlier_session(tmp_path):
    """The system refuses to write more, at the first file and in the middle of the arrays."""
    pytest.importorskip("resource")
    folder = tmp_path / "session"
    *said, earlier, later = python(RUN_OUT, folder, 100, 1000, 3000)
    assert said == [f"cannot write {folder}: file too large"] * 3
    assert (earlier, later) == ("a red circle", "a blue square")
