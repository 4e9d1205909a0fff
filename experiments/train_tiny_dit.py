"""Trains the tiny transformer and its text encoder on a pool of encoded toy-world videos.

python experiments/train_tiny_dit.py --pool pool --workdir run --config
experiments/configs/tiny_dit.py Stop it at any time; the same command goes on from the last
checkpoint. New shards in the pool are picked up on the way.
"""

import functools
import pathlib
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import app, flags, logging
from flax import nnx
from ml_collections import config_flags

from longlive_jax import cache_dir, weights
from longlive_jax.config import TINY
from longlive_jax.data import toy_pool
from longlive_jax.dit.model import DiT
from longlive_jax.text.tiny import tiny_tokenizer
from longlive_jax.text.umt5 import UMT5
from longlive_jax.train import state as train_state
from longlive_jax.train import teacher_forcing as tf

_POOL = flags.DEFINE_string("pool", None, "Folder written by make_pool.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints and logs.", required=True)
_INIT = flags.DEFINE_string("init", None, "Folder of a model to start from, not random weights.")
_CONFIG = config_flags.DEFINE_config_file("config", "experiments/configs/tiny_dit.py")


@jax.jit
def make_model(key) -> tf.TextToLatents:
    rngs = nnx.Rngs(key)
    return tf.TextToLatents(DiT(TINY.dit, rngs=rngs), UMT5(TINY.text, rngs=rngs))


def abstract_model() -> tf.TextToLatents:
    return nnx.eval_shape(lambda: make_model(jax.random.key(0)))


@functools.partial(
    jax.jit, static_argnames=("layout", "optimizer", "corruption"), donate_argnames="state"
)
def step(state, batch, key, *, layout, optimizer, corruption):
    abstract = abstract_model()

    def loss(flat):
        model = weights.unflatten(abstract, flat)
        return tf.loss(model, batch, key, layout=layout, stream=TINY.stream, cfg=corruption)

    value, gradients = jax.value_and_grad(loss)(state.weights)
    return train_state.update(state, gradients, optimizer), value


@functools.partial(jax.jit, static_argnames=("layout", "corruption"))
def evaluate(flat, batch, key, *, layout, corruption):
    model = weights.unflatten(abstract_model(), flat)
    return tf.loss(model, batch, key, layout=layout, stream=TINY.stream, cfg=corruption)


def main(_):
    cache_dir.enable()
    cfg, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value).absolute()
    optimizer = train_state.OptimizerConfig(**cfg.optimizer)
    corruption = tf.CorruptionConfig(**cfg.corruption)
    sequence, pool_cfg = toy_pool.SequenceConfig(**cfg.sequence), toy_pool.PoolConfig()
    tokenizer = tiny_tokenizer()
    flat = weights.flatten(make_model(jax.random.key(cfg.seed)))
    if _INIT.value:
        folder = pathlib.Path(_INIT.value)
        parts = {part: weights.load(folder / f"{part}.safetensors") for part in ("dit", "text")}
        flat = {f"{part}.{name}": x for part, held in parts.items() for name, x in held.items()}
    state = train_state.create(flat, optimizer)
    logging.info("%d parameters", sum(x.size for x in flat.values()))
    manager = ocp.CheckpointManager(
        workdir / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)
    )
    if manager.latest_step() is not None:
        state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        logging.info("resumed at step %d", state.step)

    shards: list[pathlib.Path] = []
    pool = None

    def batch_of(rng, source, size):
        layout, fields = toy_pool.sample(rng, source, tokenizer, size, sequence, TINY.stream)
        return layout, tf.Batch(**fields)

    start, losses = time.time(), []
    first = int(state.step)
    for i in range(first, optimizer.steps):
        if pool is None or i % 200 == 0:
            found = sorted(pathlib.Path(_POOL.value).glob("????.npz"))
            if found != shards:
                shards, pool = found, toy_pool.read(found[1:] or found, pool_cfg)
                held_out = toy_pool.read(found[:1], pool_cfg)
                val = [batch_of(np.random.default_rng(n), held_out, cfg.batch) for n in range(6)]
                logging.info("pool of %d videos", len(pool.scripts))
        layout, batch = batch_of(np.random.default_rng([cfg.seed, i]), pool, cfg.batch)
        key = jax.random.fold_in(jax.random.key(cfg.seed), i)
        settings = dict(layout=layout, corruption=corruption)
        state, value = step(state, batch, key, optimizer=optimizer, **settings)
        losses.append(float(value))
        if (i + 1) % cfg.log_every == 0:
            keys = jax.random.split(jax.random.key(1), len(val))
            held = [
                evaluate(state.ema, b, k, layout=layout, corruption=corruption)
                for (layout, b), k in zip(val, keys, strict=True)
            ]
            pace = (i + 1 - first) / (time.time() - start)
            message = "step %d  train %.4f  held out %.4f  %.2f steps/s"
            logging.info(message, i + 1, np.mean(losses), np.mean(held), pace)
            losses = []
        if (i + 1) % cfg.save_every == 0 or i + 1 == optimizer.steps:
            manager.save(i + 1, args=ocp.args.StandardSave(state))
            weights.save(workdir / "ema.safetensors", state.ema)
    manager.wait_until_finished()


if __name__ == "__main__":
    app.run(main)
