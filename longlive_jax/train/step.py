"""One step of teacher-forcing training, on any number of devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from longlive_kernels.nvfp4.linear import Recipe

from longlive_jax import sharding, weights
from longlive_jax.dit.model import DiT
from longlive_jax.flow import Flow
from longlive_jax.quant import learned
from longlive_jax.train import ar
from longlive_jax.train import state as train_state
from longlive_jax.train.ar import ARConfig, Videos
from longlive_jax.train.recycling import Errors, mistakes
from longlive_jax.train.state import OptimizerConfig, TrainState
from longlive_jax.weights import Weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a step leaves behind beside the new state.

    x0_error, noise_error: the errors that recycling collects, parts b f h w c; None without it. t:
    parts b f, the timestep that each frame had.
    """

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    t: Float[Array, "parts b f"]
    x0_error: Array | None = None
    noise_error: Array | None = None


@dataclasses.dataclass(frozen=True)
class Program:
    """What a step is compiled for. dtype: of the arithmetic; weights are kept in float32. recipe:
    of NVFP4 products in the blocks, None for none.
    """

    abstract: DiT
    cfg: ARConfig
    optimizer: OptimizerConfig
    mesh: Mesh
    dtype: Any = jnp.float32
    recycles: bool = False
    recipe: Recipe | None = None

    def compile(self) -> Callable[..., tuple[TrainState, Outcome]]:
        """(state, videos, key, recycled) -> state, outcome; the state is updated in place. `videos`
        are in parts, parts b …: their gradients are added up, as if they were one batch.
        """
        places = self.places()
        return jax.jit(self.step, donate_argnums=0, out_shardings=(places, None))

    def places(self) -> TrainState:
        """Where every leaf of the state lies: what belongs to a weight lies where the weight
        does.
        """
        flat = weights.flatten(self.abstract)
        of = sharding.of_weights(flat, self.mesh)
        whole = NamedSharding(self.mesh, PartitionSpec())

        def place(path: tuple, leaf: Any) -> NamedSharding:
            names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            fits = names and names[-1] in of and leaf.shape == flat[names[-1]].shape
            return of[names[-1]] if fits else whole

        made = jax.eval_shape(lambda: train_state.create(_zeros(flat), self.optimizer))
        return jax.tree.map_with_path(place, made)

    def videos(self, videos: Videos) -> Videos:
        """The videos of a step on their devices."""
        spread = PartitionSpec(None, sharding.BATCH, sharding.SEQ)
        whole = PartitionSpec(None, sharding.BATCH)
        specs = dict(latents=spread, context=whole, prompt=spread, valid=spread)
        put = lambda x, spec: jax.device_put(x, NamedSharding(self.mesh, spec))  # noqa: E731
        return Videos(**{name: put(getattr(videos, name), spec) for name, spec in specs.items()})

    def create(self, flat: Weights) -> TrainState:
        """A state that begins with these weights."""
        begin = functools.partial(train_state.create, cfg=self.optimizer)
        flat = {name: jnp.asarray(x, jnp.float32) for name, x in flat.items()}
        return jax.jit(begin, out_shardings=self.places())(flat)

    def step(
        self,
        state: TrainState,
        videos: Videos,
        key: jax.Array,
        recycled: Errors | None = None,
    ) -> tuple[TrainState, Outcome]:
        """One step, to be compiled."""
        parts, b = videos.latents.shape[:2]
        counted = videos.valid[:, :, 1:] if self.cfg.image else videos.valid
        counts = jnp.maximum(counted.sum(), 1.0)
        inputs = (videos, ar.video_keys(key, parts, b), recycled)

        def part(carry, given):
            total, gradients = carry
            (loss, aux), new = jax.value_and_grad(_loss, 1, has_aux=True)(
                self, state.weights, *given, counts
            )
            return (total + loss, jax.tree.map(jnp.add, gradients, new)), aux

        zero = jnp.zeros(()), _zeros(state.weights)
        (loss, gradients), aux = jax.lax.scan(part, zero, inputs)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in gradients.values()))
        return train_state.update(state, gradients, self.optimizer), Outcome(loss, norm, *aux)


def _zeros(flat: Weights) -> Weights:
    return {name: jnp.zeros(x.shape, jnp.float32) for name, x in flat.items()}


def _loss(
    program: Program,
    flat: Weights,
    videos: Videos,
    keys: Array,
    recycled: Errors | None,
    counts: Float[Array, ""],
) -> tuple[Float[Array, ""], tuple]:
    cfg, mesh = program.cfg, program.mesh
    given = {name: x.astype(program.dtype) for name, x in flat.items()}
    if program.recipe is not None:
        order = cfg.order(mesh.shape[sharding.SEQ])
        given |= learned.learn(flat, program.recipe, keys, order)
    dit = weights.unflatten(program.abstract, given)
    draws = ar.draw(keys, videos.latents.shape, cfg, mesh)
    if recycled is not None:
        errors = {f.name: getattr(recycled, f.name) for f in dataclasses.fields(recycled)}
        draws = dataclasses.replace(draws, **errors)
    made = ar.task(videos.latents, videos.valid, draws, cfg)
    text = dit.text_kv(videos.context.astype(program.dtype))
    v = ar.velocity(dit, made, text, videos.prompt, cfg, mesh)
    errors = mistakes(v, made, videos.latents, Flow(cfg.shift)) if program.recycles else ()
    return ar.loss_sum(v, made, cfg) / counts, (made.t, *errors)
