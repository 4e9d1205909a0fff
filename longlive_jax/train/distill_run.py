"""A distillation from beginning to end. Stopped at any time, also in the middle of a long
sequence, it goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

import longlive_jax
from longlive_jax import lora, sampler, sharding
from longlive_jax.config import ModelConfig, Precision, StreamConfig, folder_of
from longlive_jax.errors import InputError
from longlive_jax.flow import Flow
from longlive_jax.model import Model
from longlive_jax.quant import transformer
from longlive_jax.train import checkpoint, dmd, loop, metrics, samples, sequence
from longlive_jax.train.checkpoint import shapes
from longlive_jax.train.distill import Clips, DistillState, Frozen, Party, Program
from longlive_jax.train.dmd import DMDConfig
from longlive_jax.train.learning import Learning
from longlive_jax.train.prompts import PromptConfig, Prompts
from longlive_jax.train.self_forcing import SelfForcing
from longlive_jax.train.sequence import Plot, Sequence
from longlive_jax.train.state import optimizer
from longlive_jax.train.trainer import DTYPES
from longlive_jax.weights import Weights


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """A run. model: the student, a name or folder. teacher, critic: the real score, and what the
    fake score begins as; "" is the student's model. steps: of the student, 0 is the model's own
    number. timesteps: of these, where the model's solver has a list; empty is the model's own.
    precision: of frozen weights, of "student", "teacher" and "critic": int8, fp8 or nvfp4.
    every: critic steps for one of the student.
    """

    model: str
    prompts: PromptConfig
    clips: Clips
    judge: DMDConfig
    student: Party
    fake: Party
    stream: StreamConfig
    steps: int = 0
    timesteps: tuple[int, ...] = ()
    teacher: str = ""
    critic: str = ""
    through: str = "stop"
    same_exit: bool = True
    every: int = 5
    precision: tuple[tuple[str, str], ...] = ()
    data: int = 1  # the mesh
    fsdp: int = 1
    dtype: str = "float32"
    seed: int = 0
    log_every: int = 10
    save_every: int = 50
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ()
    sample_seconds: float = 10.0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Run:
    """A run in a folder.

    Raises:
      InputError: the config does not fit the devices, the models or the prompts: before anything
        is compiled.
    """

    def __init__(self, cfg: DistillConfig, workdir: pathlib.Path):
        check(cfg)
        dtype = DTYPES[cfg.dtype]
        mesh = sharding.make_mesh(cfg.data, cfg.fsdp)
        self.model = longlive_jax.load(cfg.model, dtype=dtype).streaming(**vars(cfg.stream))
        self.cfg, self.workdir = cfg, workdir
        self.program = program(cfg, self.model.config, mesh)
        self.frozen = frozen(cfg, self.model, self.program)
        self.prompts = Prompts(self.model, cfg.prompts, mesh)
        self.sequence: Sequence | None = None
        compile_ = functools.partial(self.program.compile, frozen=self.frozen)
        self._compiled = functools.cache(compile_)
        self.checkpoints = checkpoint.of_run(workdir, _inputs(cfg))

    def train(self) -> DistillState:
        """Trains until the last step, from the last checkpoint if there is one. On SIGTERM or
        SIGINT the run is saved, and this returns early.

        Raises:
          loop.Stopped: a loss is no number.
          InputError: the folder holds another run, or nothing can be written.
        """
        cfg = self.cfg
        every = loop.Every(
            cfg.student.optimizer.steps, cfg.log_every, cfg.save_every, cfg.sample_every
        )
        try:
            with loop.signals() as told:
                state = self._begin()
                to = metrics.Metrics(self.workdir, int(state.step))
                work = loop.Work(self._step, self._save, self._sample)
                places = dict(mesh=self.program.mesh, checkpoints=self.checkpoints)
                with contextlib.closing(to):
                    return loop.run(state, work, every, told=told, to=to, **places)
        finally:
            self.checkpoints.close()

    def finish(self, state: DistillState) -> None:
        """Writes the averaged LoRA of a run that is over, alone: `lora.safetensors`. Of several
        processes, one does.
        """
        learning = self.program.student.learning
        if not learning.rank or int(state.step) < self.cfg.student.optimizer.steps:
            return
        learned = self._averaged(state)
        if jax.process_index() == 0:
            path = self.workdir / "lora.safetensors"
            lora.save(path, learning.adapter(learned))
            logging.info("wrote %s", path)

    def _begin(self) -> DistillState:
        program, key = self.program, jax.random.key(self.cfg.seed)
        make = functools.partial(program.create, key=key)
        places = program.places(self.frozen)
        state = jax.jit(make, out_shardings=places)(self.frozen)
        if self.checkpoints.latest is None:
            return state
        like = shapes(state, places)
        state, position, kept = self.checkpoints.restore(like, self.cfg.to_json())
        self.prompts.set_state(position)
        self.sequence = self._restored(kept)
        logging.info("resumed at step %d", int(state.step))
        return state

    def _restored(self, kept: dict[str, Any]) -> Sequence | None:
        """The sequence that was on its way, from the arrays of `_arrays`."""
        if not kept:
            return None
        plot = next(self.prompts)
        self.prompts.taken -= self.cfg.prompts.batch
        leaves, tree = sequence_like(self.program, self.frozen, plot)
        if any(x.size and str(i) not in kept for i, x in enumerate(leaves)):
            raise InputError(f"{self.workdir} holds a run whose sequences are of another kind")
        found = [_typed(kept.get(str(i)), x) for i, x in enumerate(leaves)]
        return sequence.spread(jax.tree.unflatten(tree, found), self.program.mesh)

    def _step(self, state: DistillState, step: int) -> tuple[DistillState, loop.Found]:
        """One of the student in every few, and always one of the critic, each on a clip of its
        own.
        """
        found: loop.Found = {}
        key = jax.random.fold_in(jax.random.key(self.cfg.seed), step)
        order = ("student", "critic") if step % self.cfg.every == 0 else ("critic",)
        for number, which in enumerate(order):
            state, numbers = self._half(state, which, jax.random.fold_in(key, number))
            found |= numbers
        return state, found

    def _half(
        self, state: DistillState, which: str, key: jax.Array
    ) -> tuple[DistillState, loop.Found]:
        clips, goes_on = self.program.clips, self.program.clips.length > self.program.clips.first
        given = self.sequence
        if given is not None and not clips.fits(given.chunks):
            given = None
        begins = given is None
        run = self._compiled(which, begins=begins, goes_on=goes_on)
        given = next(self.prompts) if begins else given
        state, self.sequence, numbers = run(state, self.frozen, given, key)
        return state, numbers

    def _save(self, state: DistillState) -> None:
        kept = None
        if self.sequence is not None:
            leaves = jax.tree.leaves(self.sequence)
            # Orbax has no place for what has no number in it.
            kept = {str(i): _plain(x) for i, x in enumerate(leaves) if x.size}
        self.checkpoints.save(state, self.prompts.get_state(), self.cfg.to_json(), kept)

    def _sample(self, state: DistillState, step: int) -> None:
        cfg, learned = self.cfg, self._averaged(state)
        if jax.process_index() == 0:
            model = tuned(self.model, self.program.student.learning, learned)
            folder = self.workdir / "samples" / f"{step:06d}"
            samples.write(model, cfg.sample_prompts, cfg.sample_seconds, folder)

    def _averaged(self, state: DistillState) -> Weights:
        """On one device of each process, which must all ask for it."""
        return {name: jnp.asarray(sharding.whole(x)) for name, x in state.ema.items()}


def sequence_like(program: Program, frozen: Frozen, plot: Plot) -> tuple[list[Any], Any]:
    """The leaves of a sequence by shape and type, and what they are leaves of."""
    trees = []

    def run(state: DistillState, frozen: Frozen, plot: Plot, key: jax.Array) -> list[jax.Array]:
        made = program.critic_step(state, frozen, plot, key, begins=True, goes_on=True)[1]
        leaves, tree = jax.tree.flatten(made)
        trees.append(tree)
        return leaves

    key = jax.random.key(0)
    state = jax.eval_shape(functools.partial(program.create, key=key), frozen)
    return jax.eval_shape(run, state, frozen, plot, key), trees[0]


def _plain(x: jax.Array) -> jax.Array:
    """Keys of noise as the numbers that they are."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _typed(x: jax.Array | None, like: jax.ShapeDtypeStruct) -> jax.Array:
    if x is None:
        return jnp.zeros(like.shape, like.dtype)
    key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
    return jax.random.wrap_key_data(jnp.asarray(x)) if key else jnp.asarray(x)


def _inputs(cfg: DistillConfig) -> list[tuple[str, pathlib.Path]]:
    """Return the files and folders that a run reads, each with its place in the config."""
    models = {"model": cfg.model, "teacher": cfg.teacher, "critic": cfg.critic}
    folders = [(name, folder_of(given)) for name, given in models.items() if given]
    return [*folders, ("prompts.file", pathlib.Path(cfg.prompts.file))]


def check(cfg: DistillConfig) -> None:
    """Raises InputError where parts of a config do not go together."""
    if cfg.dtype not in DTYPES:
        raise InputError(f"dtype {cfg.dtype!r}: choose one of {', '.join(DTYPES)}")
    for party in (cfg.student, cfg.fake):
        try:
            optimizer(party.optimizer)
        except ValueError as error:
            raise InputError(str(error)) from error
    if cfg.every < 1:
        raise InputError(f"the student takes a step every {cfg.every}: at least every 1")
    if cfg.prompts.chunks != cfg.clips.length:
        raise InputError(
            f"prompts are for sequences of {cfg.prompts.chunks} chunks, clips for sequences of"
            f" {cfg.clips.length}"
        )
    _check_switches(cfg)
    if cfg.judge.chunk != cfg.stream.chunk:
        raise InputError(
            f"clips are judged in chunks of {cfg.judge.chunk}, and made in chunks of"
            f" {cfg.stream.chunk}"
        )
    ranks = {"student": cfg.student.learning.rank, "critic": cfg.fake.learning.rank, "teacher": 1}
    for role, kind in cfg.precision:
        if not ranks.get(role, 1):
            raise InputError(f"the {role} in {kind}: what is learned whole stays as it is")


def _check_switches(cfg: DistillConfig) -> None:
    clips = cfg.clips
    within = [chunk for chunk in cfg.prompts.switches if not clips.begins(chunk)]
    if clips.newest and within:
        raise InputError(
            f"a switch at chunk {within[0]} is inside a clip, which is judged by one prompt: clips"
            f" begin at chunks {clips.first}, {clips.first + clips.next}, …"
        )


def tuned(model: Model, learning: Learning, learned: dict[str, Any]) -> Model:
    """The student as a model, of weights or of a LoRA."""
    dtype = jax.tree.leaves(model.dit)[0].dtype
    return dataclasses.replace(model, dit=learning.build(model.dit, learned, dtype))


def program(cfg: DistillConfig, config: ModelConfig, mesh: Any) -> Program:
    """Raises InputError for steps or a way through the memory that there are none of."""
    sampling = config.sampler
    if cfg.steps:
        sampling = dataclasses.replace(sampling, steps=cfg.steps)
    if cfg.timesteps:
        sampling = dataclasses.replace(sampling, timesteps=cfg.timesteps)
    try:
        solver, levels = sampler.make(sampling), Flow(sampling.shift)
        roll = SelfForcing(cfg.stream, solver, levels, through=cfg.through)
    except ValueError as error:
        raise InputError(f"the student cannot be rolled out: {error}") from error
    dtype = DTYPES[cfg.dtype]
    return Program(
        config, cfg.student, cfg.fake, roll, cfg.judge, cfg.clips, mesh, dtype, cfg.same_exit
    )


def frozen(cfg: DistillConfig, model: Model, program: Program) -> Frozen:
    """The networks that stay as they are, each in its place and precision."""
    dits = {"student": model.dit}
    frames, tokens = cfg.clips.first * cfg.stream.chunk, model.config.tokens_per_frame
    for role, name in (("teacher", cfg.teacher), ("critic", cfg.critic)):
        other = model if not name else longlive_jax.load(name, dtype=program.dtype)
        dmd.check(model.dit, other.dit, role)
        dmd.check_attention(other.dit, frames, tokens, cfg.judge, program.dtype)
        dits[role] = other.dit
    for role, kind in cfg.precision:
        if role not in dits:
            raise InputError(f"precision of {role!r}: choose {', '.join(dits)}")
        try:
            how = Precision.of(kind)
        except ValueError as error:
            raise InputError(f"precision of the {role}: {error}") from error
        dits[role] = jax.jit(functools.partial(transformer.quantize, how=how))(dits[role])
    placed = {
        role: jax.device_put(dit, sharding.of_module(dit, program.mesh))
        for role, dit in dits.items()
    }
    vae = model.vae if program.clips.length > program.clips.first else None
    return Frozen(placed["student"], placed["critic"], placed["teacher"], vae)
