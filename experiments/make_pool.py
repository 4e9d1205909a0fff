"""Renders and encodes videos of the toy world, the training data of the tiny transformer.

python experiments/make_pool.py --vae longlive_jax/weights/tiny/vae.safetensors --output pool
--shards 10
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import nnx

from longlive_jax import weights
from longlive_jax.config import TINY
from longlive_jax.data import toy_pool
from longlive_jax.vae.vae import VAE, encode

_VAE = flags.DEFINE_string("vae", None, "Weights of the tiny VAE.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder of the pool.", required=True)
_SHARDS = flags.DEFINE_integer("shards", 10, "How many shards.")
_FIRST = flags.DEFINE_integer("first", 0, "Seed of the first shard.")
_VIDEOS = flags.DEFINE_integer("videos", 200, "Videos in a shard.")


def main(_):
    abstract = nnx.eval_shape(lambda: VAE(TINY.vae, rngs=nnx.Rngs(0)))
    vae = weights.unflatten(abstract, weights.load(_VAE.value))
    step = jax.jit(lambda vae, x: encode(vae, x.astype(jnp.float32) / 127.5 - 1.0))
    output = pathlib.Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    for seed in range(_FIRST.value, _FIRST.value + _SHARDS.value):
        path = output / f"{seed:04d}.npz"
        if not path.exists():
            toy_pool.write_shard(
                path, seed, _VIDEOS.value, lambda x: np.asarray(step(vae, x)), toy_pool.PoolConfig()
            )
            logging.info("wrote %s", path)


if __name__ == "__main__":
    app.run(main)
