"""The embedding of timesteps in float32, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import sampler
from longlive_jax.config import SamplerConfig
from longlive_jax.dit.timestep import sinusoid
from longlive_jax.flow import Flow

# Half of it is what rounding a number near 1 to float32 costs.
BOUND = 2.0**-24


def of_solvers():
    """Every timestep that a solver of up to 50 steps, or a training table, asks a model for."""
    found = [Flow(shift).timesteps for shift in (1.0, 3.0, 5.0, 8.0)]
    for name in ("euler", "unipc", "dpmpp", "renoise"):
        for steps in (1, 2, 3, 4, 8, 50):
            found.append(sampler.make(SamplerConfig(name, steps=steps, shift=5.0)).rows[0])
    return np.concatenate(found)


TIMESTEPS = {
    "whole": np.arange(1001),
    "of solvers": of_solvers(),
    "with all bits": np.random.default_rng(0).uniform(0, 1000, 2000),
    "small": 10.0 ** np.random.default_rng(1).uniform(-8, 0, 500),
    "negative": -np.random.default_rng(2).uniform(0, 1000, 500),
    "large": np.random.default_rng(3).uniform(0, 2**20, 500),
}


def exact(t, dim):
    """The references' formula in float64, of timesteps that are float32."""
    frequency = np.power(10000.0, -np.arange(dim // 2, dtype=np.float64) / (dim // 2))
    angle = np.outer(np.float64(np.float32(t)), frequency)
    return np.concatenate([np.cos(angle), np.sin(angle)], 1)


@pytest.mark.parametrize("dim", [32, 256])
@pytest.mark.parametrize("kind", TIMESTEPS)
def test_embeddings_are_float64_rounded(kind, dim):
    """Traced, so that the compiler sees all of the arithmetic."""
    t = np.float32(TIMESTEPS[kind])
    found = jax.jit(sinusoid, static_argnums=1)(jnp.asarray(t), dim)
    assert found.dtype == jnp.float32 and found.shape == (len(t), dim)
    assert np.abs(np.float64(found) - exact(t, dim)).max() <= BOUND


def test_embeddings_survive_every_optimisation():
    """As a constant of the program, and as what a loop carries, at the compiler's full strength."""
    t = np.float32([0.0, 20.0, 937.5, 2500 / 3, 999.0, 1000.0])

    def scanned(t):
        return jax.lax.scan(lambda _, one: (None, sinusoid(one, 256)), None, t)[1]

    strength = {"xla_backend_optimization_level": 3}
    whole = jax.jit(lambda: sinusoid(jnp.asarray(t), 256)).lower().compile(strength)()
    for found in (whole, jax.jit(scanned).lower(jnp.asarray(t)).compile(strength)(jnp.asarray(t))):
        assert np.abs(np.float64(found) - exact(t, 256)).max() <= BOUND


def test_leading_axes_are_kept():
    t = np.float32([[0.0, 500.0, 1000.0], [20.0, 937.5, 250.0]])
    found = sinusoid(jnp.asarray(t, jnp.bfloat16), 64)
    rounded = np.float32(jnp.asarray(t, jnp.bfloat16))
    np.testing.assert_allclose(
        found, exact(rounded.ravel(), 64).reshape(2, 3, 64), rtol=0, atol=BOUND
    )
