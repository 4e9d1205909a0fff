"""Keys and values in fewer bits: what is kept, when, and what it does to a video."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import streams
from longlive_kernels.attention.sink_window import kept as kernel

import longlive_jax
from longlive_jax import footprint
from longlive_jax.config import WAN22_TI2V_5B, StreamConfig
from longlive_jax.dit import storage
from longlive_jax.dit.storage import CODECS, Place
from longlive_jax.errors import InputError

LAYERS, B, SLOTS, S, A, D = 2, 2, 6, 4, 2, 32
# The largest error of a number, of the largest in its scale's reach: half a step of int8; half a
# unit in the last place of e4m3; half of 6 - 4 of e2m1, 6 being the largest, and an e4m3 scale.
ERRORS = {"int8": 0.5 / 127, "fp8": 1 / 16, "nvfp4": 1 / 6 * (1 + 1 / 16)}


@streams.jit
def enter(table, new, place):
    """What is kept then, and the layer's window as it is attended."""
    table = storage.enter(table, new, place)
    window = kernel.window(storage.table(table), A, new.dtype, place.layer, new, place.slots)
    return table, window


def place(slots, chunk, *, final, layer=1):
    slots, chunk = (jnp.broadcast_to(jnp.array(x, jnp.int32), (B, len(x))) for x in (slots, chunk))
    return Place(jnp.int32(layer), slots, chunk, final)


def frames(count, seed=0):
    return jax.random.normal(jax.random.key(seed), (B, count, S, A, D))


def kept(kind):
    return storage.empty(kind, (LAYERS, B, SLOTS, S, A, D), jnp.float32)


def test_the_config_knows_every_way():
    assert StreamConfig.KV == ("model", "bf16", *CODECS)
    with pytest.raises(ValueError, match="kv 'int3': choose model, bf16, int8, fp8, nvfp4"):
        StreamConfig(chunk=1, window=4, sink=1, kv="int3")
    with pytest.raises(ValueError, match="nvfp4 keeps heads of a multiple of 16, not of 24"):
        storage.empty("nvfp4", (1, 1, 1, 1, 1, 24), jnp.float32)
    with pytest.raises(ValueError, match="scores in eight bits need kv int8 or fp8, not nvfp4"):
        StreamConfig(chunk=1, window=4, sink=1, kv="nvfp4", eight_bit_scores=True)
    relative = dict(rope="relative", kv="int8", eight_bit_scores=True)
    with pytest.raises(ValueError, match="scores in eight bits need absolute positions"):
        StreamConfig(chunk=1, window=4, sink=1, **relative)


@pytest.mark.parametrize("kind", CODECS)
def test_a_frame_is_kept_at_its_clean_pass_and_only_then(kind):
    new, later = frames(2), frames(2, seed=1)
    table, window = enter(kept(kind), new, place([4, 1], [0, 0], final=False))
    np.testing.assert_array_equal(window[:, jnp.array([4, 1])], new)  # its own, as it is
    assert not any(np.asarray(x, np.float32).any() for x in jax.tree.leaves(table))
    table, window = enter(table, new, place([4, 1], [0, 0], final=True))
    np.testing.assert_array_equal(window[:, jnp.array([4, 1])], new)
    _, window = enter(table, later, place([0, 2], [1, 1], final=False))
    seen = np.asarray(window[:, jnp.array([4, 1])])
    assert 0 < np.abs(seen - new).max() <= ERRORS[kind] * np.abs(new).max()
    np.testing.assert_array_equal(window[:, jnp.array([0, 2])], later)
    assert not np.asarray(window[:, jnp.array([3, 5])]).any()  # nothing is there yet
    others = jax.tree.map(lambda x: x[0], table.parts)
    assert not any(np.asarray(x, np.float32).any() for x in jax.tree.leaves(others))


@pytest.mark.parametrize("kind", CODECS)
def test_what_is_kept_is_never_quantised_again(kind):
    """Its bytes stay through passes of other frames; a frame past the last slot leaves no trace."""
    table, _ = enter(kept(kind), frames(2), place([0, 1], [0, 0], final=True))
    again, _ = enter(table, frames(2, 1), place([2, SLOTS], [1, 1], final=True))
    for before, after in zip(jax.tree.leaves(table), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(before[:, :, :2], after[:, :, :2])
        np.testing.assert_array_equal(before[:, :, 3:], after[:, :, 3:])
    changed = np.asarray(jax.tree.leaves(again)[0][1, :, 2], np.float32)
    assert changed.any()


def test_what_attends_the_memory_may_be_named(tiny):
    """By the reference the same video, within rounding; what cannot run here is refused at once."""
    _, own = played(tiny, chunks=4)
    _, by_reference = played(tiny.streaming(attention="reference"), chunks=4)
    assert np.abs(own.astype(int) - by_reference).max() <= 2
    named = dataclasses.replace(tiny.config.stream, attention="mosaic")
    unchecked = dataclasses.replace(tiny.config, stream=named)
    with pytest.raises(NotImplementedError, match="mosaic needs an NVIDIA GPU"):
        played(dataclasses.replace(tiny, config=unchecked))
    with pytest.raises(InputError, match="attention: mosaic needs an NVIDIA GPU"):
        tiny.streaming(attention="mosaic", kv="fp8", eight_bit_scores=True)
    with pytest.raises(InputError, match="attention: no backend 'flash': there are cudnn, xla"):
        tiny.streaming(attention="flash")


def test_nvfp4_has_one_largest_magnitude_for_each_chunk():
    """Also where a call has several, as a recache does."""
    new = frames(4) * jnp.array([1.0, 2.0, 3.0, 4.0])[:, None, None, None]
    table, _ = enter(kept("nvfp4"), new, place([0, 1, 2, 3], [5, 5, 6, 6], final=True))
    amax = table.parts["amax"][1, :, :4]
    expected = np.abs(np.asarray(new)).reshape(B, 2, -1).max(2)
    np.testing.assert_array_equal(amax, np.repeat(expected, 2, 1))
    alone = kept("nvfp4")
    for pair in (0, 2):
        where = place([pair, pair + 1], [9, 9], final=True)
        alone, _ = enter(alone, new[:, pair : pair + 2], where)
    for ours, theirs in zip(jax.tree.leaves(table), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_bytes_of_the_5b_cache():
    cfg = WAN22_TI2V_5B
    shape = (cfg.dit.layers, 1, cfg.stream.window, cfg.tokens_per_frame)
    shape = (*shape, cfg.dit.heads, cfg.dit.head_dim)
    made = {k: jax.eval_shape(lambda k=k: storage.empty(k, shape, jnp.bfloat16)) for k in CODECS}
    size = {kind: footprint.nbytes(kept) for kind, kept in made.items()}
    plain = 2 * np.prod(shape)
    assert size["nvfp4"] <= 0.2813 * plain  # 4.5 bits of 16
    assert size["int8"] == size["fp8"] <= 0.516 * plain


@pytest.fixture(scope="module")
def tiny():
    return longlive_jax.load("tiny")


def played(model, chunks=6):
    session = model.session("a red circle moves left over a black background", history=2)
    video = [session.next_chunk() for _ in range(3)]
    session.switch("a blue circle moves left over a black background")
    return session, np.concatenate([*video, *(session.next_chunk() for _ in range(chunks - 3))])


@pytest.mark.parametrize(
    "stream",
    [*(dict(kv=kind) for kind in ("bf16", *CODECS)), dict(kv="fp8", eight_bit_scores=True)],
)
def test_a_session_lives_with_any_way(tiny, stream, tmp_path):
    """Switched, rewound, forked, saved: the same video; and one close to the model's own."""
    model = tiny.streaming(**stream)
    session, video = played(model)
    _, own = played(tiny)
    error = np.mean((video.astype(float) - own) ** 2)
    assert 0 < error and 10 * np.log10(255**2 / error) > 20
    session.save(tmp_path / "session")
    restored = longlive_jax.restore(tmp_path / "session", model=model)
    fork, expected = session.fork(), session.next_chunk()
    np.testing.assert_array_equal(fork.next_chunk(), expected)
    np.testing.assert_array_equal(restored.next_chunk(), expected)
    session.rewind(chunks=2)
    np.testing.assert_array_equal(session.next_chunk(), video[-12:])
    np.testing.assert_array_equal(session.next_chunk(), expected)


def test_rows_of_a_batch_are_those_of_a_session_alone(tiny):
    model = tiny.streaming(kv="nvfp4")
    prompts = ("a red circle moves left", "a green square bounces")
    batch = longlive_jax.Batch(model, 2)
    sessions = [model.session(prompt, seed=i) for i, prompt in enumerate(prompts)]
    alone = [session.fork() for session in sessions]
    for session in sessions:
        batch.add(session)
    for _ in range(3):
        made = batch.next_chunks()
        for session, other in zip(sessions, alone, strict=True):
            difference = np.abs(made[session].astype(int) - other.next_chunk())
            assert difference.max() <= 2


def test_the_state_is_smaller(tiny):
    def nbytes(model):
        memory = model.session("a red circle").state.rollout.cache
        return sum(x.nbytes for x in jax.tree.leaves((memory.k, memory.v)))

    own, four = nbytes(tiny), nbytes(tiny.streaming(kv="nvfp4"))
    assert four / own < 0.15  # of float32
