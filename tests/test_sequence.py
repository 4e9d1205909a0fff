"""What is judged of a video that is made clip by clip."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import streams
from training import SMALL

from longlive_jax import rollout
from longlive_jax.train import sequence
from longlive_jax.train.sequence import Plot
from longlive_jax.vae import vae as vaes

FIRST, NEW, CLIPS = 6, 4, 3  # latents of the first clip, and of each of the later ones


def test_a_clip_begins_with_a_picture_and_ends_with_what_is_new():
    """Its first frame is what the whole video so far shows there, encoded alone."""
    vae, cfg = streams.vae(), dataclasses.replace(SMALL, vae=streams.SMALL_VAE, height=16, width=16)
    memory, plot = rollout.begin(cfg, [0, 1]), _plot(jnp.zeros((2, 3), jnp.int32))
    length = FIRST + (CLIPS - 1) * NEW
    size = (2, length, cfg.latent_height, cfg.latent_width, vae.cfg.latent_channels)
    video = jax.random.normal(jax.random.key(0), size)
    made = sequence.open_(vae, cfg, plot, memory, video[:, :FIRST])
    extend = streams.jit(functools.partial(sequence.extend, vae))
    for end in range(FIRST + NEW, length + 1, NEW):
        made, shown, is_new = extend(made, memory, video[:, end - NEW : end])
        begin = end - FIRST
        pixels = vaes.decode(vae, video[:, : begin + 1])
        picture = vaes.encode(vae, jnp.clip(pixels[:, -1:], -1, 1))
        np.testing.assert_allclose(shown[:, :1], picture, atol=1e-5)
        np.testing.assert_array_equal(shown[:, 1:], video[:, begin + 1 : end])
        np.testing.assert_array_equal(made.latents, video[:, begin:end])
        np.testing.assert_array_equal(is_new, [[0] * (FIRST - NEW) + [1] * NEW] * 2)


def _plot(prompt):
    context = jnp.arange(2 * 3, dtype=jnp.float32).reshape(2, 3, 1, 1)
    none = jnp.zeros(prompt.shape, bool)
    return Plot(context, context[:, 0], prompt, none, none)


def test_a_clip_is_judged_by_its_prompts():
    """By those that its chunks were made under, or all by the last one's."""
    plot = _plot(jnp.asarray([[0, 0, 1, 1, 2], [0, 1, 1, 2, 2]], jnp.int32))

    def judged(newest):
        of = plot.prompts(jnp.int32(1), 3, newest)
        return jnp.take_along_axis(of.context[..., 0, 0], of.prompt, 1)

    np.testing.assert_array_equal(judged(False), [[0, 1, 1], [4, 4, 5]])
    np.testing.assert_array_equal(judged(True), [[1, 1, 1], [5, 5, 5]])
