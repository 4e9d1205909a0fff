"""Rectified flow: the noise levels, what corrupts a video, what a model learns, and the way back.

    corrupt   x_sigma = (1 - sigma) x0 + sigma noise
    target    v = d x_sigma / d sigma = noise - x0
    inverse   x0 = x_sigma - sigma v
    shift     sigma = s u / (1 + (s - 1) u), which moves u in [0, 1] towards noise for s > 1

Models read noise levels as timesteps, t = 1000 sigma, and were trained on a table of them. Turning
a velocity into a clean video therefore looks t up in that table: the nearest entry counts, also
where t lies between two of them or below the last.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

TRAIN_STEPS = 1000

Level = TypeVar("Level", float, np.ndarray, jax.Array)


def shift(u: Level, s: float) -> Level:
    """Noise level of the uniform level `u` under shift `s`. Keeps 0 and 1."""
    return s * u / (1.0 + (s - 1.0) * u)


def unshift(sigma: Level, s: float) -> Level:
    """Inverse of `shift`: the uniform level that it sends to `sigma`."""
    return sigma / (s - (s - 1.0) * sigma)


@dataclasses.dataclass(frozen=True)
class Flow:
    """The table of noise levels a model is trained on (`utils/scheduler.py:FlowMatchScheduler`).

    1000 levels from noise down; 0 is not one of them, the last is 0.00498 at shift 5. The tables
    are float64 and static; what is looked up in them comes out as float32. A hashable value: it may
    be a static argument.
    """

    shift: float

    @functools.cached_property
    def sigmas(self) -> np.ndarray:
        """Descending from 1."""
        return shift(np.linspace(1.0, 0.0, TRAIN_STEPS + 1)[:-1], self.shift)

    @functools.cached_property
    def timesteps(self) -> np.ndarray:
        """1000 sigma: what the model is told."""
        return TRAIN_STEPS * self.sigmas

    @functools.cached_property
    def weights(self) -> np.ndarray:
        """Loss weight of each level: a bell around t = 500, less its minimum, with mean 1."""
        bell = np.exp(-2.0 * ((self.timesteps - TRAIN_STEPS / 2) / TRAIN_STEPS) ** 2)
        bell = bell - bell.min()
        return bell / bell.mean()

    def index(self, t: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
        """The table's entry nearest to `t`; the noisier one of two equally near."""
        table = jnp.asarray(self.timesteps, jnp.float32)
        return jnp.argmin(jnp.abs(table - t.astype(jnp.float32)[..., None]), axis=-1)

    def timestep(self, index: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.asarray(self.timesteps, jnp.float32)[index]

    def sigma(self, t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Noise level of timestep `t`: the nearest in the table, so the last one for t = 0."""
        return jnp.asarray(self.sigmas, jnp.float32)[self.index(t)]

    def training_weight(self, t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.asarray(self.weights, jnp.float32)[self.index(t)]

    def to_x0(
        self, v: Float[Array, "*shape"], x: Float[Array, "*shape"], t: Float[Array, "*lead"]
    ) -> Float[Array, "*shape"]:
        """The clean video a velocity points at (`wan_5b_wrapper.py:_convert_flow_pred_to_x0`).

        t has any number of the leading axes of `x`: none (one for all), or b f. The arithmetic is
        float32, the result has the dtype of `v`.
        """
        sigma = _lead(self.sigma(t), x)
        return (x.astype(jnp.float32) - sigma * v.astype(jnp.float32)).astype(v.dtype)

    def to_velocity(
        self, x0: Float[Array, "*shape"], x: Float[Array, "*shape"], t: Float[Array, "*lead"]
    ) -> Float[Array, "*shape"]:
        """Inverse of `to_x0` (`_convert_x0_to_flow_pred`)."""
        sigma = _lead(self.sigma(t), x)
        return ((x.astype(jnp.float32) - x0.astype(jnp.float32)) / sigma).astype(x0.dtype)


def corrupt(
    clean: Float[Array, "*shape"], noise: Float[Array, "*shape"], sigma: Float[Array, "*lead"]
) -> Float[Array, "*shape"]:
    """(1 - sigma) clean + sigma noise, in the dtype of `noise`; the arithmetic is float32.

    sigma has any number of the leading axes of `clean`: none (one for all), or b f.
    (`FlowMatchScheduler.add_noise`, which looks its sigma up by timestep: `Flow.sigma`)
    """
    sigma = _lead(sigma.astype(jnp.float32), clean)
    mixed = (1.0 - sigma) * clean.astype(jnp.float32) + sigma * noise.astype(jnp.float32)
    return mixed.astype(noise.dtype)


def target(clean: Float[Array, "*shape"], noise: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The velocity that a model learns, the same at every noise level."""
    return noise - clean


def sample_index(
    key: jax.Array, batch: int, lengths: tuple[int, ...], *, stop: int = TRAIN_STEPS
) -> Int[Array, "b f"]:
    """One table entry per chunk, uniform in [0, stop), repeated over the chunk's latent frames.

    lengths: latent frames of each chunk, e.g. (8, 8, 8), or (1, 8, 8) with an independent first
    frame. A small `stop` keeps to the noisiest entries: the reference noises contexts that way.
    (`model/base.py:BaseModel._get_timestep`)
    """
    index = jax.random.randint(key, (batch, len(lengths)), 0, stop)
    return index[:, np.repeat(np.arange(len(lengths)), lengths)]


def velocity_loss(
    v: Float[Array, "b f h w c"],
    target: Float[Array, "b f h w c"],
    weight: Float[Array, "b f"],
    mask: Shaped[Array, "b f"] | None = None,
) -> Float[Array, ""]:
    """Mean over latent frames of weight * mean |v - target|^2, in float32.

    mask: 0 or 1, which frames count; all without one. An empty mask gives 0.
    (`model/diffusion.py:CausalDiffusion.generator_loss`)
    """
    error = (v.astype(jnp.float32) - target.astype(jnp.float32)) ** 2
    loss = jnp.mean(error, axis=(2, 3, 4)) * weight  # b f
    if mask is None:
        return jnp.mean(loss)
    mask = mask.astype(jnp.float32)
    return jnp.sum(loss * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def _lead(level: jax.Array, x: jax.Array) -> jax.Array:
    """Appends axes to `level` until it broadcasts from the left against `x`."""
    return level.reshape(level.shape + (1,) * (x.ndim - level.ndim))
