"""The model that ships: prompts in, a video file out, on this machine."""

import gc
import json

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longlive_jax
from longlive_jax import cli
from longlive_jax.bench import CompileClock
from longlive_jax.config import SHIPPED
from longlive_jax.data.caption import Thing
from longlive_jax.errors import InputError
from longlive_jax.eval import toy

RED = "a red circle moves left over a black background"
BLUE = "a blue circle moves left over a black background"
GREEN = "a green square bounces over a grey background"


@pytest.fixture(scope="module")
def tiny():
    return longlive_jax.load("tiny")


@pytest.fixture(scope="module")
def changes():
    return (
        longlive_jax.Event(2.0, "switch", BLUE),
        longlive_jax.Event(3.0, "cut", GREEN),
    )


def test_a_stream_has_the_frames_and_the_changes_asked_for(tiny, changes):
    session, lengths, prompts, applied = tiny.session(RED, steps=1), [], [], []
    for frames in session.stream(4, events=changes):
        assert frames.shape[1:] == (64, 64, 3) and frames.dtype == np.uint8
        lengths.append(len(frames))
        prompts.append(session.last.prompt)
        applied += [(change.prompt, change.frame) for change in session.last.changes]
    assert lengths == [9, 12, 12, 12, 12, 7]
    # The first chunks whose first frame is at or after 2 s and 3 s begin with frames 33 and 57.
    assert prompts == [RED, RED, RED, BLUE, BLUE, GREEN]
    assert applied == [(BLUE, 33), (GREEN, 57)]


def test_the_same_seed_makes_the_same_video(tiny):
    def frames(seed):
        return np.concatenate(list(tiny.session(RED, seed=seed, steps=1).stream(1)))

    np.testing.assert_array_equal(frames(3), frames(3))
    assert (frames(3) != frames(4)).any()


def test_bfloat16_weights_make_the_video_asked_for():
    """What an accelerator runs by default. The noise is bfloat16 too, so it is another video."""
    model = longlive_jax.load("tiny", dtype=jnp.bfloat16)
    frames = np.concatenate(list(model.session(RED).stream(3)))
    seen = toy.read(frames[-32:])
    assert seen is not None and seen.things[0] == Thing("red", "circle", "moves left")
    assert seen.background == "black"


@pytest.mark.parametrize("lookahead", [0, 1])
def test_nothing_is_compiled_after_the_second_chunk(tiny, changes, lookahead):
    session = tiny.session(RED, steps=1).prepare("recache")
    stream = session.stream(6, events=changes, lookahead=lookahead)
    next(stream), next(stream)
    with CompileClock() as clock:
        rest = list(stream)
    assert len(rest) > 5
    assert clock.programs == 0


def test_memory_does_not_grow_with_the_video(tiny):
    stream = tiny.session(RED, steps=1).stream(60)

    def held_after(chunks):
        for _ in range(chunks):
            next(stream)
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays())

    gc.collect()  # what other tests have left behind
    assert held_after(5) == held_after(25)


def test_generate_writes_a_video_and_a_report(tmp_path):
    video, report = tmp_path / "out.mp4", tmp_path / "out.json"
    arguments = ["generate", "--prompt", RED, "--seconds", "3", "--steps", "1"]
    arguments += ["--at", f"1: {BLUE}", "--cut", f"2: {GREEN}"]
    arguments += ["--output", str(video), "--json", str(report)]
    assert cli.run(arguments, load=longlive_jax.load) == 0
    with av.open(str(video)) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 48
    assert (frames[0].width, frames[0].height) == (64, 64)
    said = json.loads(report.read_text())
    assert said["frames"] == 48 and said["steps"] == 1
    assert [s["requested_s"] for s in said["switches"]] == [1.0, 2.0]


def test_a_saved_session_is_resumed_by_the_command(tmp_path, tiny):
    """What was made ahead, or cut off at the end of the first file, begins the second."""
    first, second, folder = (tmp_path / name for name in ("one.mp4", "two.mp4", "session"))
    arguments = [
        "generate",
        "--prompt",
        RED,
        "--seconds",
        "1.5",
        "--steps",
        "1",
        "--at",
        f"1: {BLUE}",
    ]
    arguments += ["--output", str(first), "--save-session", str(folder)]
    assert cli.run(arguments, load=longlive_jax.load) == 0
    report = tmp_path / "two.json"
    arguments = ["generate", "--resume", str(folder), "--seconds", "1.5", "--prompt", GREEN]
    arguments += ["--output", str(second), "--json", str(report)]
    assert cli.run(arguments, load=longlive_jax.load) == 0
    session = longlive_jax.restore(folder, model=tiny)
    assert session.frame == 24 and session.last.prompt == BLUE
    said = json.loads(report.read_text())
    assert said["frames"] == 24 and said["steps"] == 1
    # 9 frames of the chunk that was cut off are left: the next one is the first to be green.
    assert [(s["requested_s"], s["applied_s"]) for s in said["switches"]] == [(0.0, 9 / 16)]


@pytest.mark.parametrize("missing", ["config.json", "vae.safetensors", "tokenizer.json"])
def test_a_model_without_a_part_is_refused(tmp_path, missing):
    for path in (SHIPPED / "tiny").iterdir():
        if path.name != missing:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(InputError):
        longlive_jax.load(str(tmp_path))
