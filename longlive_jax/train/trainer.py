"""A teacher-forcing run from beginning to end: read, step, report, save; stopped at any time, it
goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from longlive_kernels.nvfp4.linear import Recipe

from longlive_jax import gpus, sharding, weights
from longlive_jax.config import ModelConfig, folder_of
from longlive_jax.dit import mask
from longlive_jax.dit.model import DiT
from longlive_jax.errors import InputError
from longlive_jax.flow import Flow
from longlive_jax.model import Model
from longlive_jax.train import ar, checkpoint, loop, metrics, samples, source
from longlive_jax.train.ar import ARConfig, Videos
from longlive_jax.train.checkpoint import shapes
from longlive_jax.train.recycling import Errors, Recycler, RecyclingConfig
from longlive_jax.train.source import Source, SourceConfig
from longlive_jax.train.state import OptimizerConfig, TrainState, optimizer
from longlive_jax.train.step import Program

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run. `model` is a name or folder; its transformer is tuned, or begins anew with
    `fresh`.
    """

    model: str
    source: SourceConfig
    ar: ARConfig
    optimizer: OptimizerConfig
    data: int = 1  # the mesh
    fsdp: int = 1
    seq: int = 1
    fresh: bool = False
    dtype: str = "float32"
    nvfp4: Recipe | None = None  # of products in the blocks
    recycling: RecyclingConfig | None = None
    seed: int = 0
    log_every: int = 10
    save_every: int = 100
    sample_every: int = 0  # steps between sample videos, 0: none
    sample_prompts: tuple[str, ...] = ()
    sample_seconds: float = 10.0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Run:
    """A run in a folder.

    Raises:
      InputError: the config does not fit the devices, the model or the data: before anything is
        compiled.
    """

    def __init__(self, cfg: TrainConfig, model: Model, workdir: pathlib.Path):
        model = dataclasses.replace(  # videos are cut, and samples made, as the run says
            model, config=dataclasses.replace(model.config, stream=cfg.ar.stream)
        )
        self.cfg, self.model, self.workdir = cfg, model, workdir
        mesh = sharding.make_mesh(cfg.data, cfg.fsdp, cfg.seq)
        _check_config(cfg)
        frames = cfg.source.chunks * cfg.ar.stream.chunk
        ar.check(cfg.ar, frames, model.config.dit.heads, cfg.seq)
        ar.check_attention(cfg.ar, model.config, frames, cfg.seq, DTYPES[cfg.dtype])
        source.check(cfg.source, mesh)
        self.videos = Source(model, cfg.source, mesh)
        recycles = cfg.recycling is not None
        dtype = DTYPES[cfg.dtype]
        parts = model.dit, cfg.ar, cfg.optimizer, mesh
        self.program = Program(*parts, dtype, recycles, cfg.nvfp4)
        self.recycler = _recycler(cfg, model.config) if recycles else None
        self.checkpoints = checkpoint.of_run(workdir, _inputs(cfg))

    def train(self) -> TrainState:
        """Trains until `optimizer.steps`, from the last checkpoint if there is one. On SIGTERM or
        SIGINT the run is saved, and this returns early.

        Raises:
          loop.Stopped: the loss is no number.
          InputError: the folder holds another run, nothing can be written, or no video be read.
        """
        try:
            with loop.signals() as told:
                state = self._begin()
                told_to = metrics.Metrics(self.workdir, int(state.step))
                with contextlib.closing(told_to):
                    return self._steps(state, told, told_to)
        finally:
            self.videos.close()
            self.checkpoints.close()

    def _begin(self) -> TrainState:
        """The last checkpoint's state, or a new one of the model's weights."""
        cfg, program = self.cfg, self.program
        dit = _fresh(self.model.config, cfg.seed) if cfg.fresh else self.model.dit
        state = program.create(weights.flatten(dit))
        if self.checkpoints.latest is None:
            return state
        like = shapes(state, program.places())
        state, position, errors = self.checkpoints.restore(like, cfg.to_json())
        self.videos.set_state(position)
        if self.recycler is not None and errors:
            self.recycler.restore(errors)
        logging.info("resumed at step %d", int(state.step))
        return state

    def _steps(self, state: TrainState, told: list[int], to: metrics.Metrics) -> TrainState:
        cfg, run = self.cfg, self.program.compile()
        work = loop.Work(
            functools.partial(self._step, run), self._save, self._sample, _Rate(cfg, self.model)
        )
        every = loop.Every(cfg.optimizer.steps, cfg.log_every, cfg.save_every, cfg.sample_every)
        places = dict(mesh=self.program.mesh, checkpoints=self.checkpoints)
        return loop.run(state, work, every, told=told, to=to, **places)

    def _step(self, run: Callable, state: TrainState, step: int) -> tuple[TrainState, loop.Found]:
        given, key = next(self.videos), jax.random.fold_in(jax.random.key(self.cfg.seed), step)
        errors = None if self.recycler is None else self._inject(step, key, given)
        state, outcome = run(state, given, key, errors)
        if self.recycler is not None:
            found = (outcome.t, outcome.x0_error, outcome.noise_error, given.valid)
            self.recycler.update(step, *map(_flat, found))
        return state, {"loss": outcome.loss, "norm": outcome.gradient_norm}

    def _inject(self, step: int, key: jax.Array, given: Videos) -> Errors:
        """Errors for a step, in parts. Its timesteps are drawn as the step will draw them."""
        parts, b, frames = given.latents.shape[:3]
        keys = ar.video_keys(key, parts, b).reshape(-1)
        errors = self.recycler.inject(step, np.asarray(ar.timesteps(keys, frames, self.cfg.ar)))
        shape, where = given.latents.shape, given.latents.sharding
        place = lambda x: jax.make_array_from_callback(  # noqa: E731
            shape, where, x.reshape(shape).__getitem__
        )
        return jax.tree.map(place, errors)

    def _save(self, state: TrainState) -> None:
        errors = None if self.recycler is None else self.recycler.state()
        self.checkpoints.save(state, self.videos.get_state(), self.cfg.to_json(), errors)

    def _sample(self, state: TrainState, step: int) -> None:
        cfg, model = self.cfg, _averaged(self.model, state)
        if model is not None:
            folder = self.workdir / "samples" / f"{step:06d}"
            samples.write(model, cfg.sample_prompts, cfg.sample_seconds, folder)


def _inputs(cfg: TrainConfig) -> list[tuple[str, pathlib.Path | None]]:
    """Return the folders that a run reads and keeps latents in, by their place in the config."""
    cache = pathlib.Path(cfg.source.cache) if cfg.source.cache else None
    return [
        ("model", folder_of(cfg.model)),
        ("source.folder", pathlib.Path(cfg.source.folder)),
        ("source.cache", cache),
    ]


def _check_config(cfg: TrainConfig) -> None:
    if cfg.dtype not in DTYPES:
        raise InputError(f"dtype {cfg.dtype!r}: choose one of {', '.join(DTYPES)}")
    try:
        optimizer(cfg.optimizer)
    except ValueError as error:
        raise InputError(str(error)) from error


def _flat(x: jax.Array) -> np.ndarray:
    """parts b … -> b …, on the host."""
    return sharding.whole(x).reshape(-1, *x.shape[2:])


def _fresh(config: ModelConfig, seed: int) -> DiT:
    return jax.jit(lambda key: DiT(config.dit, rngs=nnx.Rngs(key)))(jax.random.key(seed))


def _recycler(cfg: TrainConfig, config: ModelConfig) -> Recycler:
    shape = (cfg.ar.stream.chunk, config.latent_height, config.latent_width, config.dit.channels)
    return Recycler(cfg.recycling, shape, Flow(cfg.ar.shift), cfg.seed)


class _Rate:
    """Steps, tokens and, where the device's peak is known, the share of it that is used."""

    def __init__(self, cfg: TrainConfig, model: Model):
        config, frames = model.config, cfg.source.chunks * cfg.ar.stream.chunk
        sequences = cfg.source.batch * cfg.source.parts
        table = cfg.ar.order(cfg.seq).table(mask.clean(frames, cfg.ar.stream.chunk))
        per_frame = config.tokens_per_frame
        self.tokens = sequences * 2 * frames * per_frame
        flat = weights.flatten(model.dit)
        linear = (x.size for name, x in flat.items() if name.endswith("kernel") and x.ndim > 1)
        counts = {
            "tokens": self.tokens,
            "weights": sum(linear),
            "pairs": sequences * int(table.sum()) * per_frame**2,
            "width": config.dit.dim,
            "layers": config.dit.layers,
        }
        self.flops = metrics.flops(counts)
        self.peak = gpus.peak_flops(jax.devices()[0].device_kind)
        self.devices = cfg.data * cfg.fsdp * cfg.seq

    def __call__(self, seconds: float) -> dict[str, float]:
        said = {"step_s": seconds, "tokens_s": self.tokens / seconds}
        if self.peak:
            said["mfu"] = self.flops / seconds / (self.peak * self.devices)
        return said


def _averaged(model: Model, state: TrainState) -> Model | None:
    """The model with averaged weights; None in processes that make no samples."""
    averaged, own = {}, weights.flatten(model.dit)
    for name, x in state.ema.items():
        x = sharding.whole(x)  # all processes take part; one makes the videos, on one device
        if jax.process_index() == 0:
            averaged[name] = jnp.asarray(x, own[name].dtype)
    if not averaged:
        return None
    return dataclasses.replace(model, dit=weights.unflatten(model.dit, averaged))
