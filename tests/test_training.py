"""Training: the loss of teacher forcing, optimiser state, resuming."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from longlive_jax import weights
from longlive_jax.config import DiTConfig, StreamConfig, TextConfig
from longlive_jax.dit.model import DiT
from longlive_jax.text.umt5 import UMT5
from longlive_jax.train import state as train_state
from longlive_jax.train import teacher_forcing as tf

DIT = DiTConfig(
    dim=32, ffn_dim=48, heads=2, layers=2, channels=4, text_dim=16, text_len=6, freq_dim=16
)
TEXT = TextConfig(vocab=20, dim=16, attn_dim=16, ffn_dim=24, heads=2, layers=1)
STREAM = StreamConfig(chunk=2, window=8, sink=2)
LAYOUT = tf.Layout(clean=(0, 1), noisy=(0, 1, 1, 2))
CORRUPTION = tf.CorruptionConfig()
ADAM = train_state.OptimizerConfig(learning_rate=3e-3, steps=60, warmup=5, ema=0.9)


def build() -> tf.TextToLatents:
    rngs = nnx.Rngs(0)
    return tf.TextToLatents(DiT(DIT, rngs=rngs), UMT5(TEXT, rngs=rngs))


@functools.cache
def abstract() -> tf.TextToLatents:
    return nnx.eval_shape(build)


def batch_of(seed: int, chunks: int = 3) -> tf.Batch:
    rng = np.random.default_rng(seed)
    frames = chunks * STREAM.chunk
    picture = rng.normal(size=(1, 1, 4, 4, 4))  # the same in every video: soon learned
    return tf.Batch(
        latents=jnp.asarray(picture + 0.1 * rng.normal(size=(2, frames, 4, 4, 4)), jnp.float32),
        position=jnp.tile(jnp.arange(frames, dtype=jnp.float32), (2, 1)),
        ids=jnp.asarray(rng.integers(1, 20, (2, 2, 6)), jnp.int32),
        clean_prompt=jnp.asarray([[0, 0, 1]] * 2, jnp.int32),
        noisy_prompt=jnp.asarray([[0, 1, 1]] * 2, jnp.int32),
        weight=jnp.ones((2, len(LAYOUT.noisy))),
    )


def objective(flat, batch, key):
    model = weights.unflatten(abstract(), flat)
    return tf.loss(model, batch, key, layout=LAYOUT, stream=STREAM, cfg=CORRUPTION)


@functools.partial(jax.jit, static_argnames="cfg")
def step(state, batch, key, *, cfg):
    value, gradients = jax.value_and_grad(objective)(state.weights, batch, key)
    return train_state.update(state, gradients, cfg), value


def run(state, steps, cfg=ADAM):
    losses = []
    for i in range(int(state.step), steps):
        state, value = step(state, batch_of(0), jax.random.fold_in(jax.random.key(1), i), cfg=cfg)
        losses.append(float(value))
    return state, losses


@pytest.mark.parametrize(("kind", "rate"), [("adamw", 3e-3), ("muon", 2e-2)])
def test_training_lowers_the_loss(kind, rate):
    cfg = dataclasses.replace(ADAM, kind=kind, learning_rate=rate)
    _, losses = run(train_state.create(weights.flatten(build()), cfg), 60, cfg)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_a_copy_of_a_chunk_is_denoised_as_if_it_were_alone():
    """Copies share their context and see nothing of each other."""
    model, batch, rng = build(), batch_of(3), np.random.default_rng(5)
    randomised = {
        k: jnp.asarray(rng.normal(size=v.shape) * 0.2, v.dtype)
        for k, v in weights.flatten(model).items()
    }
    model = weights.unflatten(abstract(), randomised)

    def velocities(layout, latents, t):
        chunks = list(layout.clean + layout.noisy)
        frames = np.concatenate([np.arange(2) + 2 * c for c in chunks])
        prompts = [batch.clean_prompt[:, list(layout.clean)]]
        plan = tf.TextPlan(
            batch.ids, jnp.concatenate([*prompts, batch.noisy_prompt[:, list(layout.noisy)]], 1)
        )
        table = layout.table(STREAM)
        return tf.velocity(model, latents, t, batch.position[:, frames], plan, table)

    clean = batch.latents[:, :4]
    noisy = jnp.asarray(rng.normal(size=(2, 8, 4, 4, 4)), jnp.float32)
    t = jnp.asarray(rng.uniform(100, 900, (2, 12)), jnp.float32)
    together = velocities(LAYOUT, jnp.concatenate([clean, noisy], 1), t)[:, 4:]
    for copy, chunk in enumerate(LAYOUT.noisy):
        own = slice(2 * copy, 2 * copy + 2)
        alone = tf.Layout(clean=(0, 1), noisy=(chunk,))
        levels = jnp.concatenate([t[:, :4], t[:, 4:][:, own]], 1)
        v = velocities(alone, jnp.concatenate([clean, noisy[:, own]], 1), levels)[:, 4:]
        np.testing.assert_allclose(together[:, own], v, atol=2e-5)


def test_a_chunk_of_weight_zero_teaches_nothing():
    flat, key = weights.flatten(build()), jax.random.key(0)
    batch = batch_of(0)
    other = dataclasses.replace(batch, latents=batch.latents.at[:, 4:].add(1.0))  # chunk 2
    mute = lambda b: dataclasses.replace(b, weight=b.weight.at[:, 3].set(0.0))  # noqa: E731
    assert float(objective(flat, batch, key)) != float(objective(flat, other, key))
    assert float(objective(flat, mute(batch), key)) == float(objective(flat, mute(other), key))


def test_resuming_from_a_checkpoint_is_bit_exact(tmp_path):
    start = train_state.create(weights.flatten(build()), ADAM)
    whole, losses = run(start, 6)
    half, first = run(train_state.create(weights.flatten(build()), ADAM), 3)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.StandardSave(half))
    fresh = train_state.create({k: jnp.zeros_like(v) for k, v in half.weights.items()}, ADAM)
    with ocp.CheckpointManager(tmp_path) as manager:
        restored = manager.restore(3, args=ocp.args.StandardRestore(fresh))
    resumed, rest = run(restored, 6)
    assert first + rest == losses
    for name in ("weights", "ema"):
        for path, value in getattr(whole, name).items():
            np.testing.assert_array_equal(value, getattr(resumed, name)[path], err_msg=path)


def test_the_average_follows_closely_while_young_and_slowly_later():
    cfg = dataclasses.replace(ADAM, kind="adamw", ema=0.5, weight_decay=0.0)
    state = train_state.create({"w": jnp.ones(3)}, cfg)
    state = train_state.update(state, {"w": jnp.ones(3)}, cfg)
    drift = state.weights["w"] - 1.0
    np.testing.assert_allclose(state.ema["w"], 1.0 + 0.9 * drift, rtol=1e-6)
    old = dataclasses.replace(state, step=jnp.int32(1000), ema={"w": jnp.zeros(3)})
    new = train_state.update(old, {"w": jnp.ones(3)}, cfg)
    np.testing.assert_allclose(new.ema["w"], 0.5 * new.weights["w"], rtol=1e-6)


def test_the_learning_rate_warms_up_stays_and_decays():
    cfg = train_state.OptimizerConfig(learning_rate=1.0, steps=100, warmup=10, decay=0.5)
    rate = cfg.schedule(1.0)
    seen = [float(rate(i)) for i in (0, 5, 10, 50, 75, 100)]
    np.testing.assert_allclose(seen, [0.0, 0.5, 1.0, 1.0, 0.51, 0.02], atol=0.02)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="choose adamw or muon"):
        train_state.create(
            {"w": jnp.ones(1)}, train_state.OptimizerConfig(1.0, steps=1, kind="sgd")
        )
