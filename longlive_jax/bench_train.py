"""What a step of teacher forcing costs, by how its sequence is spread over devices and by what it
keeps; `longlive bench --suite train`.

Virtual devices of one CPU share its cores: what is measured there is all the work of all ranks. On
devices of their own it is the time of the slowest.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from longlive_kernels.attention.chunk_table import Table as Rows
from longlive_kernels.attention.chunk_table import chunk_table
from longlive_kernels.attention.chunk_table.api import BACKENDS

from longlive_jax import interrupts, report, sharding, timeline, weights
from longlive_jax.config import ModelConfig
from longlive_jax.dit import mask
from longlive_jax.dit.attention import Table, as_table
from longlive_jax.dit.model import REMAT
from longlive_jax.train import ar
from longlive_jax.train.ar import ARConfig, Videos
from longlive_jax.train.order import Order
from longlive_jax.train.state import OptimizerConfig, TrainState
from longlive_jax.train.step import Program
from longlive_jax.vae.sharded import encode_rank, encode_with_halo, halo, lay_out, windows
from longlive_jax.vae.vae import encode

OPTIMIZER = OptimizerConfig(learning_rate=1e-5, steps=1000)
LENGTH = 192  # latent frames over which attention is measured; and over half, and twice as many
FULL = "RESOURCE_EXHAUSTED"  # how XLA says that memory is full
DENSE = 2 << 30  # bytes: larger scores are not written out


@dataclasses.dataclass(frozen=True)
class Spread:
    """One step and the encoding of its video over so many ranks. ratio: of the two together, to
    those of one device. halo_s: encoding by halo windows, rank after rank on one device.
    """

    step_s: float
    encode_s: float
    ratio: float
    halo_s: float


@dataclasses.dataclass(frozen=True)
class Step:
    """One step on one device. temporary_bytes: at their highest, beside state and videos."""

    step_s: float
    temporary_bytes: int


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention of one layer and sequence, and with its gradient; bytes beside the operands."""

    forward_s: float
    gradient_s: float
    forward_bytes: int
    gradient_bytes: int


@dataclasses.dataclass(frozen=True)
class TrainReport(report.Head):
    """Medians over repeats, after one of each for warm-up.

    spread: by SP and ranks ("balanced 4"). remat: by what blocks keep for their gradient.
    attention: by backend and latent frames ("xla 192"; "reference" writes out all scores, also the
    hidden ones). refused: what did not fit into memory.
    """

    latents: int
    batch: int
    repeats: int
    spread: dict[str, Spread]
    remat: dict[str, Step]
    attention: dict[str, Attention]
    refused: dict[str, str]
    devices: int


def run(
    model: Any,
    *,
    seconds: float,
    repeat: int,
    seed: int,
    batch: int = 2,
    ranks: Sequence[int] = (1, 2, 4, 8),
) -> TrainReport:
    """Measures steps of random videos, cut to whole chunks on every rank, over as many of `ranks`
    as there are devices, 1 always among them.

    Raises:
      InputError: there are fewer chunks than ranks, or the model's heads do not divide over them.
    """
    cfg = model.config
    ranks = [n for n in ranks if n <= jax.device_count()]
    chunks = timeline.chunk_count(cfg, seconds)
    chunks -= chunks % ranks[-1] if chunks > ranks[-1] else 0  # whole ones on every rank
    frames = chunks * cfg.stream.chunk
    given = videos(cfg, batch, frames, seed)
    for n in ranks:  # before anything is measured
        ar.check(ARConfig(cfg.stream), frames, cfg.dit.heads, n)
    clock = functools.partial(median_seconds, repeat=repeat)
    refused: dict[str, str] = {}
    tried = functools.partial(attempt, refused)
    steps = {name: tried(f"remat {name}", step_of, model, given, name, clock) for name in REMAT}
    return TrainReport(
        **report.head("train", model, seed),
        latents=frames,
        batch=batch,
        repeats=repeat,
        spread=tried("spread", spreads, model, given, ranks, clock) or {},
        remat={name: step for name, step in steps.items() if step is not None},
        attention=attentions(cfg, dtype_of(model), seed, clock, tried),
        refused=refused,
        devices=jax.device_count(),
    )


Clock = Callable[[Callable[[], Any]], float]


def attempt(refused: dict[str, str], name: str, act: Callable, *arguments: Any) -> Any:
    """What `act` returns; None where that does not fit into memory, `refused` then says why."""
    try:
        return act(*arguments)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and FULL not in str(error):
            raise
        refused[name] = str(error).splitlines()[0]
        return None


def median_seconds(act: Callable[[], Any], repeat: int) -> float:
    """Of a call that was made once before, results waited for."""
    jax.block_until_ready(act())

    def once() -> float:
        interrupts.stop.check()
        start = time.perf_counter()
        jax.block_until_ready(act())
        return time.perf_counter() - start

    return statistics.median(once() for _ in range(repeat))


def videos(cfg: ModelConfig, b: int, frames: int, seed: int) -> Videos:
    """Random ones, in one part, under one prompt."""
    keys = jax.random.split(jax.random.key(seed))
    shape = (1, b, frames, cfg.latent_height, cfg.latent_width, cfg.dit.channels)
    return Videos(
        latents=jax.random.normal(keys[0], shape),
        context=jax.random.normal(keys[1], (1, b, 1, cfg.dit.text_len, cfg.dit.text_dim)),
        prompt=jnp.zeros((1, b, frames // cfg.stream.chunk), jnp.int32),
        valid=jnp.ones((1, b, frames)),
    )


def spreads(model: Any, given: Videos, ranks: Sequence[int], clock: Clock) -> dict[str, Spread]:
    cfg, found = model.config, {}
    for n in ranks:
        mesh = sharding.make_mesh(seq=n)
        for name, balanced in (("plain", False), ("balanced", True)):
            step_s = clock(stepper(model, given, ARConfig(cfg.stream, balanced=balanced), mesh)[0])
            encode_s = clock(encoder(model, given, mesh, balanced))
            found[f"{name} {n}"] = step_s, encode_s, clock(halo_encoder(model, given, n))
    alone = sum(found["balanced 1"][:2])
    return {
        name: Spread(step_s, encode_s, (step_s + encode_s) / alone, halo_s)
        for name, (step_s, encode_s, halo_s) in found.items()
    }


def step_of(model: Any, given: Videos, remat: str, clock: Clock) -> Step:
    cfg = ARConfig(model.config.stream, remat=remat)
    act, program = stepper(model, given, cfg, sharding.make_mesh())
    return Step(clock(act), program.memory_analysis().temp_size_in_bytes)


def stepper(
    model: Any, given: Videos, cfg: ARConfig, mesh: Mesh
) -> tuple[Callable[[], Any], jax.stages.Compiled]:
    """A call that trains for one more step, and its program."""
    program = Program(model.dit, cfg, OPTIMIZER, mesh, dtype_of(model))
    state, key = program.create(weights.flatten(model.dit)), jax.random.key(0)
    leaves, tree = jax.tree.flatten(program.videos(given))  # as `train.plan.lower` does

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(program.places(), None))
    def step(state: TrainState, leaves: list[jax.Array], key: jax.Array) -> tuple:
        state, outcome = program.step(state, tree.unflatten(leaves), key)
        return state, outcome.loss

    compiled = step.lower(state, leaves, key).compile()
    report.check_room(compiled)

    def act() -> jax.Array:
        nonlocal state
        state, loss = compiled(state, leaves, key)
        return loss

    return act, compiled


def encoder(model: Any, given: Videos, mesh: Mesh, balanced: bool) -> Callable[[], Any]:
    """A call that encodes the videos: each rank its part of them, or as in plain SP all of them."""
    video = pixels(model.config, given)
    if balanced:
        video, place = lay_out(model.config.vae, video), PartitionSpec(sharding.BATCH, sharding.SEQ)
        local = encode_rank
    else:
        place, local = PartitionSpec(sharding.BATCH), encode
    spread = dict(in_specs=(PartitionSpec(), place), out_specs=place, check_vma=balanced)
    program = jax.jit(jax.shard_map(local, mesh=mesh, **spread))
    return functools.partial(program, model.vae, jax.device_put(video, NamedSharding(mesh, place)))


def halo_encoder(model: Any, given: Videos, ranks: int) -> Callable[[], Any]:
    """A call that encodes the videos rank by rank, each from its window with a halo."""
    run = jax.jit(encode_with_halo, static_argnames="window")
    video, reach = pixels(model.config, given), halo(model.config.vae)
    parts = windows(given.latents.shape[2], ranks, reach, model.config.vae.time_stride)
    return lambda: [run(model.vae, video, window) for window in parts]


def pixels(cfg: ModelConfig, given: Videos) -> jax.Array:
    """Random frames of as many videos, as long."""
    _, b, frames = given.latents.shape[:3]
    count = (frames - 1) * cfg.vae.time_stride + 1
    shape = (b, count, cfg.height, cfg.width, 3)
    return jax.random.uniform(jax.random.key(1), shape, minval=-1.0)


def dtype_of(model: Any) -> Any:
    """In which a model computes."""
    return model.dit.patch_embedding.bias[...].dtype


def attentions(
    cfg: ModelConfig, dtype: Any, seed: int, clock: Clock, tried: Callable
) -> dict[str, Attention]:
    found = {}
    for frames in (LENGTH // 2, LENGTH, 2 * LENGTH):
        frames -= frames % cfg.stream.chunk
        table = as_table(Order().table(mask.clean(frames, cfg.stream.chunk)))
        shape = (1, 2 * frames * cfg.tokens_per_frame, cfg.dit.heads, cfg.dit.head_dim)
        keys = jax.random.split(jax.random.key(seed), 3)
        args = [jax.random.normal(key, shape, dtype) for key in keys]
        scores = 4 * cfg.dit.heads * shape[1] ** 2
        for backend in able(table, args, dense=scores <= DENSE):
            attend = functools.partial(chunk_table, table=table, implementation=backend)
            name = f"{backend} {frames}"
            measured = tried(f"attention {name}", _attention, attend, args, clock)
            found |= {} if measured is None else {name: measured}
    return found


def able(table: Table, args: Sequence[jax.Array], dense: bool) -> list[str]:
    """The backends of `chunk_table` that have the call here; the reference writes scores out."""
    found = [
        name
        for name, backend in BACKENDS.items()
        if backend.unsupported(*args, Rows.of(table)) is None
    ]
    return [name for name in found if dense or name != "reference"]


def _attention(attend: Callable, args: Sequence[jax.Array], clock: Clock) -> Attention:
    forward = jax.jit(attend).lower(*args).compile()
    gradient = jax.grad(lambda *x: jnp.sum(attend(*x) ** 2), (0, 1, 2))
    gradient = jax.jit(gradient).lower(*args).compile()
    report.check_room(forward), report.check_room(gradient)
    bytes_of = lambda program: program.memory_analysis().temp_size_in_bytes  # noqa: E731
    return Attention(
        clock(functools.partial(forward, *args)),
        clock(functools.partial(gradient, *args)),
        bytes_of(forward),
        bytes_of(gradient),
    )
