"""Batches: their order, the position that they go on from, what is skipped, latents on disk."""

import collections
import dataclasses
import itertools
import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest

from longlive_jax import weights
from longlive_jax.data import folder, toy_folder, toy_world
from longlive_jax.data.latents import LatentCache, Shelf
from longlive_jax.data.montage import MontageConfig
from longlive_jax.data.pipeline import Batch, Batches, PipelineConfig
from longlive_jax.errors import InputError

CHUNKS = 3
MONTAGE = MontageConfig(chunks=2, chunk=3, fps=toy_world.FPS)  # 9 + 12 frames
CFG = PipelineConfig(MONTAGE, toy_world.SIZE, toy_world.SIZE, batch=2, seed=5)
SAMPLES = 7


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world") / "toy"
    toy_folder.write(root, seed=1, samples=SAMPLES, chunks=CHUNKS)
    return root


@pytest.fixture
def own(world, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(world, tmp_path / "toy")


def take(batches, count):
    return list(itertools.islice(batches, count))


def names(batches, count):
    return [name for batch in take(batches, count) for name in batch.samples]


def same(one, other):
    assert (one.samples, one.prompts) == (other.samples, other.prompts)
    np.testing.assert_array_equal(one.valid, other.valid)
    np.testing.assert_array_equal(one.video, other.video)
    assert one.video.dtype == other.video.dtype


def damage(root, name):
    """Puts noise into the middle of a sample's longest video."""
    video = max((root / "video" / name).iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(video.read_bytes())
    begin = content.index(b"mdat") + 4
    size = (len(content) - begin) // 2
    content[begin : begin + size] = np.random.default_rng(0).bytes(size)
    video.write_bytes(bytes(content))
    return video


def test_a_batch_is_frames_prompts_and_how_much_of_them_counts(world):
    (batch,) = take(Batches(world, CFG), 1)
    assert isinstance(batch, Batch)
    assert batch.video.shape == (2, 21, 64, 64, 3) and batch.video.dtype == np.uint8
    assert [len(prompts) for prompts in batch.prompts] == [2, 2]
    assert batch.valid.tolist() == [6, 6]
    for name, prompts in zip(batch.samples, batch.prompts, strict=True):
        said = {folder.caption(file) for file in (world / "caption" / name).glob("*.json")}
        assert prompts[0] in said


def test_every_epoch_is_a_new_order_of_all_samples(world):
    cfg = dataclasses.replace(CFG, batch=1)
    order = names(Batches(world, cfg), 3 * SAMPLES)
    epochs = [order[i : i + SAMPLES] for i in range(0, len(order), SAMPLES)]
    assert all(len(set(epoch)) == SAMPLES for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert names(Batches(world, cfg), SAMPLES) == epochs[0]
    assert names(Batches(world, dataclasses.replace(cfg, seed=6)), SAMPLES) != epochs[0]


def test_ranks_share_every_step_among_them(world):
    (whole,) = [take(Batches(world, dataclasses.replace(CFG, batch=6)), 4)]
    for ranks in (2, 3):
        cfg = dataclasses.replace(CFG, batch=6 // ranks, ranks=ranks)
        parts = [take(Batches(world, dataclasses.replace(cfg, rank=r)), 4) for r in range(ranks)]
        for step, batch in enumerate(whole):
            for row, name in enumerate(batch.samples):
                part = parts[row % ranks][step]
                assert part.samples[row // ranks] == name
                np.testing.assert_array_equal(part.video[row // ranks], batch.video[row])


def test_a_place_is_drawn_anew_in_every_epoch_or_always_the_first(world):
    anywhere = dataclasses.replace(
        CFG, batch=SAMPLES, montage=dataclasses.replace(MONTAGE, chunks=1)
    )
    first = dataclasses.replace(anywhere, start="first")

    def by_name(cfg):
        return [
            dict(zip(batch.samples, batch.video, strict=True))
            for batch in take(Batches(world, cfg), 2)
        ]

    one, two = by_name(first)
    assert all((one[name] == two[name]).all() for name in one)
    one, two = by_name(anywhere)
    assert not all((one[name] == two[name]).all() for name in one)


def test_a_run_goes_on_bit_for_bit(world):
    batches = Batches(world, CFG)
    take(batches, 3)
    saved = json.dumps(batches.get_state())
    assert len(saved) < 100
    wanted = take(batches, 3)
    resumed = Batches(world, CFG)
    resumed.set_state(json.loads(saved))
    for one, other in zip(take(resumed, 3), wanted, strict=True):
        same(one, other)
    # An iterator that is under way goes back, and the position of one rank is that of all.
    resumed.set_state(json.loads(saved))
    same(next(resumed), wanted[0])
    halves = [
        Batches(world, dataclasses.replace(CFG, batch=1, rank=rank, ranks=2)) for rank in (0, 1)
    ]
    for half in halves:
        half.set_state(json.loads(saved))
    assert tuple(next(half).samples[0] for half in halves) == wanted[0].samples


def test_workers_change_nothing(world):
    alone = Batches(world, CFG)
    wanted = take(alone, 5)
    batches = Batches(world, dataclasses.replace(CFG, workers=2))
    try:
        batches.set_state({**alone.get_state(), "step": 1})
        for one, other in zip(take(batches, 3), wanted[1:], strict=False):
            same(one, other)
        assert batches.get_state() == {**alone.get_state(), "step": 4}
    finally:
        batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_positions_in_other_data_are_refused(world, own):
    state = Batches(world, CFG).get_state()
    Batches(own, dataclasses.replace(CFG, workers=3)).set_state(state)  # the same samples
    shutil.rmtree(own / "video" / "00003")
    for root, cfg in (
        (own, CFG),
        (world, dataclasses.replace(CFG, seed=0)),
        (world, dataclasses.replace(CFG, batch=3)),
    ):
        with pytest.raises(InputError, match="position in the data was saved with other samples"):
            Batches(root, cfg).set_state(state)


def test_what_is_damaged_is_skipped_counted_and_named(own, caplog):
    bad = damage(own, "00002")
    shutil.rmtree(own / "caption" / "00005")
    first = dataclasses.replace(CFG, start="first", batch=1, montage=MONTAGE)
    batches = Batches(own, first)
    states, made = [], []
    for _ in range(2 * SAMPLES):
        states.append(batches.get_state())
        made.append(next(batches))
    assert batches.skipped == {"00002": 2, "00005": 2}
    counts = collections.Counter(batch.samples[0] for batch in made)
    # The next one of the folder stands in for it.
    assert counts == {"00000": 2, "00001": 2, "00003": 4, "00004": 2, "00006": 4}
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 2
    assert any(f"sample 00002 is skipped: {bad} is damaged" in line for line in logged)
    assert any("sample 00005 is skipped: 00005: no videos with captions" in line for line in logged)
    resumed = Batches(own, first)
    resumed.set_state(states[SAMPLES - 2])
    for batch in made[SAMPLES - 2 :]:
        same(next(resumed), batch)
    assert set(resumed.skipped) == {"00002", "00005"}


def test_a_folder_of_which_nothing_can_be_used_is_refused(own):
    longer = dataclasses.replace(CFG, montage=dataclasses.replace(MONTAGE, chunks=CHUNKS + 1))
    with pytest.raises(InputError, match="no sample can be used, the first because: 0000.: remain"):
        next(Batches(own, longer))
    assert Batches(own, longer).get_state()["step"] == 0


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (dict(start="middle"), 'start "middle" is not known: say first, anywhere'),
        (dict(batch=0), "batch must be 1 or more"),
        (dict(workers=-1), "workers 0 or more"),
        (dict(seed=2**32), "seed from 0 to 4294967295"),
        (dict(rank=2, ranks=2), "there is no rank 2 of 2"),
    ],
)
def test_numbers_that_make_no_batches_are_refused(choices, said):
    with pytest.raises(InputError, match=said):
        dataclasses.replace(CFG, **choices)


class Encoder:
    """Stands in for a VAE, and counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self, frames):
        assert frames.shape == (1, 21, 64, 64, 3)
        self.calls += 1
        return frames[:, ::4, ::8, ::8].astype(ml_dtypes.bfloat16)


def cached(root, shelf, fingerprint="one", **choices):
    encode = Encoder()
    cfg = dataclasses.replace(CFG, **({"start": "first", "batch": SAMPLES} | choices))
    return encode, Batches(root, cfg, LatentCache(Shelf(shelf, fingerprint), encode))


def test_the_second_epoch_reads_latents(world, tmp_path, monkeypatch):
    encode, batches = cached(world, tmp_path / "new" / "latents")
    one = next(batches)
    assert one.video.shape == (SAMPLES, 6, 8, 8, 3) and one.video.dtype == ml_dtypes.bfloat16
    assert encode.calls == SAMPLES
    monkeypatch.setattr(folder, "read", None)  # nothing is decoded either
    two = next(batches)
    assert encode.calls == SAMPLES
    rows = [one.samples.index(name) for name in two.samples]
    np.testing.assert_array_equal(two.video, one.video[rows])
    assert two.prompts == tuple(one.prompts[row] for row in rows)
    # So does another run.
    encode, batches = cached(world, tmp_path / "new" / "latents")
    same(next(batches), one)
    assert encode.calls == 0
    files = [path.name for path in (tmp_path / "new" / "latents").iterdir()]
    assert len(files) == SAMPLES
    assert all(name.endswith(".safetensors") and name[:6] == f"0000{name[4]}-" for name in files)


def test_latents_are_of_these_files_this_plan_and_this_vae(own, tmp_path):
    shelf = tmp_path / "latents"
    next(cached(own, shelf)[1])

    def again(**choices):
        encode, batches = cached(own, shelf, **choices)
        next(batches)
        return encode.calls

    assert again() == 0
    assert again(fingerprint="two") == SAMPLES
    padded = dataclasses.replace(MONTAGE, pad=True, one_clip=True)
    assert 0 < again(montage=padded) < SAMPLES  # of those that stay in their first clip
    video = own / "video" / "00001" / "0.mp4"
    os.utime(video, (1, 1))
    assert again() == 1
    assert again() == 0
    place = min(shelf.iterdir())
    place.write_bytes(place.read_bytes()[:100])
    assert again(fingerprint="one") + again(fingerprint="two") in (1, 2)
    assert again(fingerprint="one") + again(fingerprint="two") == 0


def test_latents_are_written_whole_or_not_at_all(world, tmp_path, monkeypatch):
    def full(file, data):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "_put", full)
        with pytest.raises(InputError, match="no space left"):
            next(cached(world, tmp_path / "latents")[1])
        assert not (tmp_path / "latents").exists()
    place = tmp_path / "latents" / "x.safetensors"
    shelf, x = Shelf(place.parent, ""), np.zeros((1, 2, 2, 3), np.float32)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            shelf.write(place, x)
    assert shelf.read(place) is None
    assert not place.parent.exists()
    shelf.write(place, x)
    np.testing.assert_array_equal(shelf.read(place), x)
