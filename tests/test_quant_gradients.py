"""Gradients through matrices in fewer bits: those of the layers in front of them, and of a LoRA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import streams

import longlive_jax
from longlive_jax import layers, lora, weights
from longlive_jax.config import Precision
from longlive_jax.dit.attention import masked
from longlive_jax.dit.rope import phases
from longlive_jax.quant import kernels

KINDS = ("int8", "fp8", "nvfp4")
normal = np.random.default_rng(0).normal


def array(*shape):
    return jnp.asarray(normal(size=shape), jnp.float32)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_in_has_the_gradient_of_the_matrix_as_it_is_kept(kind, weights_only):
    """Rounding what comes in has none, and is passed over."""
    how = Precision.of(kind, weights_only=weights_only)
    kernel = kernels.make(array(32, 48), kind, how)
    x, grad = array(2, 3, 32), array(2, 3, 48)
    pull = lambda kernel, x: jax.vjp(functools.partial(layers.product, kernel), x)[1](grad)[0]  # noqa: E731
    found = streams.jit(pull)(kernel, x)
    expected = jnp.einsum("bno,io->bni", grad, kernel.dense())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_on_such_a_model_learns_in_every_layer(kind):
    """No A is without a gradient, once B is no longer zero; the first block's go through all."""
    tiny = longlive_jax.load("tiny")
    dit = tiny.quantized(kind).dit
    begun = lora.init(tiny.dit, 2, jax.random.key(0))
    begun = lora.Lora(begun.a, {path: array(*x.shape) / 100 for path, x in begun.b.items()})
    latents, t = array(1, 3, 8, 8, 16), jnp.full((1, 3), 500.0)
    context = array(1, 1, 40, 128)

    def loss(adapter):
        model = lora.apply(dit, adapter)
        position = jnp.arange(3, dtype=jnp.float32)[None]
        attn = masked(np.ones((3, 3), bool), phases(model.cfg, position, 4, 4))
        return jnp.mean(model(latents, t, model.text_kv(context), attn)[0] ** 2)

    found = streams.jit(jax.grad(loss))(begun)
    assert set(found.a) == {path for path in begun.a if f"{path}.kernel" in weights.flatten(dit)}
    for path, x in found.a.items():
        for layer in np.asarray(x):
            assert np.abs(layer).max() > 0, path
