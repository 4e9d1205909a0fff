"""Reconstructions in pieces: the same as through the VAE at once, whatever the batch."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.config import TINY
from longlive_jax.eval.reconstruct import reconstructor
from longlive_jax.vae import vae as coder


def test_videos_come_back_in_order_and_as_through_the_whole_vae():
    vae = coder.VAE(TINY.vae, rngs=nnx.Rngs(0))
    videos = np.random.default_rng(0).integers(0, 256, (3, 33, 64, 64, 3), np.uint8)
    made = np.stack(list(reconstructor(TINY, vae, batch=2)(list(videos))))
    real = jnp.asarray(videos, jnp.float32) / 127.5 - 1.0
    whole = np.asarray(coder.decode(vae, coder.encode(vae, real)) + 1.0) * 127.5
    assert made.dtype == np.uint8
    assert np.abs(made - whole).max() <= 0.51
    assert np.ptp(whole) > 10  # there is something to compare
