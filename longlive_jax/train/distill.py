"""The two steps of distillation, on any number of devices: the student learns from a clip of its
own, and the fake score from the next one (LongLive 2.0 section 4.1; LongLive 1.0 section 3.2;
`trainer/distillation.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from longlive_jax import rollout, sharding
from longlive_jax.config import ModelConfig
from longlive_jax.dit.model import DiT
from longlive_jax.rollout import Latents, Rollout
from longlive_jax.train import ar, dmd, self_forcing, sequence
from longlive_jax.train import state as train_state
from longlive_jax.train.dmd import DMDConfig, Shown
from longlive_jax.train.learning import Learning
from longlive_jax.train.self_forcing import Clip, Script, SelfForcing
from longlive_jax.train.sequence import Plot, Sequence
from longlive_jax.train.state import OptimizerConfig, TrainState
from longlive_jax.vae.vae import VAE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistillState:
    """weights, ema, optimizer: the student's. critic: the fake score's `TrainState`."""

    step: Any  # int32
    weights: Any
    ema: Any
    optimizer: Any
    critic: Any

    @property
    def student(self) -> TrainState:
        return TrainState(self.step, self.weights, self.ema, self.optimizer)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What stays as it is. student, critic: what a LoRA is beside; the weights' shapes where all
    of them are learned. vae: what encodes the first frame of a clip in a long sequence.
    """

    student: DiT
    critic: DiT
    teacher: DiT
    vae: VAE | None = None


@dataclasses.dataclass(frozen=True)
class Party:
    """A network that learns: what, and how."""

    learning: Learning
    optimizer: OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Clips:
    """How a sequence is cut into clips, in chunks. first: the first clip, and what is judged at a
    time. next: new chunks of every later one, which are fewer: a clip begins with frames of the one
    before. length: of a sequence; `first` for single clips. newest: all of a clip is judged by its
    last chunk's prompt, as LongLive 1.0 does.
    """

    first: int
    next: int
    length: int
    newest: bool = False

    def __post_init__(self):
        if not 0 < self.next <= self.first <= self.length:
            raise ValueError(
                f"clips of {self.first} and {self.next} chunks do not fit sequences of"
                f" {self.length}: next <= first <= length"
            )
        if self.length > self.first and self.next == self.first:
            raise ValueError(
                f"clips that go on bring fewer than the {self.first} chunks that are judged at a"
                " time: next < first"
            )

    def begins(self, chunk: int) -> bool:
        """Whether the new part of a clip begins with it."""
        return chunk == 0 or chunk >= self.first and (chunk - self.first) % self.next == 0

    def fits(self, made: int) -> bool:
        """Whether a sequence of `made` chunks takes one more clip."""
        return made + self.next <= self.length


@dataclasses.dataclass(frozen=True)
class Program:
    """What steps are compiled for. dtype: of the arithmetic. same_exit: all chunks of a clip stop
    at one step.
    """

    model: ModelConfig
    student: Party
    critic: Party
    roll: SelfForcing
    judge: DMDConfig
    clips: Clips
    mesh: Mesh
    dtype: Any = jnp.float32
    same_exit: bool = True

    def create(self, frozen: Frozen, key: Array) -> DistillState:
        """The state before the first step."""
        keys = jax.random.split(key)
        made = [
            train_state.create(party.learning.begin(dit, key), party.optimizer)
            for party, dit, key in zip(
                (self.student, self.critic), (frozen.student, frozen.critic), keys, strict=True
            )
        ]
        student, critic = made
        return DistillState(student.step, student.weights, student.ema, student.optimizer, critic)

    def places(self, frozen: Frozen) -> DistillState:
        """Where every leaf of the state lies: what belongs to a weight lies where the weight
        does.
        """
        state = jax.eval_shape(functools.partial(self.create, key=jax.random.key(0)), frozen)
        whole = NamedSharding(self.mesh, PartitionSpec())

        def of(path: tuple, leaf: Any) -> NamedSharding:
            names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            return sharding.of_weight(names[-1], leaf.shape, self.mesh) if names else whole

        return jax.tree.map_with_path(of, state)

    def compile(self, which: str, frozen: Frozen, *, begins: bool, goes_on: bool) -> Callable:
        """A step of the "student" or the "critic", on the first clip of a sequence or a later one:
        (state, frozen, plot or sequence, key) -> state, sequence or None, losses. The state and the
        sequence are updated in place. goes_on: whether the sequence is wanted.
        """
        step = {"student": self.student_step, "critic": self.critic_step}[which]
        run = functools.partial(step, begins=begins, goes_on=goes_on)
        donated = (0,) if begins else (0, 2)
        places = self.places(frozen)
        return jax.jit(run, donate_argnums=donated, out_shardings=(places, None, None))

    def student_step(
        self,
        state: DistillState,
        frozen: Frozen,
        given: Plot | Sequence,
        key: Array,
        *,
        begins: bool,
        goes_on: bool,
    ) -> tuple[DistillState, Sequence | None, dict[str, Array]]:
        """Makes the next clip, and moves the student the way that the scores point."""
        made = self._clip(state, frozen, given, key, begins, goes_on)
        fake = self._fake(frozen, state.critic.weights)
        loss, cotangent, apart = dmd.gradient(
            frozen.teacher, fake, made.shown, made.prompts, self.judge, self.mesh
        )
        new = made.clip.latents.shape[1]
        gradients = self_forcing.gradient(
            functools.partial(self._build, frozen),
            state.weights,
            made.memory,
            made.script,
            made.clip,
            cotangent[:, -new:],
            self.roll,
        )
        student = train_state.update(state.student, gradients, self.student.optimizer)
        found = {"student": loss, "student_norm": _norm(gradients), "apart": apart}
        own = {name: getattr(student, name) for name in ("weights", "ema", "optimizer")}
        return dataclasses.replace(state, **own), made.sequence, found

    def critic_step(
        self,
        state: DistillState,
        frozen: Frozen,
        given: Plot | Sequence,
        key: Array,
        *,
        begins: bool,
        goes_on: bool,
    ) -> tuple[DistillState, Sequence | None, dict[str, Array]]:
        """Makes the next clip, and teaches the fake score what it looks like. Ends a step."""
        made = self._clip(state, frozen, given, key, begins, goes_on)

        def loss(learned: dict[str, Array]) -> Float[Array, ""]:
            fake = self._fake(frozen, learned)
            return dmd.critic_loss(fake, made.shown, made.prompts, self.judge, self.mesh)

        value, gradients = jax.value_and_grad(loss)(state.critic.weights)
        critic = train_state.update(state.critic, gradients, self.critic.optimizer)
        found = {"critic": value, "critic_norm": _norm(gradients)}
        return dataclasses.replace(state, step=state.step + 1, critic=critic), made.sequence, found

    def _build(self, frozen: Frozen, learned: dict[str, Array]) -> DiT:
        return self.student.learning.build(frozen.student, learned, self.dtype)

    def _fake(self, frozen: Frozen, learned: dict[str, Array]) -> DiT:
        return self.critic.learning.build(frozen.critic, learned, self.dtype)

    def _clip(
        self,
        state: DistillState,
        frozen: Frozen,
        given: Plot | Sequence,
        key: Array,
        begins: bool,
        goes_on: bool,
    ) -> Made:
        """The next clip of the student, with noise on it."""
        plot = given if begins else given.plot
        lie = jax.lax.with_sharding_constraint
        spread = functools.partial(sequence.spread, mesh=self.mesh, how=lie)
        exits, level, noise, start = jax.random.split(key, 4)
        chunks = self.clips.first if begins else self.clips.next
        if begins:
            keys = ar.video_keys(start, 1, plot.prompt.shape[0])[0]
            memory = spread(rollout.start(self.model, keys, self.dtype, self.mesh))
            at = jnp.int32(0)
        else:
            memory, at = given.memory, given.memory.chunk[0]
        script = plot.script(at, chunks)
        exits = self_forcing.draw_exits(exits, chunks, self.roll, self.same_exit)
        dit = self._build(frozen, state.weights)
        after, clip = self_forcing.roll(dit, memory, script, exits, self.roll)
        latents, is_new, kept = clip.latents, jnp.ones(clip.latents.shape[:2]), None
        if not begins:
            kept, latents, is_new = sequence.extend(frozen.vae, given, after, latents)
        elif goes_on:
            kept = sequence.open_(frozen.vae, self.model, plot, after, latents)
        kept = spread(kept) if goes_on else None
        shown = self._shown(latents, is_new, plot, begins, exits[0], level, noise)
        of = plot.prompts(at + chunks - self.clips.first, self.clips.first, self.clips.newest)
        return Made(memory, script, clip, kept, shown, of)

    def _shown(
        self,
        latents: Latents,
        is_new: Float[Array, "b f"],
        plot: Plot,
        begins: bool,
        exit_: Array,
        level: Array,
        noise: Array,
    ) -> Shown:
        """At timesteps of its own for every video (and chunk), with noise of its own."""
        b, frames = latents.shape[:2]
        told = [step.timestep for step in self.roll.solver.steps]
        low, high = dmd.bounds(exit_, told, self.judge)
        count = len(self.judge.spans(frames)) if self.judge.per_chunk else 1

        def draw(of_level: Array, of_noise: Array) -> tuple[Array, Array]:
            index = jax.random.randint(of_level, (count,), low, high)
            return index, jax.random.normal(of_noise, latents.shape[1:], latents.dtype)

        keys = (ar.video_keys(key, 1, b)[0] for key in (level, noise))
        index, noise = jax.vmap(draw)(*keys)
        known = None if plot.given is None or not begins else jnp.arange(frames) == 0
        t = dmd.timesteps(index, self.judge, frames)
        noise = sharding.frames(noise, self.mesh)
        return dmd.show(jax.lax.stop_gradient(latents), noise, t, self.judge, is_new, known)


@dataclasses.dataclass(frozen=True)
class Made:
    """A clip, what it was made of, and what is judged of it by which prompts."""

    memory: Rollout
    script: Script
    clip: Clip
    sequence: Sequence | None
    shown: Shown
    prompts: dmd.Prompts


def _norm(gradients: dict[str, Array]) -> Float[Array, ""]:
    return jnp.sqrt(sum(jnp.sum(g.astype(jnp.float32) ** 2) for g in gradients.values()))
