"""Trains the tiny VAE on clips of the toy world.

python experiments/train_vae.py --workdir run --config experiments/configs/tiny_vae.py Stop it at
any time; the same command goes on from the last checkpoint. The moving average of the weights is
written to WORKDIR/vae.safetensors with the latents' statistics in WORKDIR/statistics.json.
"""

import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import app, flags, logging
from flax import nnx
from ml_collections import config_flags

from longlive_jax import cache_dir, output, weights
from longlive_jax.config import TINY_VAE
from longlive_jax.data import toy_world
from longlive_jax.train import vae as training
from longlive_jax.train.linear_start import linear_start
from longlive_jax.train.state import OptimizerConfig
from longlive_jax.vae.vae import VAE, generate, posterior

_WORKDIR = flags.DEFINE_string("workdir", None, "Checkpoints and weights.", required=True)
_CONFIG = config_flags.DEFINE_config_file("config", "experiments/configs/tiny_vae.py")


def batches(cfg, seed: int):
    """Endless uint8 clips of one length, from anywhere in videos with switches and cuts.

    Clips begin at multiples of four frames, so that a scene changes between two latents, as it does
    in a stream.
    """
    rng = np.random.default_rng(seed)
    recipe = toy_world.Recipe(switch_rate=0.2, cut_rate=0.1, two_things_rate=cfg.two_things)

    def clip():
        script = toy_world.random_script(rng, 6, recipe)
        start = 4 * int(rng.integers(0, 12)) * int(rng.random() < 0.75)
        return toy_world.render(script, cfg.frames, start)

    while True:
        yield np.stack([clip() for _ in range(cfg.batch)])


@functools.partial(jax.jit, static_argnames="cfg")
def evaluate(flat, video, *, cfg):
    """Mean squared error in [0, 1] of the posterior mean's reconstruction, and the latents."""
    vae = weights.unflatten(nnx.eval_shape(lambda: VAE(cfg, rngs=nnx.Rngs(0))), flat)
    x = training.to_signed(video)
    mean = posterior(vae, x)[0]
    frames = jnp.clip(generate(vae, mean)[0], -1, 1)
    return jnp.mean(((frames - x) / 2) ** 2), mean


def measure(flat, videos, cfg) -> tuple[float, dict[str, list[float]]]:
    """PSNR in dB over the clips, and the latents' mean and standard deviation per channel."""
    errors, latents = zip(*(evaluate(flat, video, cfg=cfg) for video in videos), strict=True)
    z = np.concatenate([np.asarray(x).reshape(-1, cfg.latent_channels) for x in latents])
    statistics = {"mean": z.mean(0).tolist(), "std": z.std(0).tolist()}
    return float(-10 * np.log10(np.mean([float(e) for e in errors]))), statistics


def main(_):
    cache_dir.enable()
    cfg, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value).absolute()
    model = TINY_VAE
    optimizer, loss = OptimizerConfig(**cfg.optimizer), training.LossConfig(**cfg.loss)
    update = jax.jit(
        functools.partial(training.step, vae=model, loss_cfg=loss, cfg=optimizer), donate_argnums=0
    )
    data = batches(cfg, cfg.seed + 1)
    sample = np.concatenate([next(data) for _ in range(48 // cfg.batch)])
    state = training.create(linear_start(model, sample, cfg.seed), optimizer)
    logging.info("%d parameters", sum(x.size for x in state.weights.values()))
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    manager = ocp.CheckpointManager(workdir / "checkpoints", options=options)
    if manager.latest_step() is not None:
        state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        logging.info("resumed at step %d", state.step)
    first, start = int(state.step), time.time()
    held = batches(cfg, 10**6)
    held = [next(held) for _ in range(64 // cfg.batch)]
    for i in range(first, optimizer.steps):
        key = jax.random.fold_in(jax.random.key(cfg.seed), i)
        state, metrics = update(state, next(data), key)
        if (i + 1) % cfg.log_every == 0:
            psnr = [measure(flat, held, model)[0] for flat in (state.weights, state.ema)]
            message = "step %d  %.0f s  loss %.4f  KL %.2f  held out %.2f dB, averaged %.2f dB"
            seconds = time.time() - start
            logging.info(message, i + 1, seconds, metrics.loss, metrics.kl, *psnr)
        if (i + 1) % cfg.save_every == 0 or i + 1 == optimizer.steps:
            manager.save(i + 1, args=ocp.args.StandardSave(state))
            weights.save(workdir / "vae.safetensors", state.ema)
            statistics = json.dumps(measure(state.ema, held, model)[1])
            output.write_text(workdir / "statistics.json", statistics)
    manager.wait_until_finished()


if __name__ == "__main__":
    app.run(main)
