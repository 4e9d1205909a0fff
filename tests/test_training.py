"""Training: the loss of teacher forcing, optimiser state, resuming."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon

from longlive_jax import weights
from longlive_jax.config import DiTConfig, StreamConfig, TextConfig
from longlive_jax.dit.model import DiT
from longlive_jax.text.umt5 import UMT5
from longlive_jax.train import state as train_state
from longlive_jax.train import teacher_forcing as tf
from longlive_jax.train import vae as train_vae

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


# The optimiser by value: gradients of three weights, norms on both sides of `RECIPE.clip`.
RECIPE = train_state.OptimizerConfig(
    learning_rate=0.1, steps=10, warmup=2, decay=0.5, floor=0.2, weight_decay=0.3, clip=1.0
)
# 2 steps up, a plateau until half of the 10, then down to a fifth of the rate.
RATES = [0.0, 0.05, 0.1, 0.1, 0.1, 0.1, 0.084, 0.068, 0.052, 0.036, 0.02, 0.02]


def gradients_of(shapes, seed=5):
    """A gradient a step, one after the other 20 times longer and 20 times shorter than the clip."""
    rng = np.random.default_rng(seed)
    for number in range(len(RATES)):
        given = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        length = np.sqrt(sum((g**2).sum() for g in given.values()))
        yield {name: g / length * (0.05, 20.0)[number % 2] for name, g in given.items()}


def clipped(gradients):
    """Gradients whose common length is at most `RECIPE.clip`."""
    length = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    return {name: g * min(1.0, RECIPE.clip / length) for name, g in gradients.items()}


def adam(gradients, b1, b2, *, nesterov=False):
    """What Adam would subtract at a rate of 1, step by step (arXiv 1412.6980); with Nesterov's
    momentum, its mean is the one of the next step, as far as that is known (NAdam).
    """
    mean, square = 0.0, 0.0
    for number, g in enumerate(gradients, 1):
        mean = b1 * mean + (1 - b1) * g
        square = b2 * square + (1 - b2) * g**2
        seen = mean / (1 - b1**number)
        if nesterov:
            seen = b1 * mean / (1 - b1 ** (number + 1)) + (1 - b1) * g / (1 - b1**number)
        yield seen / (np.sqrt(square / (1 - b2**number)) + 1e-8)


def updated(cfg, start, gradients):
    """The weights after each update."""
    state = train_state.create({name: jnp.float32(w) for name, w in start.items()}, cfg)
    update = jax.jit(train_state.update, static_argnums=2)
    for given in gradients:
        state = update(state, {name: jnp.float32(g) for name, g in given.items()}, cfg)
        yield state


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_adamw_clips_decays_and_follows_its_schedule(b1):
    """Decoupled weight decay, times the rate in force (arXiv 1711.05101)."""
    cfg = dataclasses.replace(RECIPE, b1=b1)
    start = {"a": np.array([1.0, -2.0, 0.5]), "b": np.array([[3.0, 0.0], [-1.0, 4.0]])}
    gradients = list(gradients_of({name: w.shape for name, w in start.items()}))
    cut = [clipped(g) for g in gradients]
    moves = {name: adam([g[name] for g in cut], b1, cfg.b2) for name in start}
    expected = dict(start)
    for state, rate in zip(updated(cfg, start, gradients), RATES, strict=True):
        for name in start:
            w = expected[name]
            expected[name] = w - rate * (next(moves[name]) + cfg.weight_decay * w)
            np.testing.assert_allclose(state.weights[name], expected[name], atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("made", "matrix", "shape", "axes"),
    [
        (train_state.optimizer, "blocks.ffn.kernel", (2, 4, 4), (1, 2)),
        (train_vae.optimizer, "conv.kernel", (2, 1, 3, 4), ((0, 1, 2), 3)),
    ],
    ids=["transformer", "vae"],
)
def test_muon_clips_and_follows_its_schedule(made, matrix, shape, axes):
    """A matrix moves by the rate in force times orthogonalised momentum; the rest by Adam, at its
    share of that rate.
    """
    cfg = dataclasses.replace(RECIPE, kind="muon", adam_ratio=0.5)
    rng, optimizer = np.random.default_rng(2), made(cfg)
    start = {matrix: rng.normal(size=shape), "bias": rng.normal(size=3)}
    gradients = list(gradients_of({name: w.shape for name, w in start.items()}))
    cut = [clipped(g) for g in gradients]
    moves = adam([g["bias"] for g in cut], 0.9, cfg.b2, nesterov=True)
    # The library's own orthogonalisation, at a rate of 1 and without a schedule.
    numbers = MuonDimensionNumbers(*axes)
    plain = muon(1.0, muon_weight_dimension_numbers={matrix: numbers})
    found = {name: jnp.float32(w) for name, w in start.items()}
    seen, expected = plain.init({matrix: found[matrix]}), dict(start)
    state, update = optimizer.init(found), jax.jit(optimizer.update)
    for given, short, rate in zip(gradients, cut, RATES, strict=True):
        one = {matrix: jnp.float32(short[matrix])}
        with jax.numpy_dtype_promotion("standard"):
            step, state = update({n: jnp.float32(g) for n, g in given.items()}, state, found)
            turned, seen = plain.update(one, seen, one)  # without decay, of any weights
        found = {name: found[name] + step[name] for name in found}
        expected[matrix] = expected[matrix] + rate * np.float64(turned[matrix])
        expected["bias"] = expected["bias"] - 0.5 * rate * next(moves)
        for name in start:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("start_step", [0, 3])
def test_the_average_begins_with_the_weights_of_its_first_step(start_step):
    """Before `ema_start` updates it is the weights; from the next one on, each update mixes in a
    share of the new weights: nine tenths at first, 1 - ema at last.
    """
    cfg = dataclasses.replace(RECIPE, ema=0.3, ema_start=start_step)
    start = {"w": np.array([1.0, -2.0, 0.5])}
    states = list(updated(cfg, start, gradients_of({"w": (3,)})))
    average = start["w"]
    for number, state in enumerate(states, 1):
        w, age = np.float64(state.weights["w"]), number - start_step
        if age <= 0:
            average = w
        else:
            share = max(1 - cfg.ema, 9 / (9 + age))  # 9/10, 9/11, 9/12, ...
            average = (1 - share) * average + share * w
        np.testing.assert_allclose(state.ema["w"], average, atol=1e-6, rtol=0, err_msg=str(number))


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
