"""Runs from beginning to end: stopped and resumed, on other devices, against bad input and a full
disk; what they leave in their folder.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import os
import resource
import shutil
import signal

import fake
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training
from training import RECYCLING, begin, fields, lines, same, until

import longlive_jax
from longlive_jax import gpus, sharding, weights
from longlive_jax.data import folder, toy_folder
from longlive_jax.errors import InputError
from longlive_jax.model import Model
from longlive_jax.train import source
from longlive_jax.train.loop import Stopped
from longlive_jax.train.metrics import Metrics
from longlive_jax.train.source import Source

SAMPLES = 4  # two steps are an epoch


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return training.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos") / "toy"
    toy_folder.write(root, seed=1, samples=SAMPLES, chunks=2)
    return root


@pytest.fixture(scope="module", autouse=True)
def programs():
    with training.programs():
        yield


@pytest.fixture
def given(model, videos):
    return functools.partial(fields, model, videos)


class Killed(BaseException):
    """The process ends at once, and what it was about to do is not done."""


def until_killed(run, step, monkeypatch):
    """Trains, and is gone after so many steps."""
    inner = run._step

    def step_of(compiled, state, number):
        if number == step:
            run.checkpoints.wait()
            raise Killed
        return inner(compiled, state, number)

    monkeypatch.setattr(run, "_step", step_of)
    with pytest.raises(Killed):
        run.train()


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recycling", [RECYCLING, None], ids=["recycling", "plain"])
@pytest.mark.parametrize("stop", [until_killed, until])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path, given, monkeypatch, recycling, stop):
    """Killed after step 3 it goes on from step 2, and step 3 is reported once. Told to end in step
    3, which is in no interval, it goes on from there.
    """
    made = given(recycling=recycling)
    whole = begin(tmp_path / "whole", made)
    expected = whole.train()
    stopped = begin(tmp_path / "parts", made)
    stop(stopped, 3, monkeypatch)
    assert [line["step"] for line in lines(tmp_path / "parts")] == [1, 2, 3]
    resumed = begin(tmp_path / "parts", made)
    assert resumed.checkpoints.latest == (2 if stop is until_killed else 3)
    same(resumed.train(), expected)
    assert int(expected.step) == 4
    assert resumed.videos.get_state() == whole.videos.get_state()
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "whole")] == [1, 2, 3, 4]
    kept = tmp_path / "parts" / "checkpoints" / "4"
    assert (kept / "errors").is_dir() == (recycling is not None)
    if recycling:
        same(resumed.recycler.state(), whole.recycler.state())
        filled = whole.recycler.buffers["latent"].fill()
        assert filled.added > filled.entries > 0  # some were replaced, by chance
        restored = begin(tmp_path / "parts", made)
        restored.train()  # nothing is left to do
        same(restored.recycler.state(), whole.recycler.state())


def test_a_run_goes_on_on_another_mesh(tmp_path, given, monkeypatch):
    """Weights move by up to 1e-2 a step."""
    expected = begin(tmp_path / "whole", given(recycling=RECYCLING)).train()
    until(begin(tmp_path / "parts", given(recycling=RECYCLING)), 2, monkeypatch)
    made = given(recycling=RECYCLING, fsdp=2, seq=2, sample_every=3, sample_prompts=("",) * 2)
    sampled = []

    def session(self, prompt, *, seed):
        sampled.append(self)
        return fake.Model().session(prompt)

    monkeypatch.setattr(Model, "session", session)
    state = begin(tmp_path / "parts", made).train()
    same(state, expected, rtol=1e-4, atol=1e-4)
    ours, theirs = (lines(tmp_path / name) for name in ("parts", "whole"))
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert any(not x.sharding.is_fully_replicated for x in state.weights.values())
    # Samples of steps 3 and 4 are of the averaged weights, on one device.
    assert len(sampled) == 4
    averaged = weights.flatten(sampled[-1].dit)
    same(averaged, state.ema)
    assert {x.sharding.num_devices for x in averaged.values()} == {1}


def test_a_run_that_is_told_to_end_at_a_checkpoint_is_saved_once(tmp_path, given, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    run = begin(tmp_path, given())
    until(run, 2, monkeypatch)  # which is saved anyway
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert signal.getsignal(signal.SIGTERM) == before


# --- what goes wrong on the way -------------------------------------------------------------------


def poison(monkeypatch, step):
    """A video of a step is no number."""
    inner, count = Source.__next__, iter(range(100))

    def after(self):
        given = inner(self)
        if next(count) != step - 1:
            return given
        return dataclasses.replace(given, latents=given.latents * jnp.nan)

    monkeypatch.setattr(Source, "__next__", after)


@pytest.mark.parametrize("told", [False, True])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, given, monkeypatch, told):
    """Step 3 is not reported, and must not be saved; also where the run is told to end after it."""
    made = given(log_every=4, save_every=2)
    with monkeypatch.context() as patch:
        poison(patch, 3)
        run = begin(tmp_path, made)
        train = functools.partial(until, run, 3, patch) if told else run.train
        with pytest.raises(Stopped, match="loss of step 3 is nan; .* of step 2, is in .*check"):
            train()
    again = begin(tmp_path, made)
    assert again.checkpoints.latest == 2
    state = again.train()
    assert all(np.isfinite(x).all() for x in state.weights.values())


def test_a_gradient_that_is_no_number_stops_the_run(tmp_path, given, monkeypatch):
    run = begin(tmp_path, given())
    inner = run._step

    def step(*arguments):
        state, found = inner(*arguments)
        return state, found | {"norm": found["norm"] * jnp.inf}

    monkeypatch.setattr(run, "_step", step)
    with pytest.raises(Stopped, match="the gradient of step 1 has the norm inf; no checkpoint is"):
        run.train()


@contextlib.contextmanager
def full_disk(size=20_000):
    """No file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Orbax's threads end with the error that it raises.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, given, monkeypatch):
    made = given(recycling=RECYCLING, log_every=2)
    expected = begin(tmp_path / "whole", made).train()
    until(begin(tmp_path / "run", made), 2, monkeypatch)
    run = begin(tmp_path / "run", made)
    with full_disk(), pytest.raises(InputError) as caught:
        run.train()
    said = str(caught.value)
    assert said.startswith(f"a checkpoint could not be written into {tmp_path / 'run'}")
    assert said.endswith("; the last whole one is of step 2") and "\n" not in said
    assert "too large" in said
    gc.collect()  # what they have left undone, while warnings of it are ignored
    checkpoints = tmp_path / "run" / "checkpoints"
    assert len(list(checkpoints.iterdir())) > 1  # what is there of the failed one
    same(begin(tmp_path / "run", made).train(), expected)
    assert sorted(file.name for file in checkpoints.iterdir()) == ["2", "4"]


def test_a_full_disk_at_the_metrics_is_one_sentence(tmp_path, given, monkeypatch):
    inner = Metrics.write
    monkeypatch.setattr(Metrics, "write", lambda *x: full_disk(10)(inner)(*x))
    with pytest.raises(InputError, match=r"cannot write .*metrics\.jsonl: file too large"):
        begin(tmp_path, given()).train()


# --- what is refused ------------------------------------------------------------------------------


def test_what_another_run_left_is_refused(tmp_path, given, model, monkeypatch):
    until(begin(tmp_path, given()), 1, monkeypatch)
    other = shutil.copytree(model, tmp_path / "other")
    for changes, said in (
        (dict(model=str(other)), f"another model: .*, not .*{other.name}"),
        (dict(optimizer__kind="muon"), 'another kind of optimizer: "adamw", not "muon"'),
        (dict(source__seed=1), "position in the data was saved with other samples"),
        (dict(source__batch=4), "another number of samples in a step"),
    ):
        with pytest.raises(InputError, match=said):
            begin(tmp_path, given(**changes)).train()
    assert lines(tmp_path) and (tmp_path / "checkpoints" / "1").is_dir()  # nothing is lost


def test_a_damaged_checkpoint_is_refused(tmp_path, given, monkeypatch):
    until(begin(tmp_path, given()), 1, monkeypatch)
    for file in (tmp_path / "checkpoints" / "1" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(InputError, match="checkpoint of step 1 in .* is damaged"):
        begin(tmp_path, given()).train()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            dict(seq=2, source__chunks=3),
            "3 latent frames do not divide into 2 ranks of whole chunks of 1: .* multiple of 2",
        ),
        (dict(seq=3, source__chunks=3), "8 heads do not divide over 3 ranks of a sequence"),
        (
            dict(data=2, fsdp=2, source__batch=6),
            "6 sequences does not divide over 4 groups of devices .* multiple of 4",
        ),
        (dict(data=2, fsdp=2, seq=4), "mesh of 2 x 2 x 4 needs 16 devices, there are 8"),
        (dict(source__folder="nowhere"), "there is no folder of videos nowhere"),
        (dict(source__start="middle"), "say first, anywhere"),
        (dict(ar__attention="mosaic"), "attention: mosaic needs an NVIDIA GPU"),
        (
            dict(ar__attention="flash"),
            "attention: no backend 'flash': there are cudnn, xla, reference",
        ),
        (dict(dtype="float8"), "dtype 'float8': choose one of float32, bfloat16"),
        (dict(optimizer__kind="sgd"), "unknown optimizer 'sgd'; choose adamw or muon"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(tmp_path, given, changes, said):
    with pytest.raises(InputError, match=said):
        begin(tmp_path / "run", given(**changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("read", ["model", "source.folder", "source.cache"])
def test_a_run_in_the_place_of_what_it_reads_is_refused(tmp_path, given, model, videos, read):
    """Also through a link; a run beside what it reads is found again when it goes on."""
    cache = tmp_path / "cache"
    cache.mkdir()
    made = given(source__cache=str(cache))
    link = tmp_path / "link"
    link.symlink_to({"model": model, "source.folder": videos, "source.cache": cache}[read])
    before = sorted(os.listdir(link))
    with pytest.raises(InputError, match=f"--workdir .*link is what {read} reads"):
        begin(link, made)
    assert sorted(os.listdir(link)) == before
    for _ in range(2):
        begin(cache / "run", made).checkpoints.close()


def test_a_folder_without_videos_is_refused(tmp_path, given):
    made = given(source__folder=str(tmp_path))
    with pytest.raises(InputError, match="is no data set: there is no folder"):
        begin(tmp_path / "run", made)
    for name in ("video", "caption"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="holds no folders"):
        begin(tmp_path / "run", made)


# --- what is read ---------------------------------------------------------------------------------


def test_what_cannot_be_used_is_skipped_counted_and_named(tmp_path, given, videos, caplog):
    """A damaged video, a sample without captions; a shot without one is left out."""
    root = shutil.copytree(videos, tmp_path / "toy")
    damaged = root / "video" / "00001" / "0.mp4"
    damaged.write_bytes(damaged.read_bytes()[:300])
    shutil.rmtree(root / "caption" / "00003")
    run = begin(tmp_path / "run", given(source__folder=str(root)))
    run.train()
    (reader,) = run.videos.readers
    assert reader.skipped == {"00001": 2, "00003": 2}  # two epochs
    logged = [line for line in caplog.messages if "is skipped" in line]
    assert len(logged) == 2
    assert any("00001 is skipped" in line and str(damaged) in line for line in logged)
    assert any("00003 is skipped: 00003: no videos with captions" in line for line in logged)
    shutil.rmtree(root / "caption")
    (root / "caption").mkdir()
    with pytest.raises(InputError, match="no sample can be used, the first because"):
        begin(tmp_path / "none", given(source__folder=str(root))).train()


def test_latents_are_made_in_the_first_epoch(tmp_path, given, monkeypatch):
    made = given(source__cache=str(tmp_path / "latents"), source__start="first")
    encoded, inner = [], Source._encode_alone
    monkeypatch.setattr(Source, "_encode_alone", lambda *x: encoded.append(1) or inner(*x))
    first = begin(tmp_path / "first", made)
    first.train()
    assert len(encoded) == SAMPLES == len(list((tmp_path / "latents").iterdir()))
    monkeypatch.setattr(folder, "read", None)  # nothing is decoded any more
    begin(tmp_path / "second", made).train()
    assert lines(tmp_path / "first") == lines(tmp_path / "second")
    assert len(encoded) == SAMPLES
    monkeypatch.undo()
    begin(tmp_path / "without", made | {"source": made["source"] | {"cache": ""}}).train()
    for one, other in zip(lines(tmp_path / "without"), lines(tmp_path / "first"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_process_reads_its_own_rows(given, monkeypatch):
    """The last two rows of four, of both parts, are what they are where one process has all."""
    cfg = training.config(given(source__batch=4, source__parts=2))
    make = functools.partial(Source, longlive_jax.load(cfg.model), cfg.source, sharding.make_mesh())
    whole = make()
    monkeypatch.setattr(source, "_own_rows", lambda *_: (2, 4))
    part = make()
    for _ in range(3):
        every, own = (
            source._joined([next(reader) for reader in one.readers], 2) for one in (whole, part)
        )
        rows = [2, 3, 6, 7]
        assert own.samples == tuple(every.samples[row] for row in rows)
        assert own.prompts == tuple(every.prompts[row] for row in rows)
        np.testing.assert_array_equal(own.valid, every.valid[rows])
        np.testing.assert_array_equal(own.video, every.video[rows])
    assert part.get_state() == whole.get_state()
    part.set_state(whole.get_state() | {"step": 2})
    again = source._joined([next(reader) for reader in part.readers], 2)
    np.testing.assert_array_equal(again.video, own.video)


def test_padding_is_not_in_the_loss(tmp_path, given):
    """Videos of 9 frames, where a sequence has 13: the last chunk is padding."""
    toy_folder.write(tmp_path / "short", seed=1, samples=2, chunks=1)
    run = begin(tmp_path / "run", given(source__folder=str(tmp_path / "short")))
    videos, step = next(run.videos), run.program.compile()
    np.testing.assert_array_equal(videos.valid, np.tile([1.0, 1.0, 1.0, 0.0], (1, 2, 1)))

    def loss(latents):
        state = run.program.create(weights.flatten(run.model.dit))
        changed = dataclasses.replace(videos, latents=latents)
        return float(step(state, changed, jax.random.key(0), None)[1].loss)

    x = videos.latents
    assert loss(x.at[:, :, 3].set(7.0)) == loss(x)
    assert loss(x.at[:, :, 2].set(7.0)) != loss(x)


# --- what is left in the folder -------------------------------------------------------------------


def test_metrics_say_how_fast_it_goes(tmp_path, given, monkeypatch):
    monkeypatch.setattr(gpus, "peak_flops", lambda kind: 1e12)
    begin(tmp_path, given(log_every=3)).train()
    said = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in said] == [3, 4]  # the last step too
    for line in said:
        assert set(line) == {"step", "loss", "norm", "step_s", "tokens_s", "mfu"}
        # two videos, clean and noisy, of 4 frames of 2 x 2 tokens
        assert line["tokens_s"] * line["step_s"] == pytest.approx(2 * 2 * 4 * 4)
        assert 0 < line["mfu"] < 1 and line["loss"] > 0 and line["norm"] > 0
    assert any((tmp_path / "tensorboard").iterdir())


def test_samples_are_playable_and_change_nothing(tmp_path, given):
    plain = begin(tmp_path / "plain", given()).train()
    prompts = ("a red circle", "a blue square")
    made = given(sample_every=3, sample_prompts=prompts, sample_seconds=0.5)
    same(begin(tmp_path / "run", made).train(), plain)
    for step in ("000003", "000004"):
        files = sorted((tmp_path / "run" / "samples" / step).iterdir())
        assert [file.name for file in files] == ["0.mp4", "1.mp4"]
        for file in files:
            shot = folder.footage(file)
            assert (shot.height, shot.width, shot.fps) == (32, 32, 16)
            assert len(shot.times) >= 8
            assert folder.read(file, range(len(shot.times)), 32, 32).std() > 0
