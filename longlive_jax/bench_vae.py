"""What decoding costs, stage by stage, for every decoder that a model has, in float32 and in
bfloat16, and what its convolutions would cost in other ways; `longlive bench --suite vae`.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from longlive_jax import bench_convolutions, bench_model, report, rollout, weights
from longlive_jax import model as models
from longlive_jax.bench import CompileClock
from longlive_jax.bench_session import timed
from longlive_jax.config import ModelConfig
from longlive_jax.vae import vae as coder
from longlive_jax.vae.build import build
from longlive_jax.vae.fold import pixel_shuffle, unpatchify
from longlive_jax.vae.layers import Level, chain
from longlive_jax.vae.tae import TAE, Grow
from longlive_jax.vae.vae import VAE

DTYPES = ("float32", "bfloat16")
BASE = "full float32"  # what the others are compared with

# What one stage does: the VAE, its input and its part of the carry → its output, its next carry.
Stage = Callable[[Any, Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """One decoder in one type, in the middle of a stream, where one executable decodes every chunk.
    Seconds are medians.
    """

    chunk_s: float
    best_s: float
    fps: float
    stages: dict[str, float]  # seconds of each, compiled by itself
    stages_s: float  # their sum, beside `chunk_s`
    # Of a convolution as a stage's blocks have it, by way (`bench_convolutions.WAYS`).
    convolutions: dict[str, dict[str, float]]
    temporary_bytes: int  # at their highest, beside weights, carry and latents
    compile_s: float


@dataclasses.dataclass(frozen=True)
class VaeReport(report.Head):
    """Medians over repeats, after two chunks for warm-up; pictures stay on the device. By decoder
    and type, such as "full float32".
    """

    width: int
    height: int
    latents: int  # of a chunk
    frames: int  # that they become
    repeats: int
    decoders: dict[str, Decoding]
    ratios: dict[str, float]  # how many times as fast as `BASE`, where that fits
    refused: dict[str, str]  # what was not measured, and why
    peak_memory_bytes: int  # of the device; on CPUs of the process


def run(model: Any, *, repeat: int, seed: int) -> VaeReport:
    """Measures every decoder in both types, one after the other.

    Args:
      model: What `longlive_jax.load` returns, with its full VAE.
      repeat: How many chunks are measured.
      seed: Of the latents.
    """
    cfg, found, refused = model.config, {}, {}
    for name, vae in decoders(model):
        for dtype in DTYPES:
            one = jax.tree.map(lambda x: x.astype(dtype), vae)  # noqa: B023  # called at once
            try:
                found[f"{name} {dtype}"] = decoding(cfg, one, repeat, seed)
            except MemoryError as error:
                refused[f"{name} {dtype}"] = str(error)
    base = found.get(BASE)
    return VaeReport(
        **report.head("vae", model, seed),
        width=cfg.width,
        height=cfg.height,
        latents=cfg.stream.chunk,
        frames=cfg.frames_per_chunk,
        repeats=repeat,
        decoders=found,
        ratios={name: base.chunk_s / x.chunk_s for name, x in found.items()} if base else {},
        refused=refused,
        peak_memory_bytes=report.peak_memory(),
    )


def decoders(model: Any) -> Iterator[tuple[str, VAE | TAE]]:
    """The model's full VAE and each of its faster decoders, by name."""
    yield "full", model.vae
    dtype = jax.tree.leaves(model.vae)[0].dtype
    for name, cfg in model.config.decoders:
        if model.origin.name == bench_model.WEIGHTS:
            yield name, bench_model.decoder(cfg, jax.random.key(0), dtype)
        else:
            abstract = nnx.eval_shape(functools.partial(build, cfg, rngs=nnx.Rngs(0)))
            tensors = weights.read(models.folder_of(model.origin.name), f"vae_{name}")
            yield name, weights.place(abstract, tensors, dtype=dtype)


def decoding(cfg: ModelConfig, vae: VAE | TAE, repeat: int, seed: int) -> Decoding:
    """Measures one decoder.

    Raises MemoryError where it would not fit.
    """
    shape = (1, cfg.stream.chunk, cfg.latent_height, cfg.latent_width, cfg.vae.latent_channels)
    latents = jax.random.normal(jax.random.key(seed), shape, jax.tree.leaves(vae)[0].dtype)
    carry = coder.init_carry(vae, 1, cfg.height, cfg.width)
    with CompileClock() as clock:
        program = rollout.decode.lower(vae, carry, latents, first=False).compile()
    temporary = report.check_room(program)

    def chunk() -> None:
        nonlocal carry
        carry, pixels = program(vae, carry, latents)
        jax.block_until_ready(pixels)

    chunk(), chunk()
    times = [timed(chunk) for _ in range(repeat)]
    parts = staged(vae, latents, carry.layers, repeat)
    return Decoding(
        chunk_s=statistics.median(times),
        best_s=min(times),
        fps=cfg.frames_per_chunk / statistics.median(times),
        stages=parts,
        stages_s=sum(parts.values()),
        convolutions=convolutions(vae, latents, carry.layers, repeat),
        temporary_bytes=temporary,
        compile_s=clock.seconds,
    )


def staged(vae: VAE | TAE, x: Any, carry: Any, repeat: int) -> dict[str, float]:
    """Median seconds of each stage on what the one before makes of `x`."""
    found = {}
    for name, stage, part in stages(vae, carry):
        program = jax.jit(stage)
        made = jax.block_until_ready(program(vae, x, part))
        once = lambda: jax.block_until_ready(program(vae, x, part))  # noqa: B023, E731
        found[name] = statistics.median(timed(once) for _ in range(repeat))
        x = made[0]
    return found


def convolutions(vae: VAE | TAE, x: Any, carry: Any, repeat: int) -> dict[str, dict[str, float]]:
    """Seconds of one causal convolution of each stage that has such blocks, way by way."""
    found = {}
    for name, stage, part in stages(vae, carry) if isinstance(vae, VAE) else ():
        if name not in ("in", "out"):
            found[name] = bench_convolutions.measured(x, repeat)
        x = jax.eval_shape(stage, vae, x, part)[0]
    return found


def stages(vae: VAE | TAE, carry: Any) -> list[tuple[str, Stage, Any]]:
    """The decoder cut where its resolution changes: name, function, and part of the carry."""
    return _of_tae(vae, carry) if isinstance(vae, TAE) else _of_wan(vae, carry)


def _of_wan(vae: VAE, carry: Any) -> list[tuple[str, Stage, Any]]:
    head, body, end = carry
    layers = vae.decoder.layers
    cuts = [i for i, layer in enumerate(layers) if isinstance(layer, Level)]

    def begin(vae, x, carry):
        z = coder.denormalise(vae.cfg, x)
        return vae.decoder.conv_in(vae.conv2(z), carry, False)

    def finish(vae, x, carry):
        decoder = vae.decoder
        x, carry = decoder.conv_out(jax.nn.silu(decoder.norm(x)), carry, False)
        return jnp.clip(unpatchify(x, vae.cfg.patch), -1, 1), carry

    spans = zip([0, *cuts], [*cuts, len(layers)], strict=True)
    middle = [(_span(i, j), body[i:j]) for i, j in spans]
    return [("in", begin, head), *_named(middle), ("out", finish, end)]


def _of_tae(tae: TAE, carry: Any) -> list[tuple[str, Stage, Any]]:
    layers = tae.decoder.layers
    cuts = [i + 1 for i, layer in enumerate(layers) if isinstance(layer, Grow)]

    def begin(tae, x, carry):
        return jax.nn.relu(tae.decoder.conv_in(jnp.tanh(x / 3) * 3)), carry

    def finish(tae, x, carry):
        x = pixel_shuffle(tae.decoder.conv_out(jax.nn.relu(x)), tae.cfg.patch)
        return jnp.clip(2 * x - 1, -1, 1), carry

    spans = zip([0, *cuts[:-1]], cuts, strict=True)
    groups = [(_span(i, j), carry[i:j]) for i, j in spans]
    return [("in", begin, ()), *_named(groups, 1), ("out", finish, ())]


def _span(start: int, end: int) -> Stage:
    def run(vae, x, carry):
        return chain(vae.decoder.layers[start:end], x, carry, False)

    return run


def _named(groups: list, first: int = 0) -> list[tuple[str, Stage, Any]]:
    """Up block by up block, from 1; what is before them is the middle."""
    names = (f"up {i}" if i else "middle" for i in range(first, first + len(groups)))
    return [(name, *group) for name, group in zip(names, groups, strict=True)]
