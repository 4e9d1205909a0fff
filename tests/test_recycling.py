"""Error recycling: the buffers and steps of the original code, and what chance may not do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_jax.config import StreamConfig
from longlive_jax.errors import InputError
from longlive_jax.flow import Flow
from longlive_jax.train import ar
from longlive_jax.train.recycling import (
    ErrorBuffer,
    Fill,
    Part,
    Recycler,
    RecyclingConfig,
    bucket,
    mistakes,
    nearest,
)

LEVELS = Flow(5.0)
SHAPE = (2, 2, 2, 3)  # of a chunk
ALWAYS = RecyclingConfig(
    buckets=4,
    size=3,
    positions=3,
    context_inject=1.0,
    latent_inject=1.0,
    noise_inject=1.0,
    clean_prob=0.0,
    modulate=0.0,
    dtype="float32",
)
RNG = np.random.default_rng(0)  # for where chance has no say


def last(x):
    """… c h w -> … h w c."""
    return np.moveaxis(x, -3, -1)


def times(index):
    """b f: the timesteps of a table entry per chunk of two frames."""
    return np.repeat(LEVELS.timesteps[index], 2, 1).astype(np.float32)


def bucket_of(buffer, position, where):
    """The entries of one bucket."""
    state = buffer.state()
    end = np.cumsum(state["count"]).reshape(state["count"].shape)[position, where]
    return state["entries"][end - state["count"][position, where] : end]


def equal(ours, wanted):
    assert ours.keys() == wanted.keys()
    for name, x in wanted.items():
        np.testing.assert_array_equal(ours[name], x, err_msg=name)


# --- the original code ----------------------------------------------------------------------------


@pytest.mark.parametrize("buckets", [7, 40, 50])
def test_buckets_and_their_owners(golden, buckets):
    case = golden("longlive2", "14_error_buffer")
    ours = [bucket(index, buckets) for index in range(-2, 1003)]
    np.testing.assert_array_equal(ours, case[f"out/t_bucket_{buckets}"])
    for size in (2, 3, 4):
        ours = np.stack([nearest(buckets, rank, size) for rank in range(size)])
        np.testing.assert_array_equal(ours, case[f"out/nearest_owned_nb{buckets}_size{size}"])


@pytest.mark.parametrize("replacement", ["fifo", "l2"])
def test_what_a_full_bucket_gives_up(golden, replacement):
    case = golden("longlive2", "14_error_buffer")
    cfg = dataclasses.replace(ALWAYS, buckets=2, positions=1, replacement=replacement)
    entries = last(case["in/entries"])
    buffer = ErrorBuffer(cfg, entries.shape[1:])
    for j, entry in enumerate(entries):
        buffer.add(entry, 100 if j % 3 else 800, 0, RNG)
    for where in range(2):
        wanted = last(case[f"out/{replacement}_bucket{where}"])
        np.testing.assert_array_equal(bucket_of(buffer, 0, where), wanted)
    assert buffer.fill() == Fill(added=9, entries=6, filled=2, buckets=2)


def test_positions_are_told_apart(golden, facts):
    case = golden("longlive2", "14_error_buffer")
    entries = last(case["in/entries"])
    buffer = ErrorBuffer(ALWAYS, entries.shape[1:])
    for j in range(5):
        buffer.add(entries[j], 240 * j, j, RNG)
    wanted = facts("longlive2", "14_error_buffer")["config"]["two_d_keys_filled"]
    assert np.argwhere(buffer.state()["count"]).tolist() == wanted
    sample = last(case["out/two_d_sample_t200_pos1"])
    np.testing.assert_array_equal(buffer.sample(200, 1, RNG), sample)
    np.testing.assert_array_equal(buffer.sample_any(1, RNG), sample)


def test_a_step(golden):
    """What is shown and what is kept, with one entry in each buffer."""
    case = golden("longlive2", "05_flow_loss_d_error_recycling")
    cfg = dataclasses.replace(ALWAYS, buckets=1, size=50, positions=1)
    entry = last(case["in/error_entry"])
    recycler = Recycler(cfg, entry.shape, LEVELS, seed=0)
    recycler.buffers["latent"].add(entry, 0, 0, RNG)
    recycler.buffers["noise"].add(last(case["in/noise_error_entry"]), 0, 0, RNG)

    clean, noise = (
        jnp.asarray(last(case[f"in/{k}"])) for k in ("clean_latent", "draw_00_randn_like")
    )
    t = case["out/timestep"]
    draws = ar.Draws(noise, jnp.asarray(t), jnp.zeros(t.shape))
    draws = dataclasses.replace(draws, **vars(jax.device_put(recycler.inject(0, t))))
    made = ar.task(clean, jnp.ones(t.shape), draws, ar.ARConfig(StreamConfig(2, 6, 0)))
    np.testing.assert_allclose(made.noisy, last(case["out/noisy_latents"]), atol=1e-6)
    np.testing.assert_allclose(made.context, last(case["out/clean_x_given_to_model"]), atol=1e-6)

    errors = mistakes(jnp.asarray(last(case["out/flow_pred"])), made, clean, LEVELS)
    recycler.update(0, t, *jax.device_get(errors), np.ones(t.shape, np.float32))
    for use, name in (("latent", "error_buffer"), ("noise", "noise_error_buffer")):
        kept = bucket_of(recycler.buffers[use], 0, 0)
        np.testing.assert_allclose(kept, last(case[f"out/{name}_after"]), atol=3e-6)


# --- what is shown --------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 8))
def test_the_ranks_own_every_bucket_once(buckets, size):
    size = min(size, buckets)
    owned = [np.unique(nearest(buckets, rank, size)) for rank in range(size)]
    assert sorted(np.concatenate(owned)) == list(range(buckets))
    for own, rank in zip(owned, range(size), strict=True):
        distance = np.abs(own - np.arange(buckets)[:, None])
        near = nearest(buckets, rank, size)
        np.testing.assert_array_equal(np.abs(near - np.arange(buckets)), distance.min(1))


def test_a_rank_keeps_and_shows_only_its_own_buckets():
    """Entries say where they were made."""
    cfg = dataclasses.replace(ALWAYS, buckets=5, positions=2)
    for rank in range(2):
        buffer = ErrorBuffer(cfg, SHAPE, rank, 2)
        for i in range(10):
            buffer.add(np.full(SHAPE, i, np.float32), 100 * i + 99, i % 2, RNG)
        for position in range(2):
            shown = {float(buffer.sample_any(position, RNG).mean()) for _ in range(20)}
            assert shown == {i for i in range(10) if i % 2 == position and i // 2 % 2 == rank}
            for i in range(10):
                made_at = buffer.sample(100 * i, position, RNG).mean() // 2
                assert made_at == nearest(5, rank, 2)[i // 2]
        assert buffer.fill() == Fill(
            added=6 - 2 * rank, entries=6 - 2 * rank, filled=6 - 2 * rank, buckets=6 - 2 * rank
        )


def test_empty_buffers_add_nothing_and_what_is_never_added_is_left_out():
    recycler = Recycler(dataclasses.replace(ALWAYS, noise_inject=0.0), SHAPE, LEVELS, seed=0)
    errors = recycler.inject(0, times(np.zeros((2, 3), int)))
    assert errors.noise_error is None
    for x in (errors.error, errors.context_error):
        assert x.shape == (2, 6, *SHAPE[1:]) and x.dtype == np.float32 and not x.any()


def test_errors_are_shown_as_often_and_as_strongly_as_said():
    """One entry of ones: what is shown is its factor."""
    cfg = RecyclingConfig(buckets=1, positions=1, noise_inject=0.3, dtype="float32")
    recycler = Recycler(cfg, SHAPE, LEVELS, seed=3)
    for buffer in recycler.buffers.values():
        buffer.add(np.ones(SHAPE, np.float32), 0, 0, RNG)
    t = times(np.zeros((400, 2), int))
    shown = {k: x[:, ::2, 0, 0, 0] for k, x in vars(recycler.inject(0, t)).items()}  # b n
    for name, share in (("error", 0.9), ("noise_error", 0.3), ("context_error", 0.9)):
        factor = shown[name]
        assert ((factor > 0).all(1) | (factor == 0).all(1)).all()  # a video's chunks, or none
        np.testing.assert_allclose((factor > 0).mean(), 0.8 * share, atol=0.06)
        strength = factor[factor > 0]
        assert strength.min() < 0.75 and strength.max() > 1.25
        assert strength.min() >= 0.7 and strength.max() <= 1.3
        assert len(set(strength)) == len(strength)  # chunks are drawn apart
    clean = np.all([x == 0 for x in shown.values()], 0).all(1)
    np.testing.assert_allclose(clean.mean(), 0.2 + 0.8 * 0.1 * 0.7 * 0.1, atol=0.06)
    before = recycler.buffers["latent"].added
    recycler.update(50, t, *[np.ones((400, 4, *SHAPE[1:]), np.float32)] * 2, np.ones(t.shape))
    kept = (recycler.buffers["latent"].added - before) / 800
    np.testing.assert_allclose(kept, 0.8 + 0.2 * 0.1, atol=0.06)


def test_noisy_chunks_take_errors_of_their_timestep_and_contexts_of_any():
    """Entries say their position and bucket; every step draws anew."""
    recycler = Recycler(ALWAYS, SHAPE, LEVELS, seed=0)
    for position in range(3):
        for where in range(4):
            entry = np.full(SHAPE, 10 * position + where, np.float32)
            for buffer in recycler.buffers.values():
                buffer.add(entry, 250 * where, position, RNG)
    index = np.array([[0, 300, 600, 900]])  # buckets 0 to 3; position 2 also stands for 3
    t = times(index)
    t[:, 0] = 0  # a given frame: its chunk has another timestep
    steps = [vars(recycler.inject(step, t)) for step in range(40)]
    shown = {k: [x[k][0, ::2, 0, 0, 0].tolist() for x in steps] for k in steps[0]}
    own = [0, 11, 22, 23]
    assert shown["error"] == shown["noise_error"] == [own] * 40
    anywhere = [set(of_chunk) for of_chunk in zip(*shown["context_error"], strict=True)]
    assert anywhere == [{10 * p + where for where in range(4)} for p in (0, 1, 2, 2)]


# --- what is kept ---------------------------------------------------------------------------------


def step_of(recycler, step, videos=2, chunks=3):
    """A step of errors that say which one they are; what was shown."""
    rng = np.random.default_rng(step)
    t = times(rng.integers(0, 1000, (videos, chunks)))
    errors = rng.normal(size=(2, videos, 2 * chunks, *SHAPE[1:])).astype(np.float32)
    shown = recycler.inject(step, t)
    recycler.update(step, t, *errors, np.ones(t.shape))
    return vars(shown)


def test_chunks_that_are_padding_are_not_kept():
    recycler = Recycler(ALWAYS, SHAPE, LEVELS, seed=0)
    valid = np.ones((2, 6), np.float32)
    valid[0, 3:], valid[1, :2] = 0, 0  # half of chunk 1 is padding too
    errors = np.repeat(np.arange(6.0), 2).reshape(2, 6, 1, 1, 1) * np.ones(SHAPE[1:])
    recycler.update(9, times(np.full((2, 3), 500)), *[errors.astype(np.float32)] * 2, valid)
    for buffer in recycler.buffers.values():
        kept = [set(bucket_of(buffer, p, 2).ravel()) for p in range(3)]
        assert kept == [{0.0}, {4.0}, {5.0}]


def test_a_given_frame_has_no_error():
    rng = np.random.default_rng(0)
    clean, noise, v = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(3, 1, 4, 2, 2, 3)))
    draws = ar.Draws(noise, jnp.asarray(times(np.array([[300, 700]]))), jnp.zeros((1, 4)))
    cfg = ar.ARConfig(StreamConfig(2, 4, 0), image=True)
    made = ar.task(clean, jnp.ones((1, 4)), draws, cfg)
    sigma = LEVELS.sigma(draws.t)[..., None, None, None]
    latent, noise = mistakes(v, made, clean, LEVELS)
    for error, factor in ((latent, -sigma), (noise, 1 - sigma)):
        assert not error[:, 0].any()
        wanted = (factor * (v - made.target))[:, 1:]
        np.testing.assert_allclose(error[:, 1:], wanted, atol=1e-6)
    assert mistakes(v.astype(jnp.bfloat16), made, clean, LEVELS)[0].dtype == jnp.bfloat16


def test_the_warm_up_keeps_the_errors_of_all_processes():
    """All call `gather` as often, also where nothing is kept."""
    calls = []

    def twice(x):
        calls.append(x.shape)
        return np.concatenate([x, x])

    cfg = dataclasses.replace(ALWAYS, warmup=2, size=50, clean_prob=1.0, clean_buffer_update=0.0)
    for clean_prob, added in ((0.0, [12, 24, 30]), (1.0, [0, 0, 0])):
        cfg = dataclasses.replace(cfg, clean_prob=clean_prob)
        recycler, calls[:] = Recycler(cfg, SHAPE, LEVELS, seed=0, gather=twice), []
        for step in range(3):
            step_of(recycler, step)
            assert recycler.buffers["noise"].added == added[step]
        assert calls == [(2, 3), (2, 3), (2, 3, *SHAPE), (2, 3, *SHAPE)] * 2


def test_a_part_of_a_batch_is_shown_what_the_whole_would_be():
    """Processes with equal buffers, of which each has a video, or half of each."""
    cfg = dataclasses.replace(ALWAYS, clean_prob=0.3, modulate=0.3, latent_inject=0.7, positions=4)
    parts = [Part(), Part(video=1), Part(chunk=2)]
    whole, video, half = (Recycler(cfg, SHAPE, LEVELS, seed=1, part=part) for part in parts)
    for step in range(3):
        step_of(whole, step, chunks=4)
    for recycler in (video, half):
        recycler.restore(whole.state())
    t = times(np.random.default_rng(0).integers(0, 1000, (2, 4)))
    for step in range(3, 9):
        wanted = vars(whole.inject(step, t))
        equal(vars(video.inject(step, t[1:])), {k: x[1:] for k, x in wanted.items()})
        equal(vars(half.inject(step, t[:, 4:])), {k: x[:, 4:] for k, x in wanted.items()})


# --- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("replacement", ["random", "fifo", "l2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path, replacement, dtype):
    cfg = RecyclingConfig(
        buckets=2, size=2, positions=2, noise_inject=0.5, replacement=replacement, dtype=dtype
    )
    first, resumed = (Recycler(cfg, SHAPE, LEVELS, seed=5) for _ in range(2))
    for step in range(6):
        step_of(first, step)
    assert first.buffers["latent"].added > first.buffers["latent"].fill().entries  # some replaced
    saved = first.state()
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(6, args=ocp.args.StandardSave(saved))
    with ocp.CheckpointManager(tmp_path) as manager:
        resumed.restore(manager.restore(6, args=ocp.args.StandardRestore()))
    equal(resumed.state(), saved)
    for step in range(6, 12):
        equal(step_of(resumed, step), step_of(first, step))
    equal(resumed.state(), first.state())
    assert any((saved[k] != x).any() for k, x in first.state().items())  # it is a copy


def test_empty_buffers_are_saved_as_well(tmp_path):
    recycler = Recycler(ALWAYS, SHAPE, LEVELS, seed=0)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.StandardSave(recycler.state()))
    with ocp.CheckpointManager(tmp_path) as manager:
        recycler.restore(manager.restore(0, args=ocp.args.StandardRestore()))
    assert [x.fill().entries for x in recycler.buffers.values()] == [0, 0]


def test_a_rank_takes_its_own_of_what_was_saved():
    whole = ErrorBuffer(ALWAYS, SHAPE)
    for i in range(12):
        whole.add(np.full(SHAPE, i, np.float32), 80 * i, i % 3, RNG)
    rank = ErrorBuffer(ALWAYS, SHAPE, 1, 2)
    rank.restore(whole.state())
    count = whole.state()["count"] * [0, 1, 0, 1]
    np.testing.assert_array_equal(rank.state()["count"], count)
    for key in np.argwhere(count):
        np.testing.assert_array_equal(bucket_of(rank, *key), bucket_of(whole, *key))


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (dict(buckets=3), SHAPE),
        (dict(positions=4), SHAPE),
        (dict(size=1), SHAPE),
        ({}, (2, 2, 4, 3)),
    ],
)
def test_errors_of_another_run_are_refused(change, shape):
    buffer = ErrorBuffer(ALWAYS, SHAPE)
    for _ in range(2):
        buffer.add(np.ones(SHAPE, np.float32), 0, 0, RNG)
    other = ErrorBuffer(dataclasses.replace(ALWAYS, **change), shape)
    with pytest.raises(InputError, match="saved errors are 3 positions x 4 buckets of up to 2"):
        other.restore(buffer.state())
    assert other.fill().entries == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(buckets=0), "buckets must be 1 or more, not 0"),
        (dict(clean_prob=1.5), "clean_prob must be from 0 to 1, not 1.5"),
        (dict(replacement="lru"), "choose one of random, fifo, l2"),
    ],
)
def test_what_makes_no_sense_is_refused(change, says):
    with pytest.raises(InputError, match=says):
        RecyclingConfig(**change)


def test_a_rank_without_buckets_is_refused():
    with pytest.raises(InputError, match="rank 4 of 5 owns none of 4 buckets"):
        ErrorBuffer(ALWAYS, SHAPE, 4, 5)
