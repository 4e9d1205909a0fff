"""What must hold of streaming itself, whatever the weights."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import streams

from longlive_jax import rollout, sampler
from longlive_jax.bench import CompileClock
from longlive_jax.config import DiTConfig, Recache, SamplerConfig, StreamConfig
from longlive_jax.dit import cache as slots
from longlive_jax.dit import mask
from longlive_jax.dit.attention import masked
from longlive_jax.dit.model import DiT
from longlive_jax.dit.rope import phases
from longlive_jax.vae.vae import init_carry

SMALL = DiTConfig(dim=32, ffn_dim=64, heads=2, layers=2, channels=4, text_dim=8, text_len=5)
STREAM = StreamConfig(chunk=3, window=7, sink=2)  # sink and window both cut through chunks
SAMPLER = SamplerConfig("renoise", steps=2, shift=5.0)
SOLVER = sampler.make(SAMPLER)
# A sampler that takes its noise for the video: what is given is written into the cache.
GIVEN = sampler.Solver((sampler.Step(0.0, 0.0, sampler.KEEP, (1.0, 0.0, 0.0, 0.0)),))


@pytest.fixture(scope="module")
def dit():
    return streams.randomly(lambda rngs: DiT(SMALL, rngs=rngs))


def prompt(dit, seed, rows=1):
    context = np.random.default_rng(seed).normal(size=(rows, SMALL.text_len, SMALL.text_dim))
    return streams.text(dit, jnp.asarray(context, jnp.float32))


def noise(seed, frames, rows=1):
    shape = (rows, frames, *streams.GRID, SMALL.channels)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def play(dit, video, text, chunks, solver=SOLVER):
    """Generates the given chunks of noise; the session and all latents."""
    latents = []
    for first in chunks:
        video, out = rollout.generate(dit, video, text, first, stream=STREAM, solver=solver)
        latents.append(out)
    return video, jnp.concatenate(latents, 1)


def chunks_of(seed, count, *, first=STREAM.chunk):
    lengths = [first] + [STREAM.chunk] * (count - 1)
    return [noise(seed + i, length) for i, length in enumerate(lengths)]


@pytest.mark.parametrize("first", [STREAM.chunk, 1])
def test_teacher_forcing_equals_streaming(dit, first):
    """Under the windowed table, [clean; noisy] sees what every step of every chunk saw."""
    start, text = streams.begin(dit, STREAM, SAMPLER), prompt(dit, 0)
    chunks = chunks_of(10, 6, first=first)
    again = [
        rollout.noise(dataclasses.replace(start, chunk=jnp.full(1, i, jnp.int32)), x.shape[1], 1)
        for i, x in enumerate(chunks)
    ]
    _, latents = play(dit, start, text, chunks)
    frames = latents.shape[1]
    assert frames > 2 * STREAM.window
    labels = mask.teacher_forcing(mask.clean(frames, STREAM.chunk, first=first))
    table = mask.table(labels, window=STREAM.window, sink=STREAM.sink)
    attn = masked(table, phases(SMALL, jnp.asarray([labels.frame], jnp.float32), 2, 2))

    @streams.jit
    def velocity(dit, x, t):
        t = jnp.repeat(jnp.stack([jnp.zeros(()), t]), frames)[None]
        return dit(jnp.concatenate([latents, x], 1), t, text, attn)[0][:, frames:]

    one, two = SOLVER.steps
    x = jnp.concatenate(chunks, 1)
    x0 = x - one.sigma * velocity(dit, x, jnp.float32(one.timestep))
    x = (1 - two.sigma) * x0 + two.sigma * jnp.concatenate(again, 1)
    x0 = x - two.sigma * velocity(dit, x, jnp.float32(two.timestep))
    assert np.std(x0) > 0.1
    np.testing.assert_allclose(latents, x0, atol=2e-5)


@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_slots_hold_the_sinks_and_the_newest_frames(data):
    """Against a list that drops its oldest frame that is no sink. The second row is permuted."""
    window = data.draw(st.sampled_from([4, 7, 12]), "window")
    chunk = data.draw(st.sampled_from([1, 2, 3]), "chunk")
    sink = data.draw(st.integers(0, window - chunk), "sink")
    first = data.draw(st.sampled_from([1, chunk]), "first")
    count = data.draw(st.integers(0, 12), "chunks after the first")
    order = np.array(data.draw(st.permutations(range(window)), "order of the second row"))
    table, held, placed, frame = np.full((2, window), slots.EMPTY), [], {}, 0
    for length in [first] + [chunk] * count:
        taken = choose(table, length, sink)
        new = list(range(frame, frame := frame + length))
        np.put_along_axis(table, taken, np.array([new, new]), 1)
        held += new
        while len(held) > window:
            held.remove(next(f for f in held if f >= sink))
        for row in table.tolist():
            assert sorted(f for f in row if f >= 0) == held
        now = {f: slot for slot, f in enumerate(table[0].tolist()) if f >= 0}
        assert all(now[f] == slot for f, slot in placed.items() if f in now), "a frame moved"
        placed = now
        table[1] = table[1][order]


def choose(table, frames, sink):
    labels = jnp.asarray(table, jnp.int32)
    nothing = jnp.zeros((0, 2, table.shape[1], 1, 1, 1))
    cache = slots.KVCache(labels, labels, jnp.zeros_like(labels), nothing, nothing)
    return np.asarray(slots.choose(cache, frames, sink))


def test_one_program_and_constant_memory_for_any_length(dit):
    """Noise, denoising, decoding: after the second chunk nothing is compiled and nothing grows."""
    video, text = streams.begin(dit, STREAM, SAMPLER), prompt(dit, 1)
    carry = init_carry(
        streams.vae(), 1, *(n * streams.SMALL_VAE.space_stride for n in streams.GRID)
    )
    shapes = lambda x: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(x)]  # noqa: E731
    compiled, held, before, frames = [], [], shapes(video), 0
    with CompileClock() as clock:
        for chunk in range(14):
            first, old = rollout.noise(video, STREAM.chunk), video
            video, latents = rollout.generate(dit, video, text, first, stream=STREAM, solver=SOLVER)
            assert old.cache.k.is_deleted(), "the cache is updated in place"
            carry, pixels = rollout.decode(streams.vae(), carry, latents, first=chunk == 0)
            frames += pixels.shape[1]
            del first, old, latents, pixels
            compiled.append(clock.programs)
            held.append(sum(x.nbytes for x in jax.live_arrays()))
    assert compiled[1] > 0 and len(set(compiled[1:])) == 1
    assert len(set(held[1:])) == 1
    assert shapes(video) == before
    assert frames == 1 + 4 * (14 * STREAM.chunk - 1)
    assert streams.attended(video.cache) == [[0, 1, 37, 38, 39, 40, 41]]


def test_rows_are_independent(dit):
    """A video is the same beside another one, with another prompt and another shot, as alone."""
    alone, both = (streams.begin(dit, STREAM, SAMPLER, batch=b) for b in (1, 2))
    both = dataclasses.replace(both, shot=jnp.array([0, 1], jnp.int32))
    single, double = prompt(dit, 2), prompt(dit, 2, rows=2)
    np.testing.assert_array_equal(single.k[:, 0], double.k[:, 0])
    for _ in range(5):
        one, two = rollout.noise(alone, STREAM.chunk), rollout.noise(both, STREAM.chunk)
        alone, expected = rollout.generate(dit, alone, single, one, stream=STREAM, solver=SOLVER)
        both, latents = rollout.generate(dit, both, double, two, stream=STREAM, solver=SOLVER)
        np.testing.assert_allclose(latents[:1], expected, atol=2e-5)
        assert np.abs(latents[1] - expected[0]).max() > 0.1


def test_every_step_gets_noise_of_its_own(dit):
    """Normal noise of (the video's key, the chunk, the step), as the formula of the sampler wants
    it: independent from step to step, and from chunk to chunk.
    """
    cfg = SamplerConfig("renoise", steps=4, shift=5.0)
    solver, shape = sampler.make(cfg), (STREAM.chunk, *streams.GRID, SMALL.channels)
    video, text = streams.begin(dit, STREAM, cfg, seed=11), prompt(dit, 6)
    seen = []
    for chunk in range(2):
        key = jax.random.fold_in(jax.random.key(11), chunk)
        draws = [jax.random.normal(jax.random.fold_in(key, step), shape) for step in range(4)]
        draws = jnp.stack(draws)[:, None]  # steps b f h w c
        first = rollout.noise(video, STREAM.chunk)
        np.testing.assert_array_equal(first, draws[0])
        choices = dict(stream=STREAM, solver=solver)
        _, expected = streams.denoise(dit, video, text, first, draws[1:], **choices)
        video, latents = rollout.generate(dit, video, text, first, **choices)
        np.testing.assert_allclose(latents, expected, atol=2e-5, rtol=0)
        seen.extend(np.asarray(draws))
    alike = np.corrcoef(np.reshape(seen, (len(seen), -1)))
    assert np.abs(alike - np.eye(len(seen))).max() < 0.25


def copy(video):
    """A fork: sessions are donated to what changes them."""
    return jax.tree.map(jnp.copy, video)


def recached(dit, video, text):
    return rollout.recache(dit, copy(video), text, jnp.ones(1, bool), stream=STREAM, how=Recache())


def distance(one, two) -> dict[int, float]:
    """Latent frame -> the largest difference of its keys and values in the last layer."""
    parts = [(one.cache.k, two.cache.k), (one.cache.v, two.cache.v)]
    pairs = [(streams.by_frame(one.cache, a), streams.by_frame(two.cache, b)) for a, b in parts]
    assert all(a.keys() == b.keys() for a, b in pairs)
    return {f: max(np.abs(a[f][-1] - b[f][-1]).max() for a, b in pairs) for f in pairs[0][0]}


def test_recache_under_the_same_prompt_changes_nothing(dit):
    """While the video is shorter than the window, also over a cut."""
    text, chunks = prompt(dit, 3), chunks_of(40, 2)
    video, _ = play(dit, streams.begin(dit, STREAM, SAMPLER), text, chunks[:1])
    video = dataclasses.replace(video, shot=video.shot + 1)
    video, _ = play(dit, video, text, chunks[1:])
    again = recached(dit, video, text)
    assert max(distance(video, again).values()) < 1e-5
    np.testing.assert_array_equal(again.cache.shot, video.cache.shot)
    np.testing.assert_array_equal(again.cache.chunk, video.cache.chunk)


def test_recache_equals_a_video_made_under_the_new_prompt(dit):
    """The same latents, written by chunks under the new prompt, leave the same keys and values."""
    start, old, new = streams.begin(dit, STREAM, SAMPLER), prompt(dit, 3), prompt(dit, 4)
    video, latents = play(dit, copy(start), old, chunks_of(50, 2))
    pieces = [latents[:, i : i + STREAM.chunk] for i in range(0, latents.shape[1], STREAM.chunk)]
    fresh, written = play(dit, start, new, pieces, solver=GIVEN)
    np.testing.assert_array_equal(written, latents)
    assert min(distance(video, fresh).values()) > 1e-3
    assert max(distance(recached(dit, video, new), fresh).values()) < 1e-5


def test_recache_leaves_nothing_of_the_old_prompt(dit):
    """In a long video all sinks and the window are rebuilt from the held latents alone."""
    start, old, new = streams.begin(dit, STREAM, SAMPLER), prompt(dit, 3), prompt(dit, 4)
    video, latents = play(dit, start, old, chunks_of(60, 8))
    blank = jax.tree.map(jnp.ones_like, (video.cache.k, video.cache.v))
    wiped = dataclasses.replace(video.cache, k=blank[0], v=blank[1])
    again = recached(dit, video, new)
    assert sorted(distance(video, again)) == [0, 1, 19, 20, 21, 22, 23]
    assert min(distance(video, again).values()) > 1e-3
    other = recached(dit, dataclasses.replace(video, cache=wiped), new)
    assert max(distance(again, other).values()) == 0.0
    for slot, frame in enumerate(np.asarray(video.cache.frame[0])):
        held = slots.latents_of(again.held, again.cache.frame)
        np.testing.assert_array_equal(held[0, slot], latents[0, frame])


@pytest.mark.parametrize("shot_sink", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_filled_slots_are_the_first_ones_whatever_happened(dit, seed, shot_sink):
    """What a chunk promises to attention (`order="prefix"`), in histories of two videos."""
    rng, stream = np.random.default_rng(seed), dataclasses.replace(STREAM, shot_sink=shot_sink)
    video = rollout.begin(streams.model(dit, stream, SAMPLER), [0, 1])
    text, partly = prompt(dit, 0, rows=2), 0
    for _ in range(40):
        what, which = rng.integers(6), jnp.asarray(rng.random(2) < 0.5)
        if what == 0:
            video = rollout.forget(video, which)
        elif what == 1:
            video = dataclasses.replace(video, shot=video.shot + which.astype(jnp.int32))
        elif what == 2:
            how = Recache(sinks=str(rng.choice(["first", "keep", "window"])))
            video = rollout.recache(dit, video, text, which, stream=stream, how=how)
        else:
            entered, attn = rollout.enter(dit, video, int(rng.choice([1, 3])), stream)
            visible = np.asarray(attn.visible[:, 0])
            assert attn.order == "prefix" and attn.visible.shape[1] == 1
            assert (visible[:, :-1] >= visible[:, 1:]).all()
            np.testing.assert_array_equal(visible, entered.cache.filled)
            partly += int(not visible.all())
            latents = noise(0, attn.slots.shape[1], rows=2)
            video = rollout.absorb(dit, video, text, latents, stream=stream)
    assert partly > 3  # windows that were not full


def test_after_a_clean_recache_slots_are_in_any_order(dit):
    """So nothing is promised there but that all frames of a chunk see the same."""
    stream = dataclasses.replace(STREAM, clean_recache=True)
    video, text = rollout.begin(streams.model(dit, stream, SAMPLER), [0]), prompt(dit, 0)
    for cut in (0, 0, 1):
        video = dataclasses.replace(video, shot=video.shot + cut)
        video = rollout.absorb(dit, video, text, noise(0, 3), stream=stream)
    _, attn = rollout.enter(dit, video, 1, stream)
    filled = np.asarray(attn.visible[0, 0])
    assert attn.order == "nested" and not (filled[:-1] >= filled[1:]).all()


def test_no_guidance_no_negative_cache(dit):
    guided = dataclasses.replace(SAMPLER, guidance=3.0)
    rows = [streams.begin(dit, STREAM, s, batch=2).cache.k.shape[1] for s in (SAMPLER, guided)]
    assert rows == [2, 4]


@pytest.mark.parametrize("kv", ["model", "int8", "nvfp4"])
def test_without_a_clean_pass_the_last_steps_keys_stay(kv):
    """A step at timestep 0 that is shown the video is a clean pass, so there the two are one; after
    steps from noise they are not, and the video's own frames are put aside all the same.
    """
    # Heads that are wide enough for any way of keeping.
    dit = streams.randomly(lambda rngs: DiT(dataclasses.replace(SMALL, dim=64), rngs=rngs))
    text, given = prompt(dit, 0), chunks_of(3, 4)

    def after(clean_pass, solver):
        stream = dataclasses.replace(STREAM, kv=kv, clean_pass=clean_pass)
        model = streams.model(dit, stream, SAMPLER)
        video, latents = rollout.begin(model, [0]), []
        for first in given:
            video, out = rollout.generate(dit, video, text, first, stream=stream, solver=solver)
            latents.append(out)
        return video, latents

    (with_, shown), (without, same) = after(True, GIVEN), after(False, GIVEN)
    for a, b in zip(*map(jax.tree.leaves, (with_.cache, without.cache)), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(shown, same)
    (with_, shown), (without, made) = after(True, SOLVER), after(False, SOLVER)
    np.testing.assert_array_equal(shown[0], made[0])  # nothing was remembered yet
    assert not np.array_equal(shown[1], made[1])
    np.testing.assert_array_equal(with_.cache.frame, without.cache.frame)
    np.testing.assert_array_equal(with_.held.frame, without.held.frame)
    np.testing.assert_array_equal(without.frame, [sum(x.shape[1] for x in given)])


def test_without_a_clean_pass_a_chunk_is_one_forward_less(dit):
    """Counted in the program: its loop has the steps, what is beside it is the clean pass."""
    text = prompt(dit, 0)

    def flops(clean_pass):
        stream = dataclasses.replace(STREAM, clean_pass=clean_pass)
        begun = rollout.begin(streams.model(dit, stream, SAMPLER), [0])
        choices = dict(stream=stream, solver=sampler.make(dataclasses.replace(SAMPLER, steps=1)))
        renoise = functools.partial(rollout.noise, begun, 3)
        made = jax.jit(lambda x: rollout.denoise(dit, begun, text, x, renoise, **choices)[0].cache)
        return made.lower(noise(0, 3)).compile().cost_analysis()["flops"]

    assert 0.45 < flops(False) / flops(True) < 0.6
