"""`longlive plan --train`: will teacher forcing of videos of that length fit on those devices, what
do they send each other in a step, and is any of them idle? Answered before anyone waits.

A mesh AxB is A groups (`fsdp`) with videos of their own, and B ranks (`seq`) of each group's
sequence. Where weights, moving averages and the optimiser's moments lie is asked of `sharding`.
A step is `step.Program` in bfloat16, AdamW, blocks computed again for their gradient, one prompt,
one video in each group and part. The VAE's encoder runs before it: it is in the work of the ranks,
not in the bytes of a step.

Three ways are compared:

    alone     no SP: a device has the whole sequence. Nothing to balance.
    plain     plain SP: rank p has the p-th part of [all clean, all noisy]. It encodes the whole
              video and keeps its part.
    balanced  Balanced SP: rank p has both halves of the p-th part of the video, and encodes that
              part; its layers get what came before from the left neighbour (`vae/sharded.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from longlive_kernels import absent_gpu

from longlive_jax import footprint, gpus, plan, sharding, weights
from longlive_jax.config import ModelConfig
from longlive_jax.dit.model import DiT
from longlive_jax.errors import InputError
from longlive_jax.plan import gigabytes
from longlive_jax.train import ar, collectives, work
from longlive_jax.train import state as train_state
from longlive_jax.train.ar import ARConfig, Videos
from longlive_jax.train.state import OptimizerConfig, TrainState
from longlive_jax.train.step import Program
from longlive_jax.version import __version__

ADAMW = OptimizerConfig(learning_rate=1e-5, steps=1000)
ITEM = jnp.dtype(jnp.bfloat16).itemsize


@dataclasses.dataclass(frozen=True)
class Ask:
    """What to plan. latents: of each video, in the place of `seconds`. accumulate: parts of a step
    whose gradients are added up.
    """

    preset: str
    seconds: float = 10.0
    gpu: str = "h100"
    mesh: str = "1x1"
    latents: int | None = None
    accumulate: int = 1
    source: str = "auto"

    def check(self) -> Ask:
        """Itself, if it can be planned.

        Raises:
          InputError: what is wrong with it.
        """
        plan.Ask(self.preset, self.seconds, self.gpu, source=self.source).check()
        ar.check(learned(self.config), self.length, self.config.dit.heads, self.shape[1])
        return self

    @property
    def config(self) -> ModelConfig:
        return plan.PRESETS[self.preset]

    @property
    def shape(self) -> tuple[int, int]:
        """Groups, and ranks of a sequence. Raises InputError for what is none."""
        return plan.Ask(self.preset, self.seconds, mesh=self.mesh).shape

    @property
    def wanted(self) -> int:
        """Latents in `seconds`."""
        return math.ceil(self.seconds * self.config.fps / self.config.vae.time_stride)

    @property
    def length(self) -> int:
        """Latents of a video: as many as were asked for, filled up to whole chunks on every
        rank.
        """
        if self.latents is not None:
            return self.latents
        multiple = self.shape[1] * self.config.stream.chunk
        return multiple * math.ceil(self.wanted / multiple)

    @property
    def rounded(self) -> str:
        """What was filled up, in words; empty if nothing."""
        if self.latents is not None or self.length == self.wanted:
            return ""
        seconds = self.length * self.config.vae.time_stride / self.config.fps
        return (
            f"{self.seconds:g} s are {self.wanted} latents; {self.shape[1]} ranks of whole chunks"
            f" of {self.config.stream.chunk} take {self.length} ({seconds:.1f} s)"
        )


def learned(cfg: ModelConfig, *, balanced: bool = True) -> ARConfig:
    return ARConfig(cfg.stream, balanced=balanced)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device. activations: all that a step needs beside its arguments, so gradients
    and the weights in bfloat16 too.
    """

    weights: int
    ema: int
    optimizer: int
    videos: int
    activations: int

    @property
    def peak(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step needs. collectives: bytes of the results that a device gets from each kind, in
    one step.
    """

    activations: int
    collectives: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The answer; `to_json` is its schema."""

    ask: Ask
    memory: Memory
    step: Step
    plain_moves: int  # bytes that plain SP's collectives bring a device beyond those of Balanced SP
    work: dict[str, work.Work]
    share: float  # of the weights, that each device has
    source: str  # of activations and collectives: "compiled" or "formula"
    notes: tuple[str, ...]
    fits: bool
    how: str  # one sentence: what to do

    def to_json(self) -> str:
        """One object: the ask, bytes per device, bytes sent, work of the ranks, the verdict."""
        ask, cfg = self.ask, self.ask.config
        body = {
            "version": __version__,
            "ask": dataclasses.asdict(ask),
            "model": cfg.name,
            "latents": ask.length,
            "frames": ask.length * cfg.vae.time_stride - (cfg.vae.time_stride - 1),
            "gpu": dataclasses.asdict(gpus.find(ask.gpu)),
            "groups": ask.shape[0],
            "ranks": ask.shape[1],
            "share_of_weights": self.share,
            "peak_bytes_per_device": dataclasses.asdict(self.memory) | {"peak": self.memory.peak},
            "collective_bytes": self.step.collectives,
            "plain_moves_bytes": self.plain_moves,
            "balance": {way: done.balance for way, done in self.work.items()},
            "flops_of_slowest_rank": {way: done.slowest for way, done in self.work.items()},
            "vae_latents": {way: done.latents for way, done in self.work.items()},
            "vae": work.encoding(ask.config, ask.length, ask.shape[1]),
            "source": self.source,
            "notes": self.notes,
            "fits": self.fits,
            "how": self.how,
        }
        return json.dumps(body, indent=2) + "\n"


def make(ask: Ask) -> Plan:
    """The plan of a checked ask. Compiles two programs, for half a minute each, where the compiler
    for GPUs is installed and `ask.source` lets it.

    Raises:
      InputError: the compiler was asked for and is not installed.
    """
    missing = _missing(ask.source)
    measure = formula if missing else compiled
    step = measure(ask)
    plain = measure(ask, balanced=False) if ask.shape[1] > 1 else step
    memory, gpu = resident(ask, step.activations), gpus.find(ask.gpu)
    total = lambda step: sum(step.collectives.values())  # noqa: E731
    return Plan(
        ask=ask,
        memory=memory,
        step=step,
        plain_moves=total(plain) - total(step),
        work=work.of_ways(ask.config, ask.length, ask.shape[1]),
        share=share_of_weights(ask),
        source="formula" if missing else "compiled",
        notes=tuple(note for note in (ask.rounded, missing) if note),
        fits=plan.room(gpu, memory.peak) is not None,
        how=advise(ask, memory),
    )


def _missing(source: str) -> str:
    """Why nothing is compiled; empty if it is."""
    if source == "formula":
        return "the formula was asked for"
    if footprint.toolchain():
        return ""
    missing = "the compiler for GPUs is not installed (pip install 'longlive-jax[aot]')"
    if source == "compiled":
        raise InputError(f"--source compiled: {missing}")
    return missing


# What is where.


@functools.cache
def _model(cfg: ModelConfig) -> DiT:
    """The transformer, by shape, in float32."""
    return nnx.eval_shape(lambda: DiT(cfg.dit, rngs=nnx.Rngs(0)))


def program(cfg: ModelConfig, mesh: Mesh, *, balanced: bool = True) -> Program:
    return Program(_model(cfg), learned(cfg, balanced=balanced), ADAMW, mesh, jnp.bfloat16)


def _places(cfg: ModelConfig, mesh: Mesh) -> TrainState:
    """Where a state lies. Asked under a trace, in which shapes are arrays, as types want them."""
    kept = []

    def ask(flat: weights.Weights) -> None:
        model = weights.unflatten(_model(cfg), flat)
        kept.append(dataclasses.replace(program(cfg, mesh), abstract=model).places())

    jax.eval_shape(ask, weights.flatten(_model(cfg)))
    return kept[0]


def drawn(shape: tuple[int, int]) -> Mesh:
    """A mesh of one device many times over: it says where things would lie, and no more."""
    same = np.full((1, *shape), jax.devices()[0])
    return Mesh(same, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def devices(gpu: gpus.GPU, shape: tuple[int, int]) -> Mesh:
    """A mesh of GPUs that need not be there."""
    groups, ranks = shape
    found = absent_gpu.devices(gpu.name, gpu.describe(), groups * ranks)
    return sharding.make_mesh(1, groups, ranks, devices=found)


@functools.cache
def _state(cfg: ModelConfig) -> TrainState:
    """By shape."""
    flat = weights.flatten(_model(cfg))

    def make():
        return train_state.create({name: jnp.zeros(x.shape) for name, x in flat.items()}, ADAMW)

    return jax.eval_shape(make)


def share_of_weights(ask: Ask) -> float:
    """The share of the weights that a device has."""
    places, state = _places(ask.config, drawn(ask.shape)), _state(ask.config)
    return _bytes(state.weights, places.weights) / footprint.nbytes(state.weights)


def _videos(ask: Ask) -> tuple[list, Any]:
    """The videos of a step, flat: shapes and places of the leaves, and their structure."""
    cfg, n, parts, groups = ask.config, ask.length, ask.accumulate, ask.shape[0]
    spread = PartitionSpec(None, sharding.BATCH, sharding.SEQ)
    whole = PartitionSpec(None, sharding.BATCH)
    picture = (cfg.latent_height, cfg.latent_width, cfg.dit.channels)
    fields = dict(
        latents=((n, *picture), jnp.float32, spread),
        context=((1, cfg.dit.text_len, cfg.dit.text_dim), jnp.float32, whole),
        prompt=((n // cfg.stream.chunk,), jnp.int32, spread),
        valid=((n,), jnp.float32, spread),
    )
    kept = []

    def make():
        zeros = {k: jnp.zeros((parts, groups, *s), d) for k, (s, d, _) in fields.items()}
        leaves, structure = jax.tree.flatten(Videos(**zeros))
        kept.append(structure)
        return leaves

    leaves = jax.eval_shape(make)
    return list(zip(leaves, (spec for *_, spec in fields.values()), strict=True)), kept[0]


def _bytes(tree: Any, places: Any) -> int:
    """Of the part that one device has."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
    return sum(math.prod(at.shard_shape(x.shape)) * x.dtype.itemsize for x, at in pairs)


def resident(ask: Ask, activations: int) -> Memory:
    """Bytes on a device, with these activations."""
    mesh, state = drawn(ask.shape), _state(ask.config)
    places = _places(ask.config, mesh)
    videos = [(x, NamedSharding(mesh, spec)) for x, spec in _videos(ask)[0]]
    return Memory(
        weights=_bytes(state.weights, places.weights),
        ema=_bytes(state.ema, places.ema),
        optimizer=_bytes(state.optimizer, places.optimizer),
        videos=sum(_bytes(x, at) for x, at in videos),
        activations=activations,
    )


# What a step needs.


def lower(ask: Ask, mesh: Mesh, *, balanced: bool = True) -> jax.stages.Lowered:
    """A step by shape. Over leaves: what is lowered has shapes where the types of a dataclass want
    arrays.
    """
    run, whole = program(ask.config, mesh, balanced=balanced), NamedSharding(mesh, PartitionSpec())
    describe = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)  # noqa: E731
    state, tree = jax.tree.flatten(_state(ask.config))
    places = jax.tree.leaves(_places(ask.config, mesh))
    given, videos = _videos(ask)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def step(state: list, given: list, key: jax.Array) -> tuple[list, list]:
        new, outcome = run.step(tree.unflatten(state), videos.unflatten(given), key)
        return jax.tree.leaves(new), jax.tree.leaves(outcome)

    return jax.jit(step, donate_argnums=0, out_shardings=(places, None)).lower(
        [describe(x, at) for x, at in zip(state, places, strict=True)],
        [describe(x, NamedSharding(mesh, spec)) for x, spec in given],
        describe(key, whole),
    )


def compiled(ask: Ask, *, balanced: bool = True) -> Step:
    """Of the step compiled for those GPUs, all its layers. Its layers are one loop, so this takes
    as long for 2 as for 30.
    """
    mesh = devices(gpus.find(ask.gpu), ask.shape)
    with absent_gpu.target(mesh.devices.flat[0]):
        done = lower(ask, mesh, balanced=balanced).compile()
    memory = done.memory_analysis()
    above = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    return Step(above, collectives.nbytes(done.as_text()))


# As programs compiled for an H100 have it. NARROW, WIDE: arrays of a rank's tokens in bfloat16, as
# wide as the model and as its MLP, that the gradient of a block holds beside the block's input.
# MOVED: latents in float32 that plain SP's order costs a rank.
NARROW, WIDE, MOVED = 38, 4, 7


def formula(ask: Ask, *, balanced: bool = True) -> Step:
    """Without a compiler:

        weights and their gradients in bfloat16, the sum of gradients in float32 if there are parts
        + the input of every block + what one block holds for its gradient

    and what the ranks exchange (Ulysses: q, k, v and back, in the forward, again, and for the
    gradient), the gradients that are summed, the weights that are gathered.
    """
    cfg, (groups, ranks), parts = ask.config.dit, ask.shape, ask.accumulate
    local = resident(ask, 0).weights // 4
    whole = footprint.nbytes(_state(ask.config).weights) // 4
    tokens = 2 * ask.length * ask.config.tokens_per_frame // ranks
    unit = tokens * cfg.dim * ITEM
    block = (NARROW + WIDE * cfg.ffn_dim / cfg.dim) * unit
    gathered = 0 if local == whole else 2 * ITEM * whole // cfg.layers
    kept = local * (2 * ITEM + (4 if parts > 1 else 0)) + gathered
    summed = "reduce-scatter" if local < whole else "all-reduce"
    sent = {
        "all-to-all": 12 * unit * cfg.layers * parts * (ranks > 1),
        summed: ITEM * local * parts * (groups * ranks > 1),
        "all-gather": 2 * ITEM * whole * parts * (local < whole),  # forward, and again
        "collective-permute": 0 if balanced else _moved(ask) * (ranks > 1),
    }
    return Step(
        int(kept + cfg.layers * unit + block), {kind: int(n) for kind, n in sent.items() if n}
    )


def _moved(ask: Ask) -> int:
    """Bytes that plain SP moves to a rank: latents and noisy ones into its order, velocities out of
    it.
    """
    cfg = ask.config
    numbers = ask.length * cfg.latent_height * cfg.latent_width * cfg.dit.channels
    return MOVED * 4 * numbers * ask.accumulate // ask.shape[1]


# In words.


def advise(ask: Ask, memory: Memory) -> str:
    """One sentence: that it fits, or what would."""
    gpu = gpus.find(ask.gpu)
    sizes = f"{gigabytes(memory.peak)} of {gigabytes(gpu.memory)}"
    room = plan.room(gpu, memory.peak)
    if room is not None:
        more = f" with XLA_PYTHON_CLIENT_MEM_FRACTION={room:.2f} set" if room > plan.SHARE else ""
        return f"Fits{more}: {sizes}."
    larger = [other for other in gpus.GPUS.values() if plan.room(other, memory.peak) is not None]
    larger.sort(key=lambda other: other.memory)
    words = [f"it would on {larger[0].title} (--gpu {larger[0].name})"] if larger else []
    groups = _groups_needed(ask, memory)
    if groups:
        words.append(f"here with weights over more groups (--mesh {groups}x{ask.shape[1]})")
    held = gigabytes(memory.weights + memory.ema + memory.optimizer)
    share = _share(share_of_weights(ask))
    where = f"{held} of it weights, average and moments, {share} on every device"
    return f"Does not fit: {sizes}, {where}; {' or '.join(words) or 'shorten the videos'}."


def _share(share: float) -> str:
    return "whole" if share > 0.99 else f"1/{1 / share:.3g}"


def _groups_needed(ask: Ask, memory: Memory) -> int:
    """Fewest groups over which the weights must be spread, by what that changes in the formula; 0
    if none are enough.
    """
    before, gpu = formula(ask).activations, gpus.find(ask.gpu)
    for groups in (2**i for i in range(1, 7)):
        change = dataclasses.replace(ask, mesh=f"{groups}x{ask.shape[1]}")
        after = memory.activations + formula(change).activations - before
        if groups > ask.shape[0] and plan.room(gpu, resident(change, after).peak) is not None:
            return groups
    return 0


def show(made: Plan, to_stderr: bool) -> None:
    """Prints the plan as tables."""
    from rich.console import Console
    from rich.table import Table

    ask, gpu = made.ask, gpus.find(made.ask.gpu)
    title = f"{ask.config.name}, training, {ask.length} latents, {gpu.title}, mesh {ask.mesh}"
    table = Table("on each device", "bytes", "what it is", title=title)
    for name, size, what in rows(made):
        table.add_row(name, gigabytes(size), what)
    ways = Table("work, most over mean", *made.work, title="balance of the ranks")
    for part in ("dit", "vae", "loss", "total"):
        ways.add_row(part, *(f"{done.balance[part]:.3f}" for done in made.work.values()))
    slowest = [done.slowest["total"] / 1e12 for done in made.work.values()]
    ways.add_row("TFLOP of the slowest", *(f"{x:,.0f}" for x in slowest))
    latents = [max(done.latents) for done in made.work.values()]
    ways.add_row("latents it encodes", *map(str, latents))
    console = Console(stderr=to_stderr)
    console.print(table, markup=False)
    console.print(ways, markup=False)
    moved = f"Plain SP moves {gigabytes(made.plain_moves)} more to each device in a step."
    source = {
        "compiled": f"Activations and collectives: of the step compiled for {gpu.title}.",
        "formula": "Activations and collectives: by formula.",
    }[made.source]
    for line in (source, moved, *(f"Note: {note}." for note in made.notes), made.how):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def rows(made: Plan) -> list[tuple[str, int, str]]:
    """Name, bytes and meaning of what is in memory, and of what is sent."""
    memory, share = made.memory, _share(made.share)
    held = [
        ("weights", memory.weights, f"float32, {share}"),
        ("moving average", memory.ema, f"float32, {share}"),
        ("optimiser", memory.optimizer, f"two moments, {share}"),
        ("videos", memory.videos, "latents and one prompt each"),
        ("activations", memory.activations, "gradients and weights in bf16 included"),
        ("peak", memory.peak, "of a step"),
    ]
    return held + [(kind, size, "sent, a step") for kind, size in made.step.collectives.items()]
