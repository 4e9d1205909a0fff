"""Training of the causal video VAE: reconstruction and a small KL term, on whole clips from a
video's start.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, UInt8
from optax.contrib import MuonDimensionNumbers, muon

from longlive_jax import weights
from longlive_jax.config import VAEConfig
from longlive_jax.train import state as train_state
from longlive_jax.train.state import OptimizerConfig, TrainState
from longlive_jax.vae.vae import VAE, generate, posterior

Clips = UInt8[Array, "b t H W 3"]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """mean |e| + squared · mean e² + kl · KL, e being the error of pixels in [0, 1] and KL in nats
    per latent number.
    """

    squared: float = 4.0
    kl: float = 5e-4


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Of one batch: the loss, the mean squared error in [0, 1] and the KL divergence per latent
    number.
    """

    loss: Float[Array, ""]
    mse: Float[Array, ""]
    kl: Float[Array, ""]


jax.tree_util.register_dataclass(Metrics)


def to_signed(video: Clips) -> Float[Array, "b t H W 3"]:
    """uint8 → [−1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def loss(vae: VAE, video: Clips, key: jax.Array, cfg: LossConfig) -> tuple[Array, Metrics]:
    """Of clips of 1 + 4n frames that begin a video; `key` draws from the posterior."""
    x = to_signed(video)
    mean, logvar, _ = posterior(vae, x)
    logvar = jnp.clip(logvar, -30.0, 20.0)
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    error = (generate(vae, z)[0] - x) / 2
    kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1.0 - logvar)
    mse = jnp.mean(error**2)
    value = jnp.mean(jnp.abs(error)) + cfg.squared * mse + cfg.kl * kl
    return value, Metrics(value, mse, kl)


def _axes(flat: Mapping[str, Any]) -> dict[str, MuonDimensionNumbers | None]:
    """Muon for every kernel, a convolution being the matrix of all its taps; Adam for norms and
    biases. optax also asks with the leaves of Adam masked out.
    """

    def axes(name: str, x: Any) -> MuonDimensionNumbers | None:
        if not name.endswith("kernel"):
            return None
        return MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

    return {name: axes(name, x) for name, x in flat.items()}


def optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Muon after clipping of the global norm."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip),
        muon(
            cfg.schedule(cfg.learning_rate),
            adam_learning_rate=cfg.schedule(cfg.learning_rate * cfg.adam_ratio),
            adam_b2=cfg.b2,
            muon_weight_dimension_numbers=_axes,
        ),
    )


def create(vae: VAE, cfg: OptimizerConfig) -> TrainState:
    flat = weights.flatten(vae)
    copy = jax.tree.map(jnp.copy, flat)
    return TrainState(jnp.zeros((), jnp.int32), flat, copy, optimizer(cfg).init(flat))


def step(
    state: TrainState,
    video: Clips,
    key: jax.Array,
    *,
    vae: VAEConfig,
    loss_cfg: LossConfig,
    cfg: OptimizerConfig,
) -> tuple[TrainState, Metrics]:
    """One update of weights and moving average. Pure; the configs are static."""
    abstract = nnx.eval_shape(lambda: VAE(vae, rngs=nnx.Rngs(0)))

    def run(flat: weights.Weights) -> tuple[Array, Metrics]:
        return loss(weights.unflatten(abstract, flat), video, key, loss_cfg)

    gradients, metrics = jax.grad(run, has_aux=True)(state.weights)
    updates, opt = optimizer(cfg).update(gradients, state.optimizer, state.weights)
    flat = optax.apply_updates(state.weights, updates)
    ema = train_state.average(state, flat, cfg)
    return TrainState(state.step + 1, flat, ema, opt), metrics
