"""What training carries from step to step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from longlive_jax.weights import Weights


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """One warm-up, a plateau, and a linear decay to `floor` over the last part of `steps`."""

    learning_rate: float
    steps: int
    kind: str = "adamw"  # or "muon": orthogonalised momentum for the matrices of the blocks
    adam_ratio: float = 0.2  # of the learning rate, for what muon leaves to Adam
    warmup: int = 50
    decay: float = 0.6  # share of the steps that decay
    floor: float = 0.02
    weight_decay: float = 1e-3
    b1: float = 0.9
    b2: float = 0.98
    clip: float = 1.0
    ema: float = 0.998
    ema_start: int = 0  # the average follows the weights themselves before this step

    def schedule(self, peak: float) -> optax.Schedule:
        plateau = max(int(self.steps * (1 - self.decay)), self.warmup)
        end = plateau + max(1, self.steps - int(self.steps * (1 - self.decay)))
        places = jnp.array([0.0, self.warmup, plateau, end])
        values = peak * jnp.array([0.0, 1.0, 1.0, self.floor])
        return lambda count: jnp.interp(jnp.asarray(count, jnp.float32), places, values)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The fields are typed loosely: a checkpoint's reader also fills them with names and shapes."""

    step: Any  # int32
    weights: Any  # Weights, as are the moving averages
    ema: Any
    optimizer: Any


def _muon_axes(weights: Mapping[str, Any]) -> dict[str, MuonDimensionNumbers | None]:
    """Muon for the kernels of the stacked blocks, Adam for everything else. optax also asks with
    the leaves of Adam masked out.
    """

    def axes(name: str, value: Any) -> MuonDimensionNumbers | None:
        stacked = "blocks." in name and name.endswith("kernel") and value.ndim == 3
        return MuonDimensionNumbers(reduction_axis=1, output_axis=2) if stacked else None

    return {name: axes(name, value) for name, value in weights.items()}


def optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
    clip = optax.clip_by_global_norm(cfg.clip)
    rate = cfg.schedule(cfg.learning_rate)
    if cfg.kind == "adamw":
        return optax.chain(
            clip, optax.adamw(rate, b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay)
        )
    if cfg.kind == "muon":
        adam = cfg.schedule(cfg.learning_rate * cfg.adam_ratio)
        return optax.chain(
            clip,
            muon(
                rate,
                adam_learning_rate=adam,
                adam_b2=cfg.b2,
                muon_weight_dimension_numbers=_muon_axes,
            ),
        )
    raise ValueError(f"unknown optimizer {cfg.kind!r}; choose adamw or muon")


def create(weights: Weights, cfg: OptimizerConfig) -> TrainState:
    copy = jax.tree.map(jnp.copy, dict(weights))
    return TrainState(jnp.zeros((), jnp.int32), dict(weights), copy, optimizer(cfg).init(weights))


def update(state: TrainState, gradients: Weights, cfg: OptimizerConfig) -> TrainState:
    """One optimiser step and one step of the moving average."""
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32 power
        updates, opt = optimizer(cfg).update(gradients, state.optimizer, state.weights)
    weights = optax.apply_updates(state.weights, updates)
    return TrainState(state.step + 1, weights, average(state, weights, cfg), opt)


def average(state: TrainState, weights: Weights, cfg: OptimizerConfig) -> Weights:
    """The moving average after a step to `weights`; it follows more closely while it is young."""
    age = (state.step - cfg.ema_start).astype(jnp.float32)
    decay = jnp.where(age < 0, 0.0, jnp.minimum(cfg.ema, (1.0 + age) / (10.0 + age)))
    return jax.tree.map(lambda e, w: e + (1.0 - decay) * (w - e), state.ema, weights)
